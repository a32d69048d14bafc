"""The tables behind the main one: how sure, how close, where time and memory go, under load."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from zimage_fp8.bench.record import (
    MEMORY_METHODS,
    Pass,
    Record,
    VariantRecord,
)
from zimage_fp8.bench.statistics import (
    Interval,
    change_interval,
    compare_paired,
    percentile,
    summarize,
    verdict,
)
from zimage_fp8.bench.summary import (
    Case,
    Metric,
    energy_per_image_j,
    goodput_per_s,
    guidance_cost,
    images_per_s,
    latency_percentiles,
    metric_rows,
    stage_means_s,
    strata,
)
from zimage_fp8.bench.table import GIB, Table

METRIC_NAMES: dict[Metric, str] = {
    "psnr_db": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "clip_image": "CLIP, image to image",
    "clip_text": "CLIP, text, change",
}
MIN_TIMED = {50: 1, 90: 10, 99: 30}  # percentile -> requests below which it is but the maximum
RIVALS = ("online_fp8", "full")  # who a variant has to beat: the one that needs no checkpoint


def interval_text(found: Interval, digits: int, scale: float = 1.0, sign: str = "") -> str:
    """`1.10 (1.05 to 1.15)`; the value alone where nothing is known about its spread."""

    def number(value: float) -> str:
        return f"{value * scale:{sign}.{digits}f}"

    if found.low is None or found.high is None:
        return number(found.value)
    return f"{number(found.value)} ({number(found.low)} to {number(found.high)})"


def latency_table(one: Pass, size: str) -> Table:
    """Percentiles with intervals, and whether a variant is faster than BF16 beyond noise."""
    head = [
        "Variant", "Attention", "Timed", "p50 (s)", "p90 (s)", "p99 (s)", "Δ p50 vs BF16 (%)",
        "Verdict",
    ]  # fmt: skip
    body = []
    base = one.reference.latencies_s(size) if one.reference else None
    for variant in one.variants:
        at, timed = latency_percentiles(variant, size), len(variant.latencies_s(size))
        change, says = "ref", "ref"
        if variant is not one.reference:
            found = change_interval(variant.latencies_s(size), base) if base else None
            change = interval_text(found, 1, 100, "+") if found else "n/a"
            says = _speed_verdict(found)
        body.append(
            [
                variant.name,
                variant.attention or "not told",
                str(timed),
                *(
                    interval_text(at[percent], 3) if timed >= least else "n/a"
                    for percent, least in MIN_TIMED.items()
                ),
                change,
                says,
            ]
        )
    return Table(head, body)


def _speed_verdict(change: Interval | None) -> str:
    if change is None:
        return "n/a"
    says = verdict(change, higher_is_better=False)
    return {"better": "faster", "worse": "slower"}.get(says, says)


def rival_of(one: Pass) -> VariantRecord | None:
    """The variant that the others are compared with, picture by picture."""
    found = {variant.policy: variant for variant in one.variants if variant is not one.reference}
    named = [found[policy] for policy in RIVALS if policy in found]
    return next(iter([*named, *found.values()]), None)


def quality_table(record: Record, one: Pass) -> Table | None:
    """Every metric that was measured, over prompts and sizes; the noise floors below.

    None where pictures were not compared.
    """
    rival = rival_of(one)
    judged = [v for v in (*one.variants, *one.floors) if v is not one.reference]
    metrics = [
        metric
        for metric in METRIC_NAMES
        if any(metric_rows(variant, metric, record.parameters) for variant in judged)
    ]
    if record.no_quality or not judged or not metrics or rival is None:
        return None
    head = ["Variant", "PSNR mean (dB)", "median", "p10", "SSIM mean", "p10"]
    others: list[Metric] = [metric for metric in metrics if metric not in ("psnr_db", "ssim")]
    head += [METRIC_NAMES[metric] for metric in others]
    head += [f"PSNR vs {rival.name} (dB)", "win / tie / loss", "Verdict"]
    body: list[list[str]] = []
    marks: dict[int, str] = {}
    for variant in judged:
        psnr = metric_rows(variant, "psnr_db", record.parameters)
        text = [FLOOR_NAMES.get(variant.floor or "", variant.name)]
        text += [*_summary_cells(psnr, 2), *_summary_cells(ssim_of(variant, record), 4)[::2]]
        for metric in others:
            values = metric_rows(variant, metric, record.parameters)
            text.append(_summary_cells(values, 4)[0] if values else "n/a")
        if variant.floor:
            marks[len(body)] = "floor"
        theirs = metric_rows(rival, "psnr_db", record.parameters)
        compared = [""] * 3 if variant.floor else _compared(psnr, theirs, variant is rival)
        body.append([*text, *compared])
    return Table(head, body, marks)


FLOOR_NAMES = {
    "rerun": "noise floor: BF16 again",
    "attention": "noise floor: BF16, another attention",
    "next_seed": "another picture: BF16, next seed",
}


def ssim_of(variant: VariantRecord, record: Record) -> dict[Case, float]:
    return metric_rows(variant, "ssim", record.parameters)


def _summary_cells(values: dict[Case, float], digits: int) -> list[str]:
    """Mean with interval, median, p10; `identical` where every picture is."""
    found = summarize(values)
    if found.mean is None or found.median is None or found.p10 is None:
        return ["identical", "", ""]
    mean = interval_text(found.mean, digits)
    mean += f", {found.num_identical} identical" if found.num_identical else ""
    return [mean, f"{found.median:.{digits}f}", f"{found.p10:.{digits}f}"]


def _compared(ours: dict[Case, float], theirs: dict[Case, float], is_rival: bool) -> list[str]:
    if is_rival:
        return ["", "", "compared with"]
    found = compare_paired(ours, theirs)
    closer = {"better": "closer", "worse": "farther"}.get(found.verdict, found.verdict)
    counts = f"{found.wins} / {found.ties} / {found.losses}"
    return [interval_text(found.difference, 2, sign="+"), counts, closer]


def strata_table(record: Record, one: Pass, metric: Metric = "psnr_db") -> Table | None:
    """The mean per kind of prompt; None with one kind, or where pictures were not compared."""
    kinds = strata(record.parameters)
    judged = [v for v in (*one.variants, *one.floors) if v is not one.reference]
    if record.no_quality or len(kinds) < 2 or not judged:
        return None
    body = []
    for variant in judged:
        found = [metric_rows(variant, metric, record.parameters, kind) for kind in kinds]
        cells = [_mean_text(values) for values in found]
        body.append([FLOOR_NAMES.get(variant.floor or "", variant.name), *cells])
    return Table([f"{METRIC_NAMES[metric]} by kind", *map(_spaced, kinds)], body)


def _mean_text(values: dict[Case, float]) -> str:
    finite = [value for value in values.values() if value != float("inf")]
    if not values:
        return "n/a"
    return f"{fmean(finite):.2f}" if finite else "identical"


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def stage_table(one: Pass, size: str) -> Table:
    """Where a request's time goes, in milliseconds, and what came before the first request."""
    found = {variant.name: stage_means_s(variant, size) for variant in one.variants}
    names = list(dict.fromkeys(stage for stages in found.values() for stage in stages))
    names = [*(stage for stage in names if stage != "outside"), *(["outside"] if names else [])]
    head = ["Variant", *names, "latency min to max", "load (s)", "first picture (s)"]
    body = []
    for variant in one.variants:
        stages, latencies = found[variant.name], variant.latencies_s(size)
        cells = [f"{stages[name] * 1000:.0f}" if name in stages else "n/a" for name in names]
        span = f"{min(latencies) * 1000:.0f} to {max(latencies) * 1000:.0f}"
        starts = [_optional(variant.load_s), _optional(variant.cold_start_s)]
        body.append([variant.name, *cells, span, *starts])
    return Table(head, body)


def _optional(seconds: float | None) -> str:
    return "n/a" if seconds is None else f"{seconds:.1f}"


def memory_table(one: Pass) -> Table:
    """Every peak by its own name, in GiB; in brackets while loading and afterwards."""
    methods = [m for m in MEMORY_METHODS if any(m in v.peak_memory_bytes for v in one.variants)]
    body = []
    for variant in one.variants:
        cells = []
        for method in methods:
            peak = variant.peak_memory_bytes.get(method)
            parts = [
                f"{name} {value / GIB:.2f}"
                for name, value in (
                    ("load", variant.load_memory_bytes.get(method)),
                    ("steady", variant.steady_memory_bytes.get(method)),
                )
                if value
            ]
            split = f" ({', '.join(parts)})" if parts else ""
            cells.append(f"{peak / GIB:.2f}{split}" if peak else "n/a")
        samples = f"{variant.num_memory_samples} at {variant.memory_sampling_hz:g} Hz"
        body.append([variant.name, *cells, samples])
    return Table(["Variant", *(MEMORY_METHODS[m].header for m in methods), "Samples"], body)


def power_table(one: Pass, size: str) -> Table | None:
    """Energy, clocks and throttling; None where no GPU was watched."""
    if all(variant.gpu is None for variant in one.variants):
        return None
    head = [
        "Variant", "Energy per image (J)", "SM clock (MHz)", "Power (W)", "Temperature (°C)",
        "Throttled",
    ]  # fmt: skip
    body = []
    for variant in one.variants:
        energy, gpu = energy_per_image_j(variant, size), variant.gpu
        spreads = [gpu.sm_clock_mhz, gpu.power_w, gpu.temperature_c] if gpu else [None] * 3
        shown = [
            f"{one.mean:.0f} ({one.least:.0f} to {one.greatest:.0f})" if one else "n/a"
            for one in spreads
        ]
        reasons = gpu.throttled if gpu else {}
        why = ", ".join(f"{_spaced(name)} {share:.0%}" for name, share in reasons.items())
        joules = interval_text(energy, 0) if energy else "n/a"
        body.append([variant.name, joules, *shown, why or "no"])
    return Table(head, body)


def load_table(one: Pass) -> Table | None:
    """Every load test; None without any."""
    body = []
    for variant in one.variants:
        for load in variant.load:
            asked = (
                f"{load.concurrency} at a time"
                if load.concurrency is not None
                else f"Poisson, {load.rate_per_s:.3g}/s"
            )
            goodput = goodput_per_s(load)
            within = "n/a" if goodput is None else f"{goodput:.3g} (within {load.slo_s:.3g} s)"
            spread = [
                f"{percentile(load.latencies_s, percent):.3f}" if load.latencies_s else "n/a"
                for percent in (50, 90, 99)
            ]
            failed = ", ".join(f"{count} × {error}" for error, count in load.failures.items())
            cells = [f"{images_per_s(load):.3g}", within, *spread, failed or "none"]
            body.append([variant.name, load.size, asked, *cells])
    head = [
        "Variant", "Size", "Requests", "Images/s", "Goodput/s", "p50 (s)", "p90 (s)", "p99 (s)",
        "Failed",
    ]  # fmt: skip
    return Table(head, body) if body else None


def guidance_table(one: Pass) -> Table | None:
    """What the servers did when guidance was off, and on; None where nobody was asked."""
    body = []
    for variant in one.variants:
        if variant.probe is None:
            continue
        probe = variant.probe
        forwards = sorted({str(r.nfe) for r in variant.requests if r.nfe is not None})
        steps = f"{len(variant.sigmas) - 1}" if variant.sigmas else "not told"
        cost = f"{guidance_cost(probe):+.2f}"
        same = "the same" if probe.is_same_picture else "another"
        body.append([variant.name, ", ".join(forwards) or "not told", steps, cost, same])
    head = [
        "Variant", "Forwards told", "Steps told", "Guidance on: forwards more per step",
        "Guidance on: picture",
    ]  # fmt: skip
    return Table(head, body) if body else None


def warnings_of(record: Record) -> Iterator[str]:
    """Every flag and failure of the run, as sentences; the run's own first, equal ones together."""
    yield from (flag.text for flag in record.flags)
    for one in record.passes:
        names: dict[str, list[str]] = {}
        for variant in (*one.variants, *one.floors):
            for flag in variant.flags:
                names.setdefault(flag.text, []).append(variant.name)
        for text, affected in names.items():
            yield f"{_where(record, one)}{', '.join(affected)}: {text}"
        for failure in one.failures:
            yield f"{_where(record, one)}{failure.name} failed: {_first_line(failure.error)}"


def _where(record: Record, one: Pass) -> str:
    return f"Pass {one.name}, " if len(record.passes) > 1 else ""


def _first_line(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines() or ["no reason given"]
    return lines[0]
