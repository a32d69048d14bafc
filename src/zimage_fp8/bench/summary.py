"""From a record's raw rows to the numbers that tables, plots and comparisons show."""

from collections.abc import Mapping
from statistics import fmean, median
from typing import Literal

from zimage_fp8.bench.record import (
    GuidanceProbe,
    LoadRecord,
    Parameters,
    RequestRecord,
    VariantRecord,
)
from zimage_fp8.bench.statistics import Interval, mean_interval, percentile_interval

Metric = Literal["psnr_db", "ssim", "lpips", "clip_image", "clip_text"]
Case = tuple[int, str]  # (index of the prompt, size)

PERCENTILES = (50, 90, 99)
HIGHER_IS_BETTER: Mapping[Metric, bool] = {
    "psnr_db": True,
    "ssim": True,
    "lpips": False,
    "clip_image": True,
    "clip_text": True,
}


def first_pictures(variant: VariantRecord) -> dict[Case, RequestRecord]:
    """(prompt, size) -> its first request; repetitions are for timing."""
    return {(row.prompt, row.size): row for row in reversed(variant.requests)}


def metric_rows(
    variant: VariantRecord, metric: Metric, parameters: Parameters, stratum: str | None = None
) -> dict[Case, float]:
    """(prompt, size) -> the metric, of one stratum or of all. Empty when it was not measured."""
    rows = {}
    for case, request in sorted(first_pictures(variant).items()):
        value = getattr(request.quality, metric) if request.quality else None
        if value is not None and stratum in (None, parameters.strata[case[0]]):
            rows[case] = float(value)
    return rows


def strata(parameters: Parameters) -> list[str]:
    """Each stratum once, in the profile's order."""
    return list(dict.fromkeys(parameters.strata))


def latency_percentiles(variant: VariantRecord, size: str) -> dict[int, Interval]:
    """50, 90, 99 -> seconds with its interval, over the timed requests of one size."""
    values = variant.latencies_s(size)
    return {percent: percentile_interval(values, percent) for percent in PERCENTILES}


def stage_means_s(variant: VariantRecord, size: str) -> dict[str, float]:
    """The server's stages, and `outside`: what is left of the latency (HTTP, base64, client).

    Empty when the server tells no stages.
    """
    rows = [row for row in variant.timed if row.size == size and row.timings_s]
    if not rows:
        return {}
    names = dict.fromkeys(name for row in rows for name in row.timings_s)
    means = {name: fmean(row.timings_s.get(name, 0.0) for row in rows) for name in names}
    return means | {"outside": fmean(row.latency_s for row in rows) - sum(means.values())}


def steps_per_s(variant: VariantRecord, parameters: Parameters, size: str) -> float:
    """As the seed card: denoise steps over the whole request, at the mean latency."""
    return parameters.steps / fmean(variant.latencies_s(size))


def energy_per_image_j(variant: VariantRecord, size: str) -> Interval | None:
    """Mean over the timed requests; None where there is no energy counter."""
    joules = [row.energy_j for row in variant.timed if row.size == size and row.energy_j]
    return mean_interval(joules) if joules else None


def images_per_s(load: LoadRecord) -> float:
    return len(load.latencies_s) / load.duration_s


def goodput_per_s(load: LoadRecord) -> float | None:
    """Answers within the SLO, per second; None without one."""
    if load.slo_s is None:
        return None
    return sum(latency_s <= load.slo_s for latency_s in load.latencies_s) / load.duration_s


def guidance_cost(probe: GuidanceProbe) -> float:
    """What turning guidance on added, in forwards per step: near 1 when it ran only when asked."""
    step_s = step_seconds(probe)
    return (median(probe.on_s) - median(probe.off_s)) / (probe.steps * step_s)


def step_seconds(probe: GuidanceProbe) -> float:
    """Of one step without guidance. At least a microsecond, so that it can divide."""
    return max((median(probe.twice_s) - median(probe.off_s)) / probe.steps, 1e-6)
