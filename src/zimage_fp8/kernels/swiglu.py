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
    store_row,
    store_two,
)
from zimage_fp8.kernels.language import runs_triton, tl, triton


def swiglu(w13: Tensor) -> Tensor:
    """w13: [..., 2 · hidden], the outputs of w1 and w3 side by side. Returns [..., hidden],
    computed in fp32 and rounded once. PyTorch on every device: training differentiates it."""
    return gated_reference(w13.flatten(0, -2), PLAIN).values.reshape(*w13.shape[:-1], -1)


def gated(w13: Tensor, out: Output) -> Activation:
    """w13: [tokens, 2 · hidden] contiguous. Returns [tokens, hidden] as `out` asks for."""
    return (gated_triton if runs_triton(w13) else gated_reference)(w13, out)


def gated_reference(w13: Tensor, out: Output) -> Activation:
    gate, value = w13.float().chunk(2, dim=-1)
    return encode_reference(F.silu(gate) * value, out, w13.dtype)


def gated_triton(w13: Tensor, out: Output) -> Activation:
    rows, hidden = len(w13), w13.shape[1] // 2
    result = empty_activation(rows, hidden, out, w13)
    launch = Epilogue(out, hidden, may_split=True)
    _gated_kernel[(rows, launch.chunks)](
        w13,
        *launch.pointers(result),
        hidden,
        REST=launch.rest,
        **launch.constants,
        num_warps=launch.warps,
    )
    return result


@triton.jit
def _gated_kernel(
    w13,
    values,
    scales,
    hidden,
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
    x = _gate(w13, row, columns, mask, hidden)
    if REST == 0:
        store_row(
            x, values, scales, row, columns, mask, hidden,
            BLOCK, FORMAT, PER_TOKEN, GROUP, QMAX, AMAX_FLOOR,
        )  # fmt: skip
    else:
        behind = BLOCK + tl.arange(0, REST)
        inside = behind < hidden
        y = _gate(w13, row, behind, inside, hidden)
        store_two(
            x, y, values, scales, row, columns, mask, behind, inside, hidden,
            BLOCK, REST, FORMAT, GROUP, QMAX, AMAX_FLOOR,
        )  # fmt: skip


@triton.jit
def _gate(w13, row, columns, mask, hidden):
    start = w13 + row.to(tl.int64) * (2 * hidden) + columns
    gate = tl.load(start, mask, other=0.0).to(tl.float32)
    value = tl.load(start + hidden, mask, other=0.0).to(tl.float32)
    return gate * tl.sigmoid(gate) * value
