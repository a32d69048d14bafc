"""Codes of a whole plan, rounded by the inputs that calibration's prompts give every layer.

The statistics of a layer, [in, in] in fp32, are too large to keep for all: 419 MB for one w2 of
the full-size model, 20 GB for its 34 blocks. So the prompts are run several times, and each pass
watches as many layers as GRAM_BYTES hold (three passes there, one for nano).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from zimage_fp8.checkpoint.writer import WeightScales
from zimage_fp8.layout import fused_name, members_of
from zimage_fp8.model.calibration import run_prompts, settings_of
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.quant.calibrate import Calibration
from zimage_fp8.quant.policy import Plan
from zimage_fp8.quant.rounding import round_weight

GRAM_BYTES = 8 * 10**9

OnForward = Callable[[int, int], None]  # (forwards done, forwards in all)


def rounded_codes(
    pipeline: Pipeline,
    calibration: Calibration,
    plan: Plan,
    scales: WeightScales,
    on_forward: OnForward | None = None,
) -> dict[str, Tensor]:
    """The codes of every quantized linear, on the CPU: name -> [out, in] in 8 bits.

    pipeline: the unquantized model that the calibration was measured on.
    """
    layers: dict[str, None] = dict.fromkeys(fused_name(layer) for layer in plan.quantized)
    passes = list(_passes(layers, pipeline.transformer))
    codes: dict[str, Tensor] = {}
    for index, modules in enumerate(passes):

        def report(done: int, total: int, before: int = index) -> None:
            if on_forward is not None:
                on_forward(before * total + done, len(passes) * total)

        grams = measure_grams(pipeline, calibration, modules, report)
        for module in modules:
            codes |= _module_codes(module, plan, scales, grams.pop(module))
    return codes


def measure_grams(
    pipeline: Pipeline,
    calibration: Calibration,
    modules: Iterable[str],
    on_forward: OnForward | None = None,
) -> dict[str, Tensor]:
    """Σ xᵀx over every input x of the named modules: fp32 [in, in] on the pipeline's device."""
    grams: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            seen = grams.get(name)
            grams[name] = x.T @ x if seen is None else seen.addmm_(x.T, x)

        return hook

    model = pipeline.transformer
    handles = [model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in modules]
    try:
        run_prompts(pipeline, settings_of(calibration), on_forward)
    finally:
        for handle in handles:
            handle.remove()
    return grams


def _passes(layers: Iterable[str], model: nn.Module) -> Iterator[list[str]]:
    chosen: list[str] = []
    used = 0
    for name in layers:
        width = getattr(model.get_submodule(name), "in_features", 0)
        needed = 4 * int(width) ** 2
        if chosen and used + needed > GRAM_BYTES:
            yield chosen
            chosen, used = [], 0
        chosen.append(name)
        used += needed
    if chosen:
        yield chosen


def _module_codes(
    module: str, plan: Plan, scales: WeightScales, gram: Tensor
) -> Mapping[str, Tensor]:
    members = members_of(module)
    spec = plan.spec(members[0])
    assert spec is not None
    weight = torch.cat([scales.read(f"{member}.weight") for member in members]).to(gram.device)
    parts = [scales.scale(member, plan) for member in members]
    scale = (torch.cat(parts) if parts[0].ndim else parts[0]).to(gram.device)
    if (factor := scales.factors.get(module)) is not None:
        factor = factor.to(gram)
        gram = gram * factor[:, None] * factor
    codes = round_weight(weight, scale, spec, gram).cpu()
    sizes = [scales.reader.infos[f"{member}.weight"].shape[0] for member in members]
    return dict(zip(members, torch.split(codes, sizes), strict=True))
