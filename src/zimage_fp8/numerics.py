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

INT8 (-127 to 127, ties to the even code) is a grid of equal steps: its error is a share of the
largest value, not of each value. Per token and per output row, and after a rotation that leaves no
outliers (`rotate`), that is about 0.86 % per operand, a third of E4M3's.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Format = Literal["e4m3", "int8"]
WeightGranularity = Literal["per-tensor", "per-channel"]
ActivationScale = Literal["static-per-tensor", "dynamic-per-token"]

DTYPE: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
QMAX: dict[str, float] = {"e4m3": 448.0, "int8": 127.0}

# A tensor of zeros still needs a scale that divides: 2^-24 is far below any real amax, and
# 2^-24 / 448 is still a normal fp32 number. ModelOpt draws the same line.
AMAX_FLOOR = 2.0**-24

MAX_ROTATION = 256  # the error of INT8 falls with the group's size, and hardly beyond this one


@dataclass(frozen=True)
class QuantSpec:
    """How one linear layer is quantized. `None` in its place means: kept in BF16.

    weight: one scale for the matrix, or one per output row. activation: one scale frozen by
    calibration, or one per token computed from the token itself. rotate: inputs are rotated before
    they are quantized, in groups of `rotation_group`, and so were the weight's rows.
    """

    format: Format
    weight: WeightGranularity
    activation: ActivationScale
    rotate: bool = False

    @property
    def is_static(self) -> bool:
        return self.activation == "static-per-tensor"


E4M3_STATIC = QuantSpec("e4m3", "per-tensor", "static-per-tensor")
E4M3_DYNAMIC = QuantSpec("e4m3", "per-tensor", "dynamic-per-token")
E4M3_ROW = QuantSpec("e4m3", "per-channel", "dynamic-per-token")
INT8_ROW = QuantSpec("int8", "per-channel", "dynamic-per-token")
INT8_ROT = QuantSpec("int8", "per-channel", "dynamic-per-token", rotate=True)


def rotation_group(channels: int) -> int:
    """How many input channels are rotated together: the largest power of four that divides
    `channels`, at most 256 (3,840 and 10,240 -> 256; 192 -> 64; an odd number -> 1)."""
    group = 1
    while group < MAX_ROTATION and channels % (4 * group) == 0:
        group *= 4
    return group


def amax(x: Tensor, *, per_row: bool = False) -> Tensor:
    """max |x| in fp32: a scalar, or [rows, 1] over the last axis. NaN stays NaN."""
    magnitude = x.abs()
    return (magnitude.amax(-1, keepdim=True) if per_row else magnitude.amax()).float()


def scale_of(amax: Tensor, format: Format) -> Tensor:
    """The dequantization multiplier of a tensor whose largest magnitude is `amax` (fp32)."""
    floored = amax.float().clamp(min=AMAX_FLOOR)
    # By a tensor: CUDA multiplies by the reciprocal of a plain number, an ulp beside the quotient.
    return floored / torch.full_like(floored, QMAX[format])


def quantize(x: Tensor, scale: Tensor, format: Format) -> Tensor:
    """8-bit codes of x under a scale that broadcasts against it.

    Ties go to the even code. The clamp is not decoration: casts to E4M3 saturate in newer PyTorch
    only. NaN stays NaN in E4M3; INT8 has none, there it survives in the scale.
    """
    qmax = QMAX[format]
    scaled = (x.float() / scale).clamp(-qmax, qmax)
    if format == "int8":
        scaled = scaled.round()  # the cast alone would cut towards zero
    return scaled.to(DTYPE[format])


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """x_hat = q · scale in fp32."""
    return q.float() * scale
