"""The error of one matrix product in every format, over inputs of growing ugliness.

    python benchmarks/gemm_error.py

K = 3,840, 512 tokens, 1,024 outputs, Gaussian weights; error is ‖y_hat − y‖ / ‖y‖ in FP64 with both
operands quantized by `numerics` itself. Nothing is trained here: this is arithmetic.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from zimage_fp8.numerics import (
    E4M3_ROW,
    E4M3_STATIC,
    INT8_ROT,
    INT8_ROW,
    QuantSpec,
    amax,
    dequantize,
    quantize,
    scale_of,
)
from zimage_fp8.provenance import commit, versions
from zimage_fp8.quant.fold import channel_factors
from zimage_fp8.quant.linear import rotated

RESULT = Path(__file__).parent / "results" / "gemm-error.json"
CHANNELS, TOKENS, OUTPUTS = 3840, 512, 1024
LOUD = 8  # outlier channels, or tokens
MODULE = "layers.0.feed_forward.w2"


def inputs(generator: torch.Generator) -> dict[str, Tensor]:
    """By name, fp32 [tokens, channels]."""
    plain = torch.randn(TOKENS, CHANNELS, generator=generator)
    gate = torch.randn(TOKENS, CHANNELS, generator=generator)
    found = {"Gaussian": plain, "SwiGLU products": torch.nn.functional.silu(gate) * plain}
    for ratio in (30, 1000, 100_000):
        wild = plain.clone()
        wild[:, :LOUD] *= ratio
        found[f"{LOUD} channels × {ratio:,}"] = wild
    for size in (1000, 100_000):
        wild = plain.clone()
        wild[:LOUD, 0] = size
        found[f"one value of {size:,} in {LOUD} tokens"] = wild
    return found


def x_hat(x: Tensor, spec: QuantSpec, *, per_row: bool) -> Tensor:
    """What is left of x: quantized and back, rotated where the spec rotates."""
    turned = rotated(x, spec)
    scale = scale_of(amax(turned, per_row=per_row), spec.format)
    return dequantize(quantize(turned, scale, spec.format), scale)


def error(x: Tensor, weight: Tensor, spec: QuantSpec) -> float:
    """Relative error of the product, the loud tokens' rows left out: they would hide the rest."""
    exact = x.double() @ weight.double().T
    left = x_hat(x, spec, per_row=not spec.is_static).double()
    right = x_hat(weight, spec, per_row=spec.weight == "per-channel").double()
    got = left @ right.T
    quiet = slice(LOUD, None)
    return float((got - exact)[quiet].norm() / exact[quiet].norm())


def balanced(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides after folding; columns of loud channels are quiet, as in a trained model."""
    maxima = {MODULE: x.abs().amax(0).tolist()}
    factor = channel_factors([MODULE], {f"{MODULE}.weight": weight}.__getitem__, maxima)[MODULE]
    return x * factor, weight / factor


FORMATS: dict[str, tuple[QuantSpec, bool]] = {
    "E4M3 per tensor": (E4M3_STATIC, False),
    "E4M3 per token": (E4M3_ROW, False),
    "INT8 per token": (INT8_ROW, False),
    "INT8 rotated": (INT8_ROT, False),
    "E4M3 per tensor, folded": (E4M3_STATIC, True),
    "INT8 folded and rotated": (INT8_ROT, True),
}


def main() -> int:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, CHANNELS, generator=generator) / CHANNELS**0.5
    table: dict[str, dict[str, float]] = {}
    for name, x in inputs(generator).items():
        loud = x.abs().amax(0) / x.abs().amax(0).median()
        quiet_columns = weight / torch.where(loud > 8, loud, 1.0) if "channels" in name else weight
        table[name] = {}
        for format, (spec, is_folded) in FORMATS.items():
            fold: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = (
                balanced if is_folded else lambda x, w: (x, w)
            )
            table[name][format] = error(*fold(x, quiet_columns), spec)
        print(name, {k: f"{v:.2%}" for k, v in table[name].items()}, flush=True)
    raw = {
        "schema": 1,
        "shape": [TOKENS, CHANNELS, OUTPUTS],
        "seed": 0,
        "versions": versions(),
        "commit": commit(),
        "command": "python benchmarks/gemm_error.py",
        "errors": table,
    }
    RESULT.write_text(json.dumps(raw, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
