"""Where the time of one picture goes: by stage, and by kind of kernel with its rate.

The picture is drawn three times: to warm up, for the stages' times, and under torch.profiler, which
costs time of its own, for the kernels. On a GPU kernels are what ran on it; on the CPU they are
PyTorch's operators, each with the time it spent outside of others.
"""

import re
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record

from zimage_fp8.engine.work import (
    ATTENTION,
    CONVOLUTION,
    GEMM,
    Ceilings,
    Work,
    ceilings,
    decode_work,
    denoise_work,
)
from zimage_fp8.model.drawing import STAGE_MARK
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import GeneratedImage, ImageRequest

GAPS, OTHER = "gaps", "other"

# What a kernel is, by its name: the first pattern that is found in it. A fused kernel of ours is a
# group of its own.
GROUPS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (group, re.compile(pattern, re.IGNORECASE))
    for group, pattern in (
        (ATTENTION, r"hopper_attention|flash|fmha|sdpa|scaled_dot_product|_attn_|sage"),
        (GEMM, r"^(_tma|_gated_tma|_pointer|wgmma)_kernel$"),
        ("", r"^(_\w+|row)_kernel$"),
        (CONVOLUTION, r"conv(?!ert)|fprop|dgrad|cudnn"),
        (GEMM, r"nvjet|gemm|gemv|cublas|cutlass|splitk|::_?\w*mm(_out)?$|::linear$|::matmul$"),
        ("copies", r"memcpy|memset|copy|CatArray|::(cat|clone|to|contiguous|pad|fill_|zero_)$"),
        ("reductions", r"norm|reduce|softmax|^aten::(mean|sum|max|amax|all|var_mean)$"),
        (
            "elementwise",
            r"elementwise|^aten::(mul|add|sub|div|neg|abs|pow|exp|silu|tanh|sigmoid|sqrt|rsqrt|"
            r"clamp\w*|maximum|round|where|isfinite)_?$",
        ),
    )
)


@dataclass(frozen=True)
class Stage:
    """ms: of the undisturbed picture. profiled_ms: of the one under the profiler."""

    stage: str
    ms: float
    profiled_ms: float


@dataclass(frozen=True)
class KernelGroup:
    """Kernels of one kind in one stage. share: of the profiled picture's time. rate: achieved, in
    `unit`; of_ceiling: the time at the ceiling divided by the time taken; both None where unknown.
    names: the kernels, those that took longest first."""

    stage: str
    group: str
    launches: int
    ms: float
    share: float
    rate: float | None = None
    unit: str | None = None
    of_ceiling: float | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile:
    """One picture's time. ceilings: what `of_ceiling` stands for; ceilings_note: the same in words,
    or why there are none."""

    runs: dict[str, object]
    width: int
    height: int
    nfe: int
    prompt_tokens: int
    stages: tuple[Stage, ...]
    kernels: tuple[KernelGroup, ...]
    ceilings: Ceilings | None
    ceilings_note: str


def profile(
    pipeline: Pipeline, request: ImageRequest, encode: Callable[[GeneratedImage], object]
) -> Profile:
    """Draw a picture three times and say where its time goes. encode: makes the file's bytes of it,
    timed as the stage `picture`. The prompt's caption is encoded every time.

    Raises what `Pipeline.generate` raises.
    """
    _draw(pipeline, request)
    image = _draw(pipeline, request)
    before = time.perf_counter()
    encode(image)
    picture_ms = (time.perf_counter() - before) * 1000
    is_cuda = pipeline.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    with record(activities=activities, acc_events=True) as recorded:
        profiled = _draw(pipeline, request)

    spent = {stage: 1000 * s for stage, s in profiled.timings_s.items()}
    stages = [Stage(name, 1000 * s, spent[name]) for name, s in image.timings_s.items()]
    limits = ceilings(pipeline.device)
    known = {"denoise": denoise_work(pipeline, request), "decode": decode_work(pipeline, request)}
    spans = spans_of(recorded.events(), pipeline.device.type)
    return Profile(
        runs=pipeline.describe(),
        width=request.width,
        height=request.height,
        nfe=image.nfe,
        prompt_tokens=pipeline.num_tokens(request.prompt),
        stages=(*stages, Stage("picture", picture_ms, picture_ms)),
        kernels=tuple(group_kernels(spans, spent, known, limits)),
        ceilings=limits,
        ceilings_note=limits.source
        if limits
        else f"none is known for {pipeline.describe()['device']}",
    )


def _draw(pipeline: Pipeline, request: ImageRequest) -> GeneratedImage:
    pipeline.captions.clear()
    return pipeline.generate(request)


@dataclass(frozen=True)
class Span:
    """One kernel's run. busy_us: its own time; start and end in microseconds on one clock."""

    name: str
    stage: str
    start: float
    end: float
    busy_us: float


def spans_of(events: Iterable[FunctionEvent], device_type: str) -> list[Span]:
    """What ran on the device, each in the stage whose mark follows it."""
    events = list(events)
    marks = sorted(
        (event.time_range.start, event.name.removeprefix(STAGE_MARK))
        for event in events
        if event.name.startswith(STAGE_MARK) and event.device_type == DeviceType.CPU
    )
    wanted = DeviceType.CUDA if device_type == "cuda" else DeviceType.CPU
    spans = []
    for event in events:
        # A mark that spans kernels is listed as if it were one.
        if event.device_type != wanted or event.name.startswith(STAGE_MARK):
            continue
        start, end = event.time_range.start, event.time_range.end
        found = bisect_left(marks, ((start + end) / 2, ""))
        if found == len(marks):
            continue  # after the picture: the profiler's own
        busy = event.self_cpu_time_total if wanted == DeviceType.CPU else end - start
        spans.append(Span(event.name, marks[found][1], start, end, busy))
    return spans


def group_kernels(
    spans: Iterable[Span],
    stage_ms: dict[str, float],
    known: dict[str, dict[str, Work]],
    limits: Ceilings | None,
) -> Iterator[KernelGroup]:
    """Rows by stage, the longest first, then the gaps: the stage's time in which no kernel ran.

    stage_ms: wall time; known: the work of a stage's groups; limits: for the shares of a ceiling.
    """
    total = sum(stage_ms.values())
    gathered: dict[str, dict[str, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for span in spans:
        gathered[span.stage][group_of(span.name)].append(span)
    for stage, wall in stage_ms.items():
        groups = gathered[stage]
        for group, members in sorted(groups.items(), key=lambda item: -_busy_ms(item[1])):
            ms = _busy_ms(members)
            work = known.get(stage, {}).get(group)
            rate, unit = _rate(work, ms)
            least = limits.least_ms(work) if limits and work else None
            of_ceiling = least / ms if least and ms else None
            names = _longest_first(members)
            yield KernelGroup(
                stage, group, len(members), ms, ms / total, rate, unit, of_ceiling, names
            )
        idle = max(0.0, wall - _covered_ms([span for spans in groups.values() for span in spans]))
        yield KernelGroup(stage, GAPS, 0, idle, idle / total)


def group_of(name: str) -> str:
    """What a kernel is: `GEMM`, `attention`, …, or its own name when it is a fused kernel."""
    for group, pattern in GROUPS:
        if pattern.search(name):
            return group or name
    return OTHER


def _rate(work: Work | None, ms: float) -> tuple[float | None, str | None]:
    if work is None or not ms:
        return None, None
    if work.flops:
        return sum(work.flops.values()) / ms / 1e9, "TFLOP/s"
    return work.num_bytes / ms / 1e6, "GB/s"


def _busy_ms(spans: list[Span]) -> float:
    return sum(span.busy_us for span in spans) / 1000


def _covered_ms(spans: list[Span]) -> float:
    """Time in which at least one of the spans ran: kernels on two streams overlap."""
    covered, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, span.end - max(span.start, reached))
        reached = max(reached, span.end)
    return covered / 1000


def _longest_first(spans: list[Span]) -> tuple[str, ...]:
    spent: dict[str, float] = defaultdict(float)
    for span in spans:
        spent[span.name] += span.busy_us
    return tuple(name[:120] for name in sorted(spent, key=lambda name: -spent[name]))
