"""What flows from a fused kernel into a matrix product: 8-bit codes with their scale, or BF16.

Every producer (norm, SwiGLU, residual) ends by writing its fp32 result in the format that the
next linear layer reads. The format is a parameter: plain values, E4M3 under a static scale, or
E4M3 or INT8 with one scale per token, each optionally after a rotation of the row.

Exactness. On the same fp32 values the Triton epilogue equals the reference bit for bit: the
division is IEEE's, INT8 rounds half to even, and the rotation adds in the reference's order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from zimage_fp8.kernels.language import next_power_of_2, tl, triton
from zimage_fp8.kernels.rotate import rotate
from zimage_fp8.numerics import (
    AMAX_FLOOR,
    DTYPE,
    QMAX,
    QuantSpec,
    amax,
    quantize,
    rotation_group,
    scale_of,
)


@dataclass(frozen=True)
class Output:
    """What a producer writes: what the linear layer that reads it was quantized to read.

    spec: None writes plain values in the input's dtype. static_scale: fp32 [], for specs with a
    static activation scale.
    """

    spec: QuantSpec | None = None
    static_scale: Tensor | None = None

    @property
    def is_pointwise(self) -> bool:
        """Whether a value can be written without seeing the rest of its row."""
        return self.spec is None or (self.spec.is_static and not self.spec.rotate)

    @property
    def is_static_e4m3(self) -> bool:
        """Whether a kernel in CUDA C++ writes the codes itself."""
        return self.is_pointwise and self.spec is not None and self.spec.format == "e4m3"


PLAIN = Output()


@dataclass(frozen=True)
class Activation:
    """values: [tokens, width], codes or plain values. scale: fp32 [], [tokens, 1], or None."""

    values: Tensor
    scale: Tensor | None = None


def encode_reference(x: Tensor, out: Output, dtype: torch.dtype) -> Activation:
    """x: fp32 [tokens, width] -> what `out` asks for; plain values are rounded to `dtype`."""
    if out.spec is None:
        return Activation(x.to(dtype))
    if out.spec.rotate:
        x = rotate(x, rotation_group(x.shape[-1]))
    scale = out.static_scale
    if scale is None:
        scale = scale_of(amax(x, per_row=True), out.spec.format)
    return Activation(quantize(x, scale, out.spec.format), scale)


def empty_activation(rows: int, width: int, out: Output, like: Tensor) -> Activation:
    """Memory for an activation, unwritten except for a static scale."""
    if out.spec is None:
        return Activation(torch.empty(rows, width, dtype=like.dtype, device=like.device))
    scale = out.static_scale
    if scale is None:
        scale = torch.empty(rows, 1, dtype=torch.float32, device=like.device)
    codes = torch.empty(rows, width, dtype=DTYPE[out.spec.format], device=like.device)
    return Activation(codes, scale)


class Epilogue:
    """How a kernel is launched for an output: chunks of a row, warps, compile-time constants.

    A scale per token needs the whole row in one program; without one, a row may be cut into chunks
    where the kernel has no other reason to see all of it. may_split: whether the kernel can hold a
    whole row as two blocks, the second of `rest` values.
    """

    def __init__(
        self, out: Output, width: int, *, whole_rows: bool = False, may_split: bool = False
    ) -> None:
        spec = out.spec
        per_token = spec is not None and not spec.is_static
        self.block = (
            next_power_of_2(width) if per_token or whole_rows else min(next_power_of_2(width), 2048)
        )
        self.rest = 0
        if per_token and may_split and (parts := _two_powers(width)):
            self.block, self.rest = parts
        self.chunks = 1 if self.rest else -(-width // self.block)
        self.warps = max(4, min(16, self.block // 512))
        self.constants: dict[str, object] = {
            "BLOCK": self.block,
            "FORMAT": FORMATS[spec.format if spec else None],
            "PER_TOKEN": per_token,
            "GROUP": rotation_group(width) if spec and spec.rotate else 1,
            "QMAX": QMAX[spec.format] if spec else 0.0,
            "AMAX_FLOOR": AMAX_FLOOR,
        }

    def pointers(self, result: Activation) -> tuple[Tensor, Tensor]:
        """Codes and scale; without a scale the codes stand in for the unread pointer."""
        return result.values, result.values if result.scale is None else result.scale


def _two_powers(width: int) -> tuple[int, int] | None:
    """width as a sum of two powers of two, so that a whole row needs no masked lanes: 10,240 is
    8,192 + 2,048 where one block would have 16,384. The smaller at least a rotation's group."""
    block = 1 << (width.bit_length() - 1)
    rest = width - block
    return (block, rest) if rest >= 256 and not rest & (rest - 1) else None


FORMATS: dict[str | None, int] = {None: 0, "e4m3": 1, "int8": 2}


@triton.jit
def store_row(
    x,
    values,
    scales,
    row,
    columns,
    mask,
    width,
    BLOCK: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    GROUP: tl.constexpr,
    QMAX: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
):
    """The epilogue of every producer. x: fp32 [BLOCK], zero where not `mask`."""
    if FORMAT == 0:
        target = values + row.to(tl.int64) * width + columns
        tl.store(target, x.to(values.dtype.element_ty), mask)
    else:
        x = rotate_block(x, BLOCK, GROUP)
        if PER_TOKEN:
            scale = scale_of_amax(tl.max(tl.abs(x), axis=0), QMAX, AMAX_FLOOR)
            tl.store(scales + row, scale)
        else:
            scale = tl.load(scales)
        store_codes(x, scale, values, row, columns, mask, width, FORMAT, QMAX)


@triton.jit
def store_two(
    x, y, values, scales, row, columns, mask, behind, inside, width,
    BLOCK: tl.constexpr, REST: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    QMAX: tl.constexpr, AMAX_FLOOR: tl.constexpr,
):  # fmt: skip
    """`store_row` under one scale per token for a row in two blocks."""
    y = rotate_block(y, REST, GROUP)
    x = rotate_block(x, BLOCK, GROUP)
    largest = tl.maximum(tl.max(tl.abs(x), axis=0), tl.max(tl.abs(y), axis=0))
    scale = scale_of_amax(largest, QMAX, AMAX_FLOOR)
    tl.store(scales + row, scale)
    store_codes(x, scale, values, row, columns, mask, width, FORMAT, QMAX)
    store_codes(y, scale, values, row, behind, inside, width, FORMAT, QMAX)


@triton.jit
def scale_of_amax(amax, QMAX: tl.constexpr, AMAX_FLOOR: tl.constexpr):
    return tl.div_rn(tl.maximum(amax, AMAX_FLOOR), QMAX)


@triton.jit
def store_codes(
    x, scale, values, row, columns, mask, width, FORMAT: tl.constexpr, QMAX: tl.constexpr
):
    target = values + row.to(tl.int64) * width + columns
    q = codes_of(x, scale, FORMAT, QMAX)
    tl.store(target, q.to(values.dtype.element_ty), mask)


@triton.jit
def codes_of(x, scale, FORMAT: tl.constexpr, QMAX: tl.constexpr):
    """Codes of fp32 values, still as fp32; for E4M3 the conversion rounds them."""
    # x / scale as IEEE divides, in three instructions: with the correctly rounded reciprocal, one
    # step of the residual rounds the quotient correctly (Markstein 1990). The division instruction
    # cost as much as everything else in `kernels.norm`: 39 us with it, 20 without (H200).
    inverse = tl.div_rn(1.0, scale)
    q = x * inverse
    q = tl.fma(tl.fma(-q, scale, x), inverse, q)
    q = tl.clamp(q, -QMAX, QMAX)
    if FORMAT == 2:
        # Adding 1.5 * 2^23 leaves no fraction bits: the sum is rounded half to even.
        q = (q + 12582912.0) - 12582912.0
    return q


@triton.jit
def rotate_block(x, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """`rotate` on a power-of-two block, in the same order of additions."""
    if GROUP >= 4:
        x = _rotate_level(x, BLOCK, 1)
    if GROUP >= 16:
        x = _rotate_level(x, BLOCK, 4)
    if GROUP >= 64:
        x = _rotate_level(x, BLOCK, 16)
    if GROUP >= 256:
        x = _rotate_level(x, BLOCK, 64)
    return x


@triton.jit
def _rotate_level(x, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    quads = tl.reshape(x, (BLOCK // (4 * STRIDE), 2, 2, STRIDE))
    pairs = tl.sum(quads, axis=2, keep_dims=True)
    half = 0.5 * tl.sum(pairs, axis=1, keep_dims=True)
    return tl.reshape(half - quads, (BLOCK,))
