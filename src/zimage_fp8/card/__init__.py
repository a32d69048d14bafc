"""VERB card: the README.md of each repository in the family, every number from a record."""

import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from zimage_fp8.bench.facts import CheckpointFacts, read_facts
from zimage_fp8.bench.grid import draw_grid, grid_name, grid_prompts
from zimage_fp8.bench.record import REFERENCE, Record, VariantRecord, read_record
from zimage_fp8.bench.summary import first_pictures
from zimage_fp8.card.family import OWN_ENGINE, Card
from zimage_fp8.card.readme import render_card
from zimage_fp8.errors import ZImageError
from zimage_fp8.quant.policy import STATIC_POLICIES


def write_cards(checkpoints: Path, record: Path, *, namespace: str = "your-name") -> list[Card]:
    """Write README.md and images/ into every checkpoint of the family; return the cards.

    checkpoints: a folder of checkpoints, or one checkpoint. record: record.json, with its pictures
    beside it. Raises ZImageError, and writes nothing, when a checkpoint or the record is damaged,
    when a checkpoint is not the one that was measured, or when a picture is missing.
    """
    measured = read_record(record)
    cards = plan_cards(checkpoints, measured, namespace)
    grids = read_grids(measured, record.parent)
    files: dict[Path, bytes] = {}
    for card in cards:
        pictures = {**grids, **read_pictures(card, record.parent)}
        files |= {card.folder / "images" / name: png for name, png in pictures.items()}
        files[card.readme] = render_card(card).encode()
    write_all(files)
    return cards


def plan_cards(checkpoints: Path, record: Record, namespace: str) -> list[Card]:
    """One card per checkpoint found, each checked against the record."""
    found = _find_checkpoints(checkpoints)
    measured = dict.fromkeys(v.policy for v in record.variants if v.policy != REFERENCE)
    for facts in found.values():
        if facts.policy not in measured:
            raise ZImageError(
                f"the record has no row for {facts.policy}, only {', '.join(measured)}",
                hint="run zimage-fp8 bench with this policy",
            )
    own = [facts.policy for facts in found.values()]
    family = [policy for policy in STATIC_POLICIES if policy in {*own, *measured}]
    family += [policy for policy in own if policy not in family]
    cards = [Card(folder, facts, record, family, namespace) for folder, facts in found.items()]
    for card in cards:
        _refuse_another(card.facts, record.model, card.variant)
    return cards


def _refuse_another(facts: CheckpointFacts, model: str, measured: VariantRecord) -> None:
    """Numbers on a card must be those of the very checkpoint that the card lies in."""
    if facts.base_model != model:
        raise ZImageError(
            f"{facts.policy} is made from {facts.base_model}, the record is of {model}"
        )
    if measured.engine != OWN_ENGINE:
        return  # other servers do not tell which checkpoint they serve
    if facts.calibration_digest != (digest := measured.server.get("calibration")):
        raise ZImageError(
            f"{facts.policy} has the calibration {facts.calibration_digest}, but {digest} was "
            "measured: it is another checkpoint",
            hint="run zimage-fp8 bench with this checkpoint in its folder",
        )


def _find_checkpoints(root: Path) -> dict[Path, CheckpointFacts]:
    """folder -> what the checkpoint says of itself; the presets first, in their order."""
    subfolders = [path for path in root.glob("[!.]*") if path.is_dir()]
    found = {folder: facts for folder in (root, *subfolders) if (facts := read_facts(folder))}
    if not found:
        raise ZImageError(
            f"{root} holds no quantized checkpoint",
            hint="zimage-fp8 quantize MODEL --policy all --out DIR makes them",
        )
    homes: dict[str, Path] = {}
    for folder, facts in found.items():
        if (other := homes.setdefault(facts.policy, folder)) != folder:
            raise ZImageError(f"{other} and {folder} are both {facts.policy}: which one is it?")
    return dict(sorted(found.items(), key=lambda item: _place(item[1].policy)))


def _place(policy: str) -> tuple[int, str]:
    """Where a policy stands in a family."""
    is_preset = policy in STATIC_POLICIES
    return (STATIC_POLICIES.index(policy) if is_preset else len(STATIC_POLICIES), policy)


def read_grids(record: Record, folder: Path) -> dict[str, bytes]:
    """file name -> comparison picture: the ones beside the record, drawn where there are none."""
    grids = {}
    for prompt in grid_prompts(record):
        name = grid_name(prompt)
        is_there = (folder / name).is_file()
        grids[name] = _read(folder / name) if is_there else _drawn(record, prompt, folder)
    return grids


def _drawn(record: Record, prompt: int, folder: Path) -> bytes:
    buffer = io.BytesIO()
    draw_grid(record, prompt, folder).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def read_pictures(card: Card, folder: Path) -> dict[str, bytes]:
    """file name -> this variant's first picture of each prompt."""
    first, size = first_pictures(card.variant), card.record.parameters.size
    return {
        f"prompt{prompt}.png": _read(folder / first[prompt, size].picture)
        for prompt in grid_prompts(card.record)
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ZImageError(f"cannot read the picture {path}: {error.strerror}") from None


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write every file or, when one cannot be written, none: to temporary files, then renamed."""
    partials = {path: path.with_name(f".{path.name}.partial") for path in files}
    try:
        for path, partial in partials.items():
            path.parent.mkdir(exist_ok=True)
            partial.write_bytes(files[path])
        for path, partial in partials.items():
            partial.replace(path)
    except OSError as error:
        raise ZImageError(f"cannot write {path}: {error.strerror}") from None
    finally:
        for path, partial in partials.items():
            with suppress(OSError):
                partial.unlink(missing_ok=True)
                path.parent.rmdir()  # fails unless it is empty: one that was made for nothing
