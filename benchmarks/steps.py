"""What single steps are worth: left unquantized, or given static scales of their own.

    python benchmarks/steps.py

Left unquantized, a step runs on the FP32 weights that the reference has. With scales of its own, a
step of `full` divides its inputs by what calibration saw in that very step, with and without
planted outliers, instead of by the largest of all steps. The context refiner belongs to no step.
"""

import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from torch import Tensor, nn

import outliers
import paired
from zimage_fp8.evaluate import Wrap
from zimage_fp8.layout import members_of
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.sampling import Velocity
from zimage_fp8.model.source import find_model
from zimage_fp8.numerics import scale_of
from zimage_fp8.quant.calibrate import Calibration
from zimage_fp8.quant.linear import QuantLinear
from zimage_fp8.sensitivity.units import on_steps

RESULT = paired.HERE / "results" / "nano-steps.json"
STEPS = 8
LEFT_OUT = ((), (1, 2), (7, 8))
SCALES_AT = (1.0, 1e5)  # ratios of planted channels


def main() -> int:
    given = paired.parser(__doc__, 24, RESULT).parse_args()
    source = find_model("nano")
    found = paired.begin(
        given.out,
        compiled=given.compile,
        unquantized={},
        scales={},
    )
    pipeline = load_pipeline("nano", dtype="float32")
    calibration = outliers.calibrate(pipeline, source)
    variants: dict = {}
    for policy in ("full", "int8-rot"):
        layers = outliers.layers_of(outliers.forms()[policy], source, pipeline, calibration)
        variants |= without_steps(policy, layers, pipeline, found["unquantized"])
    for ratio, folder in outliers.planted(source, SCALES_AT):
        variants |= with_scales(ratio, folder, pipeline, calibration, found["scales"])
    if given.compile:
        paired.compile_blocks()
    paired.measure(variants, pipeline, given.prompts, found, lambda: paired.write(found, given.out))
    return 0


def without_steps(
    policy: str,
    layers: Mapping[str, nn.Module],
    pipeline: paired.Pipeline,
    cells: dict[str, paired.Cells],
) -> paired.Variants:
    """The policy with some steps, counted from 1, left to the unquantized model."""
    per_prompt = {n: layer for n, layer in layers.items() if n.startswith("context_refiner.")}
    per_step = {n: layer for n, layer in layers.items() if n not in per_prompt}
    variants = {}
    for left_out in LEFT_OUT:
        rest = {step for step in range(STEPS) if step + 1 not in left_out}
        wrap = on_steps(pipeline.transformer, per_step, rest)
        name = ",".join(map(str, left_out)) or "none"
        of_policy = cells.setdefault(policy, {})
        variants[policy, name] = of_policy, name, paired.Variant(pipeline, per_prompt, wrap=wrap)
    return variants


def with_scales(
    ratio: float,
    folder: Path,
    pipeline: paired.Pipeline,
    calibration: Calibration,
    cells: dict[str, paired.Cells],
) -> paired.Variants:
    """`full` with one scale for all steps, and with one per step."""
    loud = load_pipeline(str(folder), dtype="float32", share=pipeline)
    known = calibration if ratio == 1 else outliers.calibrate(loud, folder)
    layers = outliers.layers_of(outliers.forms()["full"], folder, loud, known)
    of_ratio = cells.setdefault(f"{ratio:g}", {})
    by_step = paired.Variant(loud, layers, wrap=scaled_by_step(layers, known))
    return {
        (f"{ratio:g}", "one"): (of_ratio, "one", paired.Variant(loud, layers)),
        (f"{ratio:g}", "by step"): (of_ratio, "by step", by_step),
    }


def scaled_by_step(layers: Mapping[str, QuantLinear], known: Calibration) -> Wrap:
    """Before every step its own input scales are put in place, and after the last the usual."""
    usual = {name: layer.input_scale for name, layer in layers.items()}
    amax = {name: known.amax[members_of(name)[0]] for name in layers}

    def wrap(velocity: Velocity) -> Velocity:
        calls = count()

        def scaled(latent: Tensor, sigma: float) -> Tensor:
            step = next(calls)
            for name, layer in layers.items():
                if len(amax[name]) > 1:  # once per prompt: the context refiner
                    layer.input_scale = scale_of(usual[name].new_tensor(amax[name][step]), "e4m3")
            try:
                return velocity(latent, sigma)
            finally:
                for name, layer in layers.items():
                    layer.input_scale = usual[name]

        return scaled

    return wrap


if __name__ == "__main__":
    sys.exit(main())
