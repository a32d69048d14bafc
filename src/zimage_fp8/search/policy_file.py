"""The result of a search: a policy file that every verb takes, and its evidence as JSON."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

from zimage_fp8.errors import ZImageError
from zimage_fp8.provenance import commit, machine, versions
from zimage_fp8.search.front import Option, Point
from zimage_fp8.search.stretches import PATTERNS, Stretch

SCHEMA = 1


def policy_toml(name: str, summary: str, parts: Sequence[Stretch], specs: Sequence[str]) -> str:
    """Rules, first match wins: per kind the exceptions block by block, then what most get."""
    rules = [f"name = {json.dumps(name)}", f"summary = {json.dumps(summary, ensure_ascii=False)}"]
    chosen = dict(zip(parts, specs, strict=True))
    for kind, pattern in PATTERNS.items():
        of_kind = {part: spec for part, spec in chosen.items() if part.kind == kind}
        counts = Counter(spec for part, spec in of_kind.items() for _ in part.blocks)
        usual = counts.most_common(1)[0][0]
        for part, spec in of_kind.items():
            if spec != usual:
                why = f"{part.name}: found by search"
                rules += [_rule(f"{block}.{pattern}", spec, why) for block in part.blocks]
        rules.append(_rule(f"*.{pattern}", usual, f"{kind} elsewhere: found by search"))
    return "\n\n".join(["\n".join(rules[:2]), *rules[2:]]) + "\n"


def _rule(layers: str, spec: str, why: str) -> str:
    return f'[[rule]]\nlayers = "{layers}"\nspec = "{spec}"\nwhy = "{why}"'


def write_policy(file: Path, parts: Sequence[Stretch], point: Point, summary: str) -> None:
    """Write the rules of `point`; the policy is named after the file."""
    head = (
        f"# {summary}\n# Predicted by adding up the squared errors of the parts; the evidence is "
        f"in {file.with_suffix('.json').name}.\n\n"
    )
    _write(file, head + policy_toml(file.stem, summary, parts, point.specs))


def write_evidence(
    file: Path,
    facts: Mapping[str, object],
    parts: Sequence[Stretch],
    options: Sequence[Sequence[Option]],
) -> None:
    """Everything the choice rests on: `facts`, and what every part may become. Infinite decibels
    are written as null."""
    raw = {
        "schema": SCHEMA,
        **facts,
        "parts": [
            {"name": part.name, "blocks": part.blocks, "options": list(choices)}
            for part, choices in zip(parts, options, strict=True)
        ],
        "made_with": {"versions": versions(), "commit": commit(), "machine": machine()},
    }
    _write(file, json.dumps(_plain(raw), indent=1, allow_nan=False) + "\n")


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ZImageError(f"cannot write {file}: {error.strerror}") from None
