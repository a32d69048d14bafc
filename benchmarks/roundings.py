"""Several roundings of one policy: how far apart pictures are that only luck has drawn.

    python benchmarks/roundings.py

E4M3 is a float, so scales that are 1.2 times as large give every weight and input another code and
leave the statistics of their errors as they were. Inputs matter as well as weights: a channel
that is nearly constant is rounded the same way in all tokens, steps and prompts. Plain and folded
weights, the same prompts.
"""

import sys
from collections.abc import Iterator, Mapping

import torch
from torch import nn

import outliers
import paired
from zimage_fp8.evaluate import Unfolded
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.source import find_model
from zimage_fp8.quant.linear import QuantLinear, quantize_weight

RESULT = paired.HERE / "results" / "nano-roundings.json"
FACTORS = (1.0, 1.2, 1.4, 1.6, 1.8)  # 2 would give the codes of 1 again
FORMS = ("full", "full-folded")


def main() -> int:
    given = paired.parser(__doc__, 24, RESULT).parse_args()
    source = find_model("nano")
    found = paired.begin(
        given.out,
        compiled=given.compile,
        factors={},
    )
    pipeline = load_pipeline("nano", dtype="float32")
    calibration = outliers.calibrate(pipeline, source)
    variants = {}
    for name in FORMS:
        layers = outliers.layers_of(outliers.forms()[name], source, pipeline, calibration)
        for factor in FACTORS:
            cells = found["factors"].setdefault(f"{factor:g}", {})
            anew = dict(rounded_anew(layers, pipeline.transformer, factor))
            variants[factor, name] = (cells, name, paired.Variant(pipeline, anew))
    if given.compile:
        paired.compile_blocks()
    paired.measure(variants, pipeline, given.prompts, found, lambda: paired.write(found, given.out))
    return 0


def rounded_anew(
    layers: Mapping[str, nn.Module], transformer: nn.Module, factor: float
) -> Iterator[tuple[str, nn.Module]]:
    """The same layers with `factor` times their scales, and codes to suit them."""
    for name, layer in layers.items():
        weight = transformer.get_submodule(name).weight
        inner = layer
        if isinstance(layer, Unfolded):
            inner, weight = layer.inner, weight * layer.outputs[:, None] / layer.inputs
        scale = inner.weight_scale * factor
        codes = quantize_weight(weight, scale, inner.spec)
        assert factor != 1 or torch.equal(codes.view(torch.int8), inner.weight.view(torch.int8))
        again = QuantLinear(inner.spec, codes, scale, inner.input_scale * factor)
        wrapped = isinstance(layer, Unfolded)
        yield name, Unfolded(again, layer.inputs, layer.outputs) if wrapped else again


if __name__ == "__main__":
    sys.exit(main())
