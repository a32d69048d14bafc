"""The benchmark's table, computed from a record and nothing else, for reports and cards."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from zimage_fp8.bench.record import MEMORY_METHODS, Quality, Record, VariantRecord

GIB = 2**30
BEST = "★"

# What a picture may lose before its variant stops being a choice. The seed card's family spans
# 0.76 to 0.90; far below that, these are other pictures.
BEST_MIN_SSIM = 0.70
BEST_RULE = (
    f"{BEST} marks the best overall choice: the smallest product of mean latency and peak memory "
    f"among the variants whose mean SSIM is at least {BEST_MIN_SSIM:.2f}, BF16 included."
)


@dataclass(frozen=True)
class Row:
    """One variant. Changes are fractions of the reference; quality is None for the reference.

    psnr_db: the mean over the pictures that differ from the reference's; infinite when none does.
    """

    policy: str
    summary: str
    latency_s: float
    steps_per_s: float
    memory_bytes: int
    latency_change: float
    memory_saving: float
    psnr_db: float | None
    ssim: float | None
    num_pictures: int
    num_identical: int
    is_best: bool

    @property
    def memory_gib(self) -> float:
        return self.memory_bytes / GIB


def rows(record: Record) -> list[Row]:
    """One row per variant, in the record's order, exactly one of them the best."""
    best = _best(record)
    return [_row(record, variant, variant is best) for variant in record.variants]


def close_to_best(record: Record) -> list[str]:
    """Policies whose range of latencies overlaps with that of the best."""
    best = _best(record)
    low, high = _latency_range(best)
    ranges = {v.policy: _latency_range(v) for v in record.variants if v is not best}
    return [policy for policy, (least, most) in ranges.items() if least <= high and low <= most]


def _best(record: Record) -> VariantRecord:
    return min(filter(_is_choice, record.variants), key=lambda v: _cost(record, v))


def _latency_range(variant: VariantRecord) -> tuple[float, float]:
    latencies = [request.latency_s for request in variant.requests]
    return min(latencies), max(latencies)


def _row(record: Record, variant: VariantRecord, is_best: bool) -> Row:
    latency_s, memory = mean_latency_s(variant), _memory(record, variant)
    reference = record.reference
    judged = [request.quality for request in variant.requests if request.quality]
    return Row(
        policy=variant.policy,
        summary=variant.summary,
        latency_s=latency_s,
        steps_per_s=record.parameters.steps / latency_s,
        memory_bytes=memory,
        latency_change=latency_s / mean_latency_s(reference) - 1,
        memory_saving=1 - memory / _memory(record, reference),
        psnr_db=_mean_psnr_db(judged),
        ssim=mean_ssim(variant),
        num_pictures=len(variant.requests),
        num_identical=sum(quality.is_identical for quality in judged),
        is_best=is_best,
    )


def mean_latency_s(variant: VariantRecord) -> float:
    return fmean(request.latency_s for request in variant.requests)


def mean_ssim(variant: VariantRecord) -> float | None:
    """The mean over pictures; None for the reference."""
    judged = [request.quality.ssim for request in variant.requests if request.quality]
    return fmean(judged) if judged else None


def _mean_psnr_db(judged: Sequence[Quality]) -> float | None:
    if not judged:
        return None
    differing = [quality.psnr_db for quality in judged if not quality.is_identical]
    return fmean(differing) if differing else float("inf")


def _memory(record: Record, variant: VariantRecord) -> int:
    return variant.peak_memory_bytes[record.memory_method]


def _is_choice(variant: VariantRecord) -> bool:
    ssim = mean_ssim(variant)
    return ssim is None or ssim >= BEST_MIN_SSIM


def _cost(record: Record, variant: VariantRecord) -> float:
    return mean_latency_s(variant) * _memory(record, variant)


def header(record: Record) -> list[str]:
    memory = MEMORY_METHODS[record.memory_method].header
    return [
        "Variant", "Mean latency (s)", "Steps/s", memory, "Δ latency vs BF16", "Mem savings",
        "PSNR vs BF16 (dB)", "SSIM vs BF16",
    ]  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row as text, in the seed card's units and digits."""
    return [
        row.policy,
        f"{row.latency_s:.3f}",
        f"{row.steps_per_s:.2f}",
        f"{row.memory_gib:.2f}",
        f"{row.latency_change:+z.1%}",
        f"{row.memory_saving:+z.1%}",
        psnr_text(row),
        "ref" if row.ssim is None else f"{row.ssim:.4f}",
    ]


def psnr_text(row: Row, unit: str = "") -> str:
    """`21.05`, and how many pictures are identical to the reference's when some are."""
    if row.psnr_db is None:
        return "ref"
    if row.num_identical == row.num_pictures:
        return "identical"
    some = f" ({row.num_identical} of {row.num_pictures} identical)" if row.num_identical else ""
    return f"{row.psnr_db:.2f}{unit}{some}"


def quality_text(quality: Quality | None) -> str:
    """One picture's quality in words short enough for a label."""
    if quality is None:
        return "the reference"
    if quality.is_identical:
        return "identical"
    return f"{quality.psnr_db:.2f} dB · SSIM {quality.ssim:.4f}"


def marked_table(record: Record, here: str | None = None) -> str:
    """The table in markdown: the best row starred, the row `here` in bold and pointed at."""
    body = []
    for row in rows(record):
        text = cells(row)
        if row.policy == here:
            text = [f"**{cell}**" for cell in text]
        text[0] += (f" {BEST}" if row.is_best else "") + (" 👈" if row.policy == here else "")
        body.append(text)
    return markdown_table(header(record), body)


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """First column left, the others right."""
    lines = [list(header), ["---"] + ["--:"] * (len(header) - 1), *map(list, body)]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
