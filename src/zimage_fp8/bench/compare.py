"""Two records or more: what changed from one to the next beyond noise, and several as one."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from zimage_fp8.bench.record import MEMORY_METHODS, Pass, Record, VariantRecord, read_record
from zimage_fp8.bench.statistics import Verdict, change_interval, compare_paired, verdict
from zimage_fp8.bench.summary import HIGHER_IS_BETTER, Metric, first_pictures, metric_rows
from zimage_fp8.errors import UsageError, ZImageError

# Two runs of one thing differ by this much though each repeats itself better: the profiles call a
# server warm when two medians agree within it.
MIN_CHANGE = 0.01
SAME_WORK = ("model", "parameters", "cpu", "cores", "gpus")
SAME_RUN = (*SAME_WORK, "profile", "versions", "commit", "no_quality")
METRICS: tuple[Metric, ...] = ("psnr_db", "ssim", "lpips", "clip_image", "clip_text")

What = Literal["latency", "memory", "psnr_db", "ssim", "lpips", "clip_image", "clip_text", "gone"]


@dataclass(frozen=True)
class Change:
    """One figure in both records. change: a fraction for latency and memory, else a difference.

    low, high: its 95 % interval, None where nothing is known about the spread. size: empty for
    what is of a whole run.
    """

    pass_name: str
    variant: str
    size: str
    what: What
    old: float | None
    new: float | None
    change: float | None
    low: float | None
    high: float | None
    verdict: Verdict

    @property
    def is_relative(self) -> bool:
        return self.what in ("latency", "memory")


def compare_records(old: Record, new: Record) -> list[Change]:
    """Every figure that both records have, in the old one's order; what is gone counts as worse.

    Raises UsageError when the records are not of the same work on the same machine.
    """
    refuse_different([old, new], SAME_WORK)
    return [
        change
        for one, other in _passes_of_both(old, new)
        for variant in one.variants
        for change in _changes(old, new, one.name, variant, _named(other, variant.name))
    ]


def _passes_of_both(old: Record, new: Record) -> Iterator[tuple[Pass, Pass | None]]:
    there = {one.name: one for one in new.passes}
    yield from ((one, there.get(one.name)) for one in old.passes)


def _named(one: Pass | None, name: str) -> VariantRecord | None:
    return next((v for v in one.variants if v.name == name), None) if one else None


def _changes(
    old: Record, new: Record, where: str, before: VariantRecord, after: VariantRecord | None
) -> Iterator[Change]:
    if after is None:
        yield Change(where, before.name, "", "gone", None, None, None, None, None, "worse")
        return
    for size in old.parameters.sizes:
        yield _latency_change(where, before, after, size)
    if change := _memory_change(where, before, after):
        yield change
    for metric in METRICS:
        ours = metric_rows(after, metric, new.parameters)
        theirs = metric_rows(before, metric, old.parameters)
        if not ours or not theirs:
            continue
        is_up = HIGHER_IS_BETTER[metric]
        found = compare_paired(ours, theirs, higher_is_better=is_up)
        difference = found.difference
        values = [median(rows.values()) for rows in (theirs, ours)]
        yield Change(
            where, before.name, "", metric, values[0], values[1], difference.value,
            difference.low, difference.high, found.verdict,
        )  # fmt: skip


def _latency_change(where: str, before: VariantRecord, after: VariantRecord, size: str) -> Change:
    old, new = before.latencies_s(size), after.latencies_s(size)
    found = change_interval(new, old)
    says = verdict(found, higher_is_better=False)
    if abs(found.value) < MIN_CHANGE:
        says = "not distinguishable"
    return Change(
        where, before.name, size, "latency", median(old), median(new), found.value,
        found.low, found.high, says,
    )  # fmt: skip


def _memory_change(where: str, before: VariantRecord, after: VariantRecord) -> Change | None:
    """By the first method that both have; a peak has no spread, so a percent decides."""
    for method in MEMORY_METHODS:
        old, new = before.peak_memory_bytes.get(method), after.peak_memory_bytes.get(method)
        if old and new:
            change = new / old - 1
            says: Verdict = "not distinguishable"
            if abs(change) >= MIN_CHANGE:
                says = "worse" if change > 0 else "better"
            return Change(
                where, before.name, "", "memory", float(old), float(new), change, None, None, says
            )
    return None


def comparison_text(changes: Sequence[Change]) -> str:
    """What changed beyond noise, one line each, worse first; then how much did not."""
    lines = [
        _line(change)
        for says in ("worse", "better")
        for change in changes
        if change.verdict == says
    ]
    same = sum(change.verdict == "not distinguishable" for change in changes)
    return "\n".join([*lines, f"{same} of {len(changes)} figures are not distinguishable"])


def _line(change: Change) -> str:
    where = " ".join(filter(None, (f"pass {change.pass_name}", change.variant, change.size)))
    if change.what == "gone" or change.change is None:
        return f"worse   {where}: no longer measured"
    scale, unit = (100, " %") if change.is_relative else (1, "")
    digits = 1 if change.is_relative else 4
    span = ""
    if change.low is not None and change.high is not None:
        bounds = (f"{bound * scale:+.{digits}f}" for bound in (change.low, change.high))
        span = f" ({' to '.join(bounds)})"
    amount = f"{change.change * scale:+.{digits}f}{unit}{span}"
    return f"{change.verdict:<7} {where}: {change.what} {amount}, {_values(change)}"


def _values(change: Change) -> str:
    unit = {"latency": (1.0, " s", 3), "memory": (2.0**30, " GiB", 2)}
    scale, name, digits = unit.get(change.what, (1.0, "", 4))
    old, new = (
        "?" if value is None else f"{value / scale:.{digits}f}"
        for value in (change.old, change.new)
    )
    return f"median {old} -> {new}{name}" if change.what != "memory" else f"{old} -> {new}{name}"


def refuse_different(records: Sequence[Record], fields: Sequence[str]) -> None:
    """Raise UsageError, naming what differs, unless all records agree in these fields."""
    first, *others = map(_facts, records)
    found = dict.fromkeys(
        line
        for facts in others
        for field in fields
        for line in _differences(field, first[field], facts[field])
    )
    if found:
        raise UsageError(
            "the records cannot be compared: " + "; ".join(found),
            hint="measure both with the same profile, on the same machine",
        )


def _facts(record: Record) -> dict[str, object]:
    """What decides whether records can stand together. Of a machine, what computes: its memory
    and its kernel's name change by a restart."""
    machine = record.machine
    gpus = [gpu.name for gpu in machine.gpus]
    hardware = {"cpu": machine.cpu, "cores": machine.cores, "gpus": gpus}
    return {**record.model_dump(mode="json", exclude={"passes"}), **hardware}


def _differences(name: str, one: object, other: object) -> Iterator[str]:
    """`parameters.steps: 8 and 9` for every leaf that differs; lists are leaves."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            yield from _differences(f"{name}.{key}", one.get(key), other.get(key))
    elif one != other:
        yield f"{name}: {_short(one)} and {_short(other)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def merge_records(paths: Sequence[Path], out: Path) -> Record:
    """Several runs of one workload as one record, its pictures copied below `out`.

    Passes of one name become one; the first run's BF16 stands for all, whose pictures must be the
    same. Raises UsageError for runs that differ or measured the same variant, ZImageError for
    pictures that cannot be copied.
    """
    records = [read_record(path) for path in paths]
    refuse_different(records, SAME_RUN)
    _refuse_other_references(records)
    moved = [_moved(record, f"run{index}") for index, record in enumerate(records, 1)]
    passes: dict[str, Pass] = {}
    for record in moved:
        for one in record.passes:
            before = passes.get(one.name)
            passes[one.name] = _joined(before, one) if before else one
    merged = moved[0].model_copy(
        update={
            "passes": list(passes.values()),
            "flags": [flag for record in moved for flag in record.flags],
        }
    )
    for index, path in enumerate(paths, 1):
        _copy_pictures(path, records[index - 1], out / f"run{index}")
    return Record.model_validate(merged.model_dump())


def _refuse_other_references(records: Sequence[Record]) -> None:
    """Decibels against two different references have nothing in common."""
    digests = [
        {case: row.sha256 for case, row in first_pictures(one.reference).items()}
        for record in records
        for one in record.passes
        if one.reference and record.no_quality is None and one.name == records[0].passes[0].name
    ]
    if any(found != digests[0] for found in digests[1:]):
        raise UsageError(
            "the records cannot be merged: their BF16 pictures differ, so their PSNR and SSIM are "
            "against different references",
            hint="measure all variants in one run",
        )


def _joined(first: Pass, second: Pass) -> Pass:
    if first.attention != second.attention:
        raise UsageError(
            f"the records cannot be merged: pass {first.name} asked for attention "
            f"{first.attention} and {second.attention}"
        )
    new = [variant for variant in second.variants if variant is not second.reference]
    names = {variant.name for variant in first.variants}
    if twice := [variant.name for variant in new if variant.name in names]:
        raise UsageError(f"the records cannot be merged: both measured {', '.join(twice)}")
    floors = {floor.name for floor in first.floors}
    reason = "Merged from several runs, one after the other."
    return first.model_copy(
        update={
            "order": "sequential",
            "order_reason": reason,
            "variants": [*first.variants, *new],
            "floors": [*first.floors, *(f for f in second.floors if f.name not in floors)],
            "failures": [*first.failures, *second.failures],
        }
    )


def _moved(record: Record, folder: str) -> Record:
    """The record with every picture in `folder`."""

    def moved(variant: VariantRecord) -> VariantRecord:
        rows = [
            row.model_copy(update={"picture": f"{folder}/{row.picture}"})
            for row in variant.requests
        ]
        return variant.model_copy(update={"requests": rows})

    passes = [
        one.model_copy(
            update={
                "variants": [moved(variant) for variant in one.variants],
                "floors": [moved(floor) for floor in one.floors],
            }
        )
        for one in record.passes
    ]
    return record.model_copy(update={"passes": passes})


def _copy_pictures(path: Path, record: Record, folder: Path) -> None:
    variants = [v for one in record.passes for v in (*one.variants, *one.floors)]
    for name in dict.fromkeys(row.picture for v in variants for row in v.requests):
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path.parent / name, folder / name)
        except OSError as error:
            raise ZImageError(f"cannot copy the picture {name}: {error.strerror}") from None
