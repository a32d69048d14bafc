"""What formats cost: bytes from the tensors themselves, seconds from timing every layer here."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.checkpoint.writer import component_bytes
from zimage_fp8.engine.loading import load_pipeline
from zimage_fp8.evaluate import Subject, Unfolded, draw
from zimage_fp8.layout import linear_shapes, read_config
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.quant.policy import PRESETS, resolve
from zimage_fp8.search.front import KEEP

MIN_TIMED_S, MIN_RUNS = 0.02, 5
WARM_UP = 2
PICTURES = 4  # the first one warms up

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Costs:
    """Per format and module, per picture; rest_s: what a picture takes beside the linear layers.

    Seconds are sums of medians of single layers in BF16, so they leave out what fusing saves.
    """

    seconds_by: Mapping[str, Mapping[str, float]]
    bytes_by: Mapping[str, Mapping[str, int]]
    rest_s: float

    def seconds(self, modules: Iterable[str], spec: str) -> float:
        return sum(self.seconds_by[spec][module] for module in modules)

    def bytes(self, modules: Iterable[str], spec: str) -> float:
        return float(sum(self.bytes_by[spec][module] for module in modules))


def measure_costs(
    subject: Subject,
    quantized: Mapping[str, Mapping[str, nn.Module]],
    model: str,
    device: str | None,
    report: OnProgress,
) -> Costs:
    """Time every layer in every format on inputs of the shapes that the first request gives it."""
    transformer, where = subject.pipeline.transformer, subject.pipeline.device
    names = list(subject.quantized)
    calls = _calls(subject, names)
    kept = {name: _in_bf16(transformer.get_submodule(name)) for name in names}
    formats: dict[str, Mapping[str, nn.Module]] = {KEEP: kept}
    formats |= {spec: _as_served(modules) for spec, modules in quantized.items()}
    known: dict[tuple[object, ...], float] = {}
    seconds: dict[str, dict[str, float]] = {spec: {} for spec in formats}
    for spec, modules in formats.items():
        for done, name in enumerate(names):
            shape, count = calls[name]
            key = (spec, shape, tuple(kept[name].weight.shape))
            if key not in known:
                known[key] = seconds_of(modules[name], shape, where)
            seconds[spec][name] = known[key] * count
            report(len(names) * list(formats).index(spec) + done + 1, len(names) * len(formats))
    sizes = {spec: {n: _bytes(modules[n]) for n in names} for spec, modules in formats.items()}
    pipeline = load_pipeline(model, dtype="bfloat16", device=device)
    whole = picture_seconds(pipeline, subject.requests[0])
    return Costs(seconds, sizes, max(0.0, whole - sum(seconds[KEEP].values())))


def picture_seconds(pipeline: Pipeline, request: ImageRequest) -> float:
    """Median seconds of a picture from prompt to pixels, after one that warms up."""
    laps = []
    for _ in range(PICTURES):
        pipeline.captions.clear()  # else only the first picture would encode its prompt
        laps.append(sum(pipeline.generate(request).timings_s.values()))
    return median(laps[1:])


def _calls(subject: Subject, names: list[str]) -> dict[str, tuple[torch.Size, int]]:
    """Per module the shape of its input and how often it runs, in the first request."""
    found: dict[str, tuple[torch.Size, int]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = (inputs[0].shape, found.get(name, (None, 0))[1] + 1)

        return count

    transformer = subject.pipeline.transformer
    handles = [transformer.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names]
    try:
        draw(subject.pipeline, subject.requests[0])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _as_served(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Without the adapters that undo folding: in a folded model nothing is left to undo."""
    return {n: m.inner if isinstance(m, Unfolded) else m for n, m in modules.items()}


def _in_bf16(module: nn.Module) -> nn.Linear:
    assert isinstance(module, nn.Linear)
    copy = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    weight = module.weight.detach().to(torch.bfloat16)
    copy.weight = nn.Parameter(weight, requires_grad=False)
    return copy


@torch.inference_mode()
def seconds_of(module: nn.Module, shape: torch.Size, device: torch.device) -> float:
    """Median seconds of one forward on random BF16 input."""
    x = torch.randn(shape, device=device).to(torch.bfloat16)
    times: list[float] = []
    while len(times) < MIN_RUNS + WARM_UP or sum(times[WARM_UP:]) < MIN_TIMED_S:
        _finish(device)
        start = perf_counter()
        module(x)
        _finish(device)
        times.append(perf_counter() - start)
    return median(times[WARM_UP:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fixed_bytes(folder: Path) -> int:
    """Weights that no policy touches: the other components, and the transformer's kept tensors."""
    config, _ = read_config(folder / "transformer")
    movable = set(resolve(PRESETS["full"], linear_shapes(config)).quantized)
    with ShardReader(folder / "transformer") as reader:
        kept = sum(
            info.num_elements * 2  # BF16, whatever the source is stored in
            for name, info in reader.infos.items()
            if name.removesuffix(".weight") not in movable
        )
    return kept + component_bytes(folder)
