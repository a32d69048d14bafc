"""The benchmark's main table, computed from a record and nothing else, for reports and cards."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from zimage_fp8.bench.record import (
    MEMORY_METHODS,
    Pass,
    Quality,
    Record,
    VariantRecord,
)
from zimage_fp8.bench.statistics import mean_interval
from zimage_fp8.bench.summary import Metric, metric_rows, steps_per_s

GIB = 2**30
QUALITY: tuple[Metric, Metric] = ("psnr_db", "ssim")  # the seed card's
BEST = "★"
HERE = "👈"

# What a picture may lose before its variant stops being a choice. The seed card's family spans
# 0.76 to 0.90; far below that, these are other pictures.
BEST_MIN_SSIM = 0.70
BEST_RULE = (
    f"{BEST} marks the best overall choice of a table: the smallest product of mean latency and "
    f"peak memory among the variants whose mean SSIM is at least {BEST_MIN_SSIM:.2f}, BF16 "
    "included."
)

BEST_RULE_WITHOUT_QUALITY = (
    f"{BEST} marks the smallest product of mean latency and peak memory of a table, BF16 included; "
    "quality has no part in it."
)


@dataclass(frozen=True)
class Table:
    """Cells as text. `marks`: row -> its CSS class in a page (best, here, floor, failed)."""

    header: list[str]
    body: list[list[str]]
    marks: dict[int, str] = field(default_factory=dict)

    def markdown(self) -> str:
        return markdown_table(self.header, self.body)


@dataclass(frozen=True)
class Row:
    """One variant at one size. Changes are fractions of the reference, None without one.

    psnr_db: the mean over the pictures that differ from the reference's; infinite when none does.
    psnr_db and ssim are None where pictures were not compared, as the reference's.
    """

    name: str
    policy: str
    summary: str
    is_reference: bool
    latency_s: float
    latency_change: float | None
    steps_per_s: float
    memory_bytes: int | None
    memory_saving: float | None
    psnr_db: float | None
    ssim: float | None
    num_pictures: int
    num_identical: int
    is_best: bool = False

    @property
    def memory_gib(self) -> float | None:
        return None if self.memory_bytes is None else self.memory_bytes / GIB


def rows(record: Record, one: Pass | None = None, size: str | None = None) -> list[Row]:
    """One row per variant of a pass (the main one) at a size (the first), in the record's order."""
    one, size = one or record.passes[0], size or record.parameters.size
    found = [_row(record, one, variant, size) for variant in one.variants]
    best = min(filter(_is_choice, found), key=_cost, default=None)
    return [replace(row, is_best=row is best) for row in found]


def _row(record: Record, one: Pass, variant: VariantRecord, size: str) -> Row:
    reference = one.reference
    latency_s, memory = fmean(variant.latencies_s(size)), _memory(one, variant)
    base_s = fmean(reference.latencies_s(size)) if reference else None
    base_memory = _memory(one, reference) if reference else None
    psnrs, ssims = (_values(record, variant, metric, size) for metric in QUALITY)
    differing = [psnr for psnr in psnrs if psnr != float("inf")]
    return Row(
        name=variant.name,
        policy=variant.policy,
        summary=variant.summary,
        is_reference=variant is reference,
        latency_s=latency_s,
        latency_change=latency_s / base_s - 1 if base_s else None,
        steps_per_s=steps_per_s(variant, record.parameters, size),
        memory_bytes=memory,
        memory_saving=1 - memory / base_memory if memory and base_memory else None,
        psnr_db=(fmean(differing) if differing else float("inf")) if psnrs else None,
        ssim=fmean(ssims) if ssims else None,
        num_pictures=len(psnrs),
        num_identical=len(psnrs) - len(differing),
    )


def _values(record: Record, variant: VariantRecord, metric: Metric, size: str) -> list[float]:
    found = metric_rows(variant, metric, record.parameters)
    return [value for (_, at), value in found.items() if at == size]


def _is_choice(row: Row) -> bool:
    return row.ssim is None or row.ssim >= BEST_MIN_SSIM


def _cost(row: Row) -> float:
    """Without a common memory figure latency alone decides."""
    return row.latency_s * (row.memory_bytes or 1)


def close_to_best(record: Record, one: Pass | None = None, size: str | None = None) -> list[str]:
    """Variants whose mean latency has an interval that overlaps with the best one's.

    Where there are too few requests for an interval, the least and greatest stand for it.
    """
    one, size = one or record.passes[0], size or record.parameters.size
    found = zip(rows(record, one, size), one.variants, strict=True)
    spans = {row: _span(variant.latencies_s(size)) for row, variant in found}
    best = next((span for row, span in spans.items() if row.is_best), None)
    if best is None:
        return []
    return [
        row.name
        for row, (low, high) in spans.items()
        if not row.is_best and low <= best[1] and best[0] <= high
    ]


def _span(latencies_s: Sequence[float]) -> tuple[float, float]:
    found = mean_interval(latencies_s)
    if found.low is None or found.high is None:
        return min(latencies_s), max(latencies_s)
    return found.low, found.high


def _memory(one: Pass, variant: VariantRecord) -> int | None:
    return variant.peak_memory_bytes.get(one.memory_method) if one.memory_method else None


def header(one: Pass) -> list[str]:
    method = one.memory_method
    memory = MEMORY_METHODS[method].header if method else "Peak memory"
    return [
        "Variant", "Mean latency (s)", "Steps/s", memory, "Δ latency vs BF16", "Mem savings",
        "PSNR vs BF16 (dB)", "SSIM vs BF16",
    ]  # fmt: skip


def cells(row: Row, no_quality: str | None = None) -> list[str]:
    """A row as text, in the seed card's units and digits. no_quality: why there is none."""
    missing = f"n/a: {no_quality}" if no_quality else "n/a"
    return [
        row.name,
        f"{row.latency_s:.3f}",
        f"{row.steps_per_s:.2f}",
        "n/a" if row.memory_gib is None else f"{row.memory_gib:.2f}",
        "n/a" if row.latency_change is None else f"{row.latency_change:+z.1%}",
        "n/a" if row.memory_saving is None else f"{row.memory_saving:+z.1%}",
        psnr_text(row) or missing,
        "ref" if row.is_reference else missing if row.ssim is None else f"{row.ssim:.4f}",
    ]


def psnr_text(row: Row, unit: str = "") -> str:
    """`21.05`, and how many pictures are identical to the reference's when some are; or nothing."""
    if row.is_reference:
        return "ref"
    if row.psnr_db is None:
        return ""
    if row.num_identical == row.num_pictures:
        return "identical"
    some = f" ({row.num_identical} of {row.num_pictures} identical)" if row.num_identical else ""
    return f"{row.psnr_db:.2f}{unit}{some}"


def quality_text(quality: Quality | None) -> str:
    """One picture's quality in words short enough for a label; nothing for a reference."""
    if quality is None:
        return ""
    if quality.is_identical:
        return "identical"
    return f"{quality.psnr_db:.2f} dB · SSIM {quality.ssim:.4f}"


def main_table(
    record: Record, one: Pass | None = None, size: str | None = None, here: str | None = None
) -> Table:
    """The seed card's table: the best row starred, the row `here` pointed at, failures at the end.

    here: the name of a variant, which is marked in bold.
    """
    one = one or record.passes[0]
    body, marks = [], {}
    for index, row in enumerate(rows(record, one, size)):
        text = cells(row, record.no_quality)
        if row.name == here:
            text = [f"**{cell}**" for cell in text]
            marks[index] = "here"
        if row.is_best:
            marks[index] = "best"
        text[0] += (f" {BEST}" if row.is_best else "") + (f" {HERE}" if row.name == here else "")
        body.append(text)
    head = header(one)
    for failure in one.failures:
        if failure.floor is None:
            marks[len(body)] = "failed"
            reason = failure.error.splitlines()[0] if failure.error else "no reason given"
            body.append([failure.name, f"failed: {reason}", *[""] * (len(head) - 2)])
    return Table(head, body, marks)


def marked_table(record: Record, here: str | None = None) -> str:
    """The main pass's table in markdown."""
    return main_table(record, here=here).markdown()


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """First column left, the others right."""
    lines = [list(header), ["---"] + ["--:"] * (len(header) - 1), *map(list, body)]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
