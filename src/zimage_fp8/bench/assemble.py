"""From the journal to the record: rows put together, pictures compared, oddities flagged."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from zimage_fp8.bench.gpu import HEAT
from zimage_fp8.bench.journal import Progress
from zimage_fp8.bench.memory import SAMPLING_HZ
from zimage_fp8.bench.perceptual import Judge
from zimage_fp8.bench.quality import compare, pixels
from zimage_fp8.bench.record import (
    FailedVariant,
    Flag,
    GpuActivity,
    Parameters,
    Pass,
    Quality,
    RequestRecord,
    VariantRecord,
)
from zimage_fp8.bench.run import Outcome
from zimage_fp8.bench.session import Subject

PARALLEL_FROM = 48  # pairs of pictures; a pool of processes takes seconds to start
# An encoded prompt that is looked up takes less than both; nano's encoder takes 9 ms on two cores.
REMEMBERED_S, REMEMBERED_SHARE = 0.001, 0.1
MANY_SAMPLES = 0.01  # share of samples in which heat slows the GPU, from which it is said

Pair = tuple[Path, Path]


def variant_record(subject: Subject, progress: Progress, parameters: Parameters) -> VariantRecord:
    """One complete row, except for the quality of its pictures."""
    assert progress.started is not None
    server = progress.started.server
    gpu = max(progress.gpu, key=lambda one: one.num_samples, default=None)
    row = VariantRecord(
        name=subject.name,
        policy=subject.policy,
        engine=subject.engine_name,
        floor=subject.floor,
        summary=subject.summary,
        command=subject.shown,
        server=server,
        attention=str(server["attention"]) if server.get("attention") else None,
        load_s=progress.started.load_s,
        cold_start_s=progress.started.cold_start_s,
        warmup_latencies_s=progress.warmup,
        sigmas=progress.started.sigmas,
        requests=progress.requests,
        peak_memory_bytes=_peaks(progress, "load", "steady", "reported"),
        load_memory_bytes=_peaks(progress, "load"),
        steady_memory_bytes=_peaks(progress, "steady"),
        memory_sampling_hz=SAMPLING_HZ,
        num_memory_samples=sum(seen.num_samples for seen in progress.memory),
        gpu=gpu,
        probe=progress.probe,
        load=[progress.loads[place] for place in sorted(progress.loads)],
    )
    flags = [*progress.flags, *_oddities(row, parameters), *_heat(gpu)]
    flags += [*_ignored_seed(row, progress, parameters), *_remembered(row)]
    return row.model_copy(update={"flags": flags})


def _peaks(progress: Progress, *phases: str) -> dict[str, int]:
    """method -> the largest of these phases over all starts of the variant's server."""
    peaks: dict[str, int] = {}
    for seen in progress.memory:
        for phase in phases:
            for method, peak in getattr(seen, phase).items():
                peaks[method] = max(peaks.get(method, 0), peak)
    return peaks


def _oddities(row: VariantRecord, parameters: Parameters) -> Iterator[Flag]:
    asked = parameters.steps * (2 if parameters.guidance else 1)
    counted = sorted({request.nfe for request in row.requests if request.nfe is not None})
    if counted and counted != [asked]:
        yield Flag(
            kind="unequal_forwards",
            text=f"{asked} forwards per picture were asked for, {counted} were run.",
        )
    shown: dict[str, int] = {}
    for request in row.requests:
        other = shown.setdefault(request.sha256, request.prompt)
        if other != request.prompt:
            yield Flag(
                kind="same_pictures",
                text=f"Prompts {other} and {request.prompt} gave the same picture.",
            )
            return


def _ignored_seed(row: VariantRecord, progress: Progress, parameters: Parameters) -> Iterator[Flag]:
    first = next((r for r in row.requests if (r.prompt, r.size) == (0, parameters.size)), None)
    if first and first.sha256 == progress.other_seed:
        yield Flag(
            kind="ignored_seed", text="The next seed gave the same picture: the seed is ignored."
        )


def _remembered(row: VariantRecord) -> Iterator[Flag]:
    """Servers that remember encoded prompts skip a stage; their latency is not a first sight's."""
    took_s = [request.timings_s.get("encode", 0.0) for request in row.requests]
    limit_s = min(max(took_s) * REMEMBERED_SHARE, REMEMBERED_S)
    timed = [request.timings_s["encode"] for request in row.timed if "encode" in request.timings_s]
    count = sum(one <= limit_s for one in timed)
    if count:
        yield Flag(
            kind="remembered_prompts",
            text=f"In {count} of {len(timed)} timed requests the server remembered the encoded "
            "prompt, so that latency is without the text encoder.",
        )


def _heat(gpu: GpuActivity | None) -> Iterator[Flag]:
    """A power cap is how a busy datacenter GPU runs, and is in the record; heat is a fault."""
    for reason, share in (gpu.throttled if gpu else {}).items():
        if reason in HEAT and share >= MANY_SAMPLES:
            yield Flag(
                kind="throttled",
                text=f"The GPU slowed down ({reason}) in {share:.0%} of the samples.",
            )


def pass_record(
    name: str,
    attention: str | None,
    subjects: Sequence[Subject],
    progresses: Mapping[str, Progress],
    outcome: Outcome,
    parameters: Parameters,
) -> Pass:
    """The pass without qualities. Who ran another number of forwards than the reference failed."""
    failed = {one.name for one in outcome.failures}
    rows = [
        variant_record(subject, progresses[subject.name], parameters)
        for subject in subjects
        if subject.name not in failed
    ]
    unequal = list(_unequal(rows))
    names = {one.name for one in unequal}
    kept = [row for row in rows if row.name not in names]
    return Pass(
        name=name,
        attention=attention,
        order="interleaved" if outcome.is_interleaved else "sequential",
        order_reason=outcome.order_reason,
        variants=[row for row in kept if row.floor is None],
        floors=[_with_backend_checked(row, kept[0]) for row in kept if row.floor is not None],
        failures=[*outcome.failures, *unequal],
    )


def _unequal(rows: Sequence[VariantRecord]) -> Iterator[FailedVariant]:
    """Latencies of different numbers of forwards must not share a table."""
    expected = _forwards(rows[0]) if rows else set()
    for row in rows[1:]:
        if expected and _forwards(row) and _forwards(row) != expected:
            yield FailedVariant(
                name=row.name,
                policy=row.policy,
                floor=row.floor,
                error=f"it ran {sorted(_forwards(row))} forwards per picture, the reference "
                f"{sorted(expected)}: their latencies cannot be compared",
            )


def _forwards(row: VariantRecord) -> set[int]:
    return {request.nfe for request in row.requests if request.nfe is not None}


def _with_backend_checked(row: VariantRecord, reference: VariantRecord) -> VariantRecord:
    if row.floor != "attention" or row.attention != reference.attention:
        return row
    flag = Flag(
        kind="same_backend",
        text=f"It ran the same attention backend as the reference ({row.attention}), so it says "
        "nothing about backends.",
    )
    return row.model_copy(update={"flags": [*row.flags, flag]})


def with_quality(one: Pass, folder: Path, parameters: Parameters, judge: Judge | None) -> Pass:
    """Every picture compared with the reference's first picture of the same prompt and size."""
    reference = one.reference
    if reference is None:
        return one
    originals = {(row.prompt, row.size): row for row in reversed(reference.requests)}
    rows = [
        (row, originals[row.prompt, row.size])
        for variant in (*one.variants, *one.floors)
        if variant is not reference
        for row in variant.requests
    ]
    pairs = list(dict.fromkeys((folder / a.picture, folder / b.picture) for a, b in rows))
    found = dict(zip(pairs, compare_all(pairs), strict=True))
    if judge:
        texts = {
            (folder / a.picture, folder / b.picture): parameters.prompts[a.prompt] for a, b in rows
        }
        found = {pair: judge.add(found[pair], *pair, texts[pair]) for pair in pairs}

    def judged(variant: VariantRecord) -> VariantRecord:
        if variant is reference:
            return variant
        requests = [_judged(row, originals, found, folder) for row in variant.requests]
        return variant.model_copy(update={"requests": requests})

    return one.model_copy(
        update={
            "variants": [judged(variant) for variant in one.variants],
            "floors": [judged(variant) for variant in one.floors],
        }
    )


def _judged(
    row: RequestRecord,
    originals: Mapping[tuple[int, str], RequestRecord],
    found: Mapping[Pair, Quality],
    folder: Path,
) -> RequestRecord:
    original = originals[row.prompt, row.size]
    quality = found[folder / row.picture, folder / original.picture]
    return row.model_copy(update={"quality": quality})


def compare_all(pairs: Sequence[Pair]) -> list[Quality]:
    """PSNR and SSIM of (picture, reference) files, on all cores when there are many."""
    if len(pairs) < PARALLEL_FROM:
        return [compare_files(pair) for pair in pairs]
    # Spawned: this process has threads, which a fork would copy in any state.
    with ProcessPoolExecutor(_num_cores(), mp_context=get_context("spawn")) as pool:
        return list(pool.map(compare_files, pairs, chunksize=8))


def compare_files(pair: Pair) -> Quality:
    picture, reference = (pixels(path.read_bytes()) for path in pair)
    return compare(picture, reference)


def _num_cores() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
