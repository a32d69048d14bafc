"""The gate of the feed-forward, `silu(w1 x) · (w3 x)`, written as the next linear reads it.

Exactness of the Triton kernel: its exponential and PyTorch's differ by an fp32 ulp or two; see
`kernels.norm` for what that does to codes.
"""

import torch.nn.functional as F
from torch import Tensor

from zimage_fp8.kernels.activation import (
    PLAIN,
    Activation,
    Epilogue,
    Output,
    empty_activation,
    encode_reference,
    rotate_block,
    scale_of_amax,
    store_codes,
    store_row,
)
from zimage_fp8.kernels.language import runs_triton, tl, triton

Scales = tuple[Tensor, Tensor]


def swiglu(w13: Tensor) -> Tensor:
    """w13: [..., 2 · hidden], the outputs of w1 and w3 side by side. Returns [..., hidden],
    computed in fp32 and rounded once. PyTorch on every device: training differentiates it."""
    return gated_reference(w13.flatten(0, -2), PLAIN).values.reshape(*w13.shape[:-1], -1)


def gated(w13: Tensor, out: Output, scales: Scales | None = None) -> Activation:
    """w13: [tokens, 2 · hidden] contiguous. Returns [tokens, hidden] as `out` asks for.

    scales: fp32 [tokens, 1] and [2 · hidden], still to be multiplied in: a matrix product of codes
    that leaves its scales to whoever reads it.
    """
    return (gated_triton if runs_triton(w13) else gated_reference)(w13, out, scales)


def gated_reference(w13: Tensor, out: Output, scales: Scales | None = None) -> Activation:
    wide = w13.float() if scales is None else w13.float() * scales[0] * scales[1]
    gate, value = wide.chunk(2, dim=-1)
    return encode_reference(F.silu(gate) * value, out, w13.dtype)


def gated_triton(w13: Tensor, out: Output, scales: Scales | None = None) -> Activation:
    rows, hidden = len(w13), w13.shape[1] // 2
    result = empty_activation(rows, hidden, out, w13)
    launch = Epilogue(out, hidden)
    block, rest = launch.block, 0
    if launch.constants["PER_TOKEN"] and (parts := _two_powers(hidden)):
        block, rest = parts
    _gated_kernel[(rows, launch.chunks)](
        w13,
        *launch.pointers(result),
        *(scales or (w13, w13)),
        hidden,
        HAS_SCALES=scales is not None,
        REST=rest,
        **(launch.constants | {"BLOCK": block}),
        num_warps=launch.warps,
    )
    return result


def _two_powers(width: int) -> tuple[int, int] | None:
    """width as a sum of two powers of two, so that a whole row needs no masked lanes: 10,240 is
    8,192 + 2,048 where one block would have 16,384. The smaller at least a rotation's group."""
    block = 1 << (width.bit_length() - 1)
    rest = width - block
    return (block, rest) if rest >= 256 and not rest & (rest - 1) else None


@triton.jit
def _gated_kernel(
    w13,
    values,
    scales,
    row_scales,
    column_scales,
    hidden,
    HAS_SCALES: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    GROUP: tl.constexpr,
    QMAX: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < hidden
    x = _gate(w13, row_scales, column_scales, row, columns, mask, hidden, HAS_SCALES)
    if REST == 0:
        store_row(
            x, values, scales, row, columns, mask, hidden,
            BLOCK, FORMAT, PER_TOKEN, GROUP, QMAX, AMAX_FLOOR,
        )  # fmt: skip
    else:  # one scale for both parts of the row
        behind = BLOCK + tl.arange(0, REST)
        inside = behind < hidden
        y = _gate(w13, row_scales, column_scales, row, behind, inside, hidden, HAS_SCALES)
        y = rotate_block(y, REST, GROUP)
        x = rotate_block(x, BLOCK, GROUP)
        largest = tl.maximum(tl.max(tl.abs(x), axis=0), tl.max(tl.abs(y), axis=0))
        scale = scale_of_amax(largest, QMAX, AMAX_FLOOR)
        tl.store(scales + row, scale)
        store_codes(x, scale, values, row, columns, mask, hidden, FORMAT, QMAX)
        store_codes(y, scale, values, row, behind, inside, hidden, FORMAT, QMAX)


@triton.jit
def _gate(w13, row_scales, column_scales, row, columns, mask, hidden, HAS_SCALES: tl.constexpr):
    start = w13 + row.to(tl.int64) * (2 * hidden) + columns
    gate = tl.load(start, mask, other=0.0).to(tl.float32)
    value = tl.load(start + hidden, mask, other=0.0).to(tl.float32)
    if HAS_SCALES:
        of_row = tl.load(row_scales + row)
        gate = gate * of_row * tl.load(column_scales + columns, mask, other=0.0)
        value = value * of_row * tl.load(column_scales + hidden + columns, mask, other=0.0)
    return gate * tl.sigmoid(gate) * value
