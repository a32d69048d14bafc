"""The feed-forward's gate inside the product in front of it: `silu(x w1) · (x w3)` in one kernel.

A tile is the same columns of w1 and of w3, fetched by one bulk copy and multiplied as one matrix;
what leaves the multiprocessor is half as wide as the product, and codes where their scale is known
beforehand. Per block of the transformer that saves writing and reading a matrix of 20,480 columns.
By Triton here, or by `wgmma.py`.

Exactness. Gates and values are not rounded between product and gate, which `matmul` followed by
`gated` does: this is the more exact of the two. Against the reference sums run in another order.
"""

import torch
from torch import Tensor

from zimage_fp8.kernels.activation import (
    FORMATS,
    PLAIN,
    Activation,
    Output,
    codes_of,
    empty_activation,
)
from zimage_fp8.kernels.encode import encode
from zimage_fp8.kernels.hopper import hopper_refusal
from zimage_fp8.kernels.language import multiprocessors, runs_triton, tl, triton
from zimage_fp8.kernels.matmul import has_tma, place
from zimage_fp8.kernels.scaled_mm import scaled_mm
from zimage_fp8.kernels.swiglu import gated_reference
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.kernels.wgmma import wgmma_gated
from zimage_fp8.numerics import QMAX

GATED_IMPLEMENTATIONS = ("triton-gated", "wgmma-gated")
# n is the width of what is written: as many columns of w1 and of w3.
GATED_TILE = Tile(n=128, stages=4, group=17)
WIDE_INPUT_TILE = Tile(n=128, k=64, stages=4, group=17)


def gated_matmul(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    out: Output,
    dtype: torch.dtype,
    implementation: str = "triton-gated",
    tile: Tile | None = None,
) -> Activation:
    """x: [tokens, in]; weight: [2 · hidden, in], w1 above w3; both BF16 or codes; weight_scale:
    fp32 [] or [2 · hidden], None for BF16. Returns [tokens, hidden] as `out` asks for, plain values
    in `dtype`.

    A scale per token needs the whole row: the gate is then written in `dtype` and encoded by a
    kernel of its own. Raises ValueError when the implementation cannot run it.
    """
    if implementation not in GATED_IMPLEMENTATIONS:
        raise ValueError(
            f"gated product {implementation!r}: expected one of {', '.join(GATED_IMPLEMENTATIONS)}"
        )
    if not runs_triton(weight):
        return gated_matmul_reference(x, weight, weight_scale, out, dtype)
    if implementation == "wgmma-gated":
        if reason := hopper_refusal(weight.device):
            raise ValueError(f"gated product {implementation!r} cannot run this: {reason}")
        return wgmma_gated(x, weight, weight_scale, out, dtype, tile)
    if not has_tma(weight.device):
        raise ValueError("a gated product needs Hopper's bulk copies (compute capability 9.0)")
    return gated_matmul_triton(x, weight, weight_scale, out, dtype, tile)


def gated_matmul_reference(
    x: Activation, weight: Tensor, weight_scale: Tensor | None, out: Output, dtype: torch.dtype
) -> Activation:
    if x.scale is None or weight_scale is None:
        wide = x.values.float() @ weight.float().T
    else:
        wide = scaled_mm(x.values, x.scale, weight, weight_scale, torch.float32)
    if out.spec is not None and out.is_pointwise:
        return gated_reference(wide, out)
    return encode(gated_reference(wide, PLAIN).values.to(dtype), out)


def gated_matmul_triton(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    out: Output,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Activation:
    from triton.tools.tensor_descriptor import TensorDescriptor

    tile = tile or (GATED_TILE if weight.dtype.itemsize == 1 else WIDE_INPUT_TILE)
    x_scale, w_scale = (None, None) if weight_scale is None else (x.scale, weight_scale)
    (rows, depth), hidden = x.values.shape, len(weight) // 2
    written = out if out.is_pointwise else PLAIN
    like = torch.empty(0, dtype=dtype, device=weight.device)
    result = empty_activation(rows, hidden, written, like)
    tiles = -(-rows // tile.m) * -(-hidden // tile.n)
    programs = tile.per_sm * multiprocessors(weight.device)  # see `matmul`
    format = written.spec.format if written.spec else None
    _gated_tma_kernel[(min(tiles, programs),)](
        TensorDescriptor.from_tensor(x.values, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight.view(2, hidden, depth), [2, tile.n, tile.k]),
        TensorDescriptor.from_tensor(result.values, [tile.m, tile.n]),
        *(result.values if scale is None else scale for scale in (x_scale, w_scale, result.scale)),
        rows,
        hidden,
        depth,
        IS_INT=x.values.dtype == torch.int8,
        IS_SCALED=x_scale is not None,
        PER_TOKEN=x_scale is not None and x_scale.ndim > 0,
        PER_CHANNEL=w_scale is not None and w_scale.ndim > 0,
        FORMAT=FORMATS[format],
        QMAX=QMAX[format] if format else 0.0,
        M=tile.m,
        N=tile.n,
        K=tile.k,
        GROUP=tile.group,
        PROGRAMS=programs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return result if written is out else encode(result.values, out)


@triton.jit
def _gated_tma_kernel(
    x, weight, out, x_scale, weight_scale, out_scale, rows, hidden, depth,
    IS_INT: tl.constexpr, IS_SCALED: tl.constexpr,
    PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    FORMAT: tl.constexpr, QMAX: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    num_m, num_n = tl.cdiv(rows, M), tl.cdiv(hidden, N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=True):
        m, n = place(tile, num_m, num_n, GROUP)
        acc = tl.zeros((M, 2 * N), dtype=tl.int32 if IS_INT else tl.float32)
        for k in range(tl.cdiv(depth, K)):
            left = x.load([m * M, k * K])
            right = tl.reshape(weight.load([0, n * N, k * K]), (2 * N, K))
            acc = tl.dot(left, right.T, acc, out_dtype=acc.dtype)
        # Both halves of a row lie in one thread: splitting moves nothing.
        halves = tl.permute(tl.reshape(acc.to(tl.float32), (M, 2, N)), (0, 2, 1))
        gate, value = tl.split(halves)
        if IS_SCALED:
            if PER_TOKEN:
                row = m * M + tl.arange(0, M)
                of_row = tl.load(x_scale + row, row < rows, other=0.0)[:, None]
            else:
                of_row = tl.load(x_scale)
            if PER_CHANNEL:
                column = n * N + tl.arange(0, N)
                inside = column < hidden
                of_gate = tl.load(weight_scale + column, inside, other=0.0)[None]
                of_value = tl.load(weight_scale + hidden + column, inside, other=0.0)[None]
            else:
                of_gate = tl.load(weight_scale)
                of_value = of_gate
            gate = gate * of_row * of_gate
            value = value * of_row * of_value
        y = gate * tl.sigmoid(gate) * value
        if FORMAT != 0:
            y = codes_of(y, tl.load(out_scale), FORMAT, QMAX)
        out.store([m * M, n * N], y.to(out.dtype))
