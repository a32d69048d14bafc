"""How a number becomes eight bits, and back. The one formula, in the one place:

    scale = amax / qmax                 fp32; `x ≈ q · scale`, so scale is the DEquantization factor
    q     = cast(clamp(x / scale))      the division in fp32, clamped to ±qmax, rounded to nearest
    x_hat = q · scale

Kernels, calibration, the checkpoint writer and the tests call these functions or must equal them
bit for bit, order of operations included.

E4M3 (1 sign, 4 exponent, 3 mantissa bits, largest value 448, no infinity) is a float: its relative
error is about 2.65 % per operand whatever the scale, as long as the tensor's largest value stays
below some 1e4 times its bulk. So percentile clipping only hurts and headroom is free. The division
happens in fp32: ModelOpt divides in BF16, which puts 2.8 % of its codes next to the nearest one.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Format = Literal["e4m3"]
WeightGranularity = Literal["per-tensor", "per-channel"]
ActivationScale = Literal["static-per-tensor", "dynamic-per-token"]

DTYPE: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn}
QMAX: dict[str, float] = {"e4m3": 448.0}

# A tensor of zeros still needs a scale that divides: 2^-24 is far below any real amax, and
# 2^-24 / 448 is still a normal fp32 number. ModelOpt draws the same line.
AMAX_FLOOR = 2.0**-24


@dataclass(frozen=True)
class QuantSpec:
    """How one linear layer is quantized. `None` in its place means: kept in BF16.

    weight: one scale for the matrix, or one per output row. activation: one scale frozen by
    calibration, or one per token computed from the token itself.
    """

    format: Format
    weight: WeightGranularity
    activation: ActivationScale

    @property
    def is_static(self) -> bool:
        return self.activation == "static-per-tensor"


E4M3_STATIC = QuantSpec("e4m3", "per-tensor", "static-per-tensor")
E4M3_DYNAMIC = QuantSpec("e4m3", "per-tensor", "dynamic-per-token")
E4M3_ROW = QuantSpec("e4m3", "per-channel", "dynamic-per-token")


def amax(x: Tensor, *, per_row: bool = False) -> Tensor:
    """max |x| in fp32: a scalar, or [rows, 1] over the last axis. NaN stays NaN."""
    magnitude = x.abs()
    return (magnitude.amax(-1, keepdim=True) if per_row else magnitude.amax()).float()


def scale_of(amax: Tensor, format: Format) -> Tensor:
    """The dequantization multiplier of a tensor whose largest magnitude is `amax` (fp32)."""
    return amax.float().clamp(min=AMAX_FLOOR) / QMAX[format]


def quantize(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    """8-bit codes of x under a scale that broadcasts against it.

    The clamp is not decoration: casts to E4M3 saturate in newer PyTorch only.
    """
    qmax = QMAX[format]
    return (x.float() / scale).clamp(-qmax, qmax).to(DTYPE[format])


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """x_hat = q · scale in fp32."""
    return q.float() * scale
