"""The matrix product of a linear layer, by one of several implementations.

Which one is fastest depends on format and shape (`engine.gemm` holds the measurements); all compute
`(q · scale) @ (weight · weight_scale).T` with one rounding at the end.

cublas          BF16; E4M3 under two scalars, with Hopper's fast accumulation
cublas-slow     E4M3 under two scalars, accumulated in full fp32
cublas-row      E4M3 with a scale per token and per output row
triton-tma      E4M3 and INT8, any scales: persistent programs fed by the bulk copy engine (Hopper)
triton          E4M3 and INT8, any scales: plain pointers (Ampere, Ada and later)
wgmma           BF16, E4M3 and INT8, any scales: CUDA C++ for Hopper alone (`wgmma.py`)

INT8 sums exactly in int32, so its implementations agree bit for bit with the reference.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from zimage_fp8.kernels.activation import Activation
from zimage_fp8.kernels.hopper import hopper_refusal
from zimage_fp8.kernels.language import multiprocessors, runs_triton, tl, triton
from zimage_fp8.kernels.scaled_mm import scaled_mm
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.kernels.wgmma import wgmma

TMA_TILE = Tile()
WIDE_OUTPUT_TILE = Tile(n=128)  # fp32 results take twice the shared memory
POINTER_TILE = Tile(n=128, warps=4)

MatMul = Callable[[Activation, Tensor, Tensor | None, torch.dtype, Tile | None], Tensor]


def matmul(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    dtype: torch.dtype,
    implementation: str = "auto",
    tile: Tile | None = None,
) -> Tensor:
    """x: [tokens, in]; weight: [out, in], BF16 or codes; weight_scale: fp32 [] or [out], None for
    BF16. Returns [tokens, out] in `dtype`. `auto`: the reference on the CPU, cuBLAS for two
    scalars, Triton otherwise. Raises ValueError when the implementation cannot run it."""
    if implementation == "auto":
        implementation = default_implementation(x, weight_scale)
    if reason := refusal(implementation, x, weight_scale):
        raise ValueError(f"GEMM {implementation!r} cannot run this: {reason}")
    return IMPLEMENTATIONS[implementation](x, weight, weight_scale, dtype, tile)


def default_implementation(x: Activation, weight_scale: Tensor | None) -> str:
    if x.scale is None or not runs_triton(x.values):
        return "cublas" if x.scale is None else "reference"
    assert weight_scale is not None
    if x.values.dtype != torch.int8 and not x.scale.ndim and not weight_scale.ndim:
        return "cublas"
    return "triton-tma" if has_tma(x.values.device) else "triton"


def refusal(implementation: str, x: Activation, weight_scale: Tensor | None) -> str | None:
    """Why an implementation cannot run this product, or None."""
    if implementation not in IMPLEMENTATIONS:
        return f"expected one of {', '.join(IMPLEMENTATIONS)}"
    is_plain = x.scale is None
    scalars = x.scale is not None and weight_scale is not None
    scalars = scalars and not x.scale.ndim and not weight_scale.ndim  # type: ignore[union-attr]
    if implementation == "cublas":
        fits = is_plain or (scalars and x.values.dtype != torch.int8)
        return None if fits else "it takes BF16, or E4M3 under two scalars"
    if implementation == "wgmma":
        return hopper_refusal(x.values.device)
    if is_plain:
        return "it takes 8-bit codes"
    if implementation == "cublas-slow" and not (scalars and x.values.dtype != torch.int8):
        return "it takes E4M3 under two scalars"
    if implementation == "cublas-row" and x.values.dtype == torch.int8:
        return "it takes E4M3"
    if implementation == "triton-tma" and not has_tma(x.values.device):
        return "it needs Hopper's bulk copies (compute capability 9.0)"
    return None


def _reference(
    x: Activation, weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype, _: Tile | None
) -> Tensor:
    assert x.scale is not None
    assert weight_scale is not None
    return scaled_mm(x.values, x.scale, weight, weight_scale, dtype)


def _cublas(
    x: Activation, weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype, _: Tile | None
) -> Tensor:
    if x.scale is None:
        return x.values @ weight.T
    assert weight_scale is not None
    return torch._scaled_mm(
        x.values, weight.T, x.scale, weight_scale, out_dtype=dtype, use_fast_accum=True
    )


def _cublas_slow(
    x: Activation, weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype, _: Tile | None
) -> Tensor:
    assert x.scale is not None
    assert weight_scale is not None
    return torch._scaled_mm(x.values, weight.T, x.scale, weight_scale, out_dtype=dtype)


def _cublas_row(
    x: Activation, weight: Tensor, weight_scale: Tensor | None, dtype: torch.dtype, _: Tile | None
) -> Tensor:
    assert x.scale is not None
    assert weight_scale is not None
    rows = x.scale.reshape(-1, 1).expand(len(x.values), 1).contiguous()
    columns = weight_scale.reshape(1, -1).expand(1, len(weight)).contiguous()
    return torch._scaled_mm(x.values, weight.T, rows, columns, out_dtype=dtype, use_fast_accum=True)


def _triton_tma(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None,
) -> Tensor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    assert x.scale is not None
    assert weight_scale is not None
    tile = tile or (TMA_TILE if dtype.itemsize == 2 else WIDE_OUTPUT_TILE)
    (rows, depth), columns = x.values.shape, len(weight)
    out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    tiles = -(-rows // tile.m) * -(-columns // tile.n)
    # A constant of the GPU, not of the shape: otherwise every size of picture would compile anew.
    programs = tile.per_sm * multiprocessors(weight.device)
    _tma_kernel[(min(tiles, programs),)](
        TensorDescriptor.from_tensor(x.values, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
        TensorDescriptor.from_tensor(out, [tile.m, tile.n // tile.parts]),
        x.scale,
        weight_scale,
        rows,
        columns,
        depth,
        **_constants(x, weight_scale, tile),
        PARTS=tile.parts,
        PROGRAMS=programs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _triton(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None,
) -> Tensor:
    assert x.scale is not None
    assert weight_scale is not None
    tile = tile or POINTER_TILE
    (rows, depth), columns = x.values.shape, len(weight)
    out = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    _pointer_kernel[(-(-rows // tile.m) * -(-columns // tile.n),)](
        x.values,
        weight,
        out,
        x.scale,
        weight_scale,
        rows,
        columns,
        depth,
        **_constants(x, weight_scale, tile),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _constants(x: Activation, weight_scale: Tensor, tile: Tile) -> dict[str, object]:
    assert x.scale is not None
    return {
        "IS_INT": x.values.dtype == torch.int8,
        "PER_TOKEN": x.scale.ndim > 0,
        "PER_CHANNEL": weight_scale.ndim > 0,
        "M": tile.m,
        "N": tile.n,
        "K": tile.k,
        "GROUP": tile.group,
    }


@lru_cache
def has_tma(device: torch.device) -> bool:
    """Whether the device has Hopper's bulk tensor copies (Triton's interpreter imitates them)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


IMPLEMENTATIONS: dict[str, MatMul] = {
    "reference": _reference,
    "cublas": _cublas,
    "cublas-slow": _cublas_slow,
    "cublas-row": _cublas_row,
    "triton-tma": _triton_tma,
    "triton": _triton,
    "wgmma": wgmma,
}


@triton.jit
def place(tile, num_m, num_n, GROUP: tl.constexpr):
    """Tile number -> (row, column) of the tile, GROUP rows of tiles before the next columns."""
    per_group = GROUP * num_n
    first = tile // per_group * GROUP
    height = tl.minimum(num_m - first, GROUP)
    within = tile % per_group
    return first + within % height, within // height


@triton.jit
def _scaled(
    acc, x_scale, weight_scale, row, column, rows, columns,
    PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    y = acc.to(tl.float32)
    if PER_TOKEN:
        y = y * tl.load(x_scale + row, row < rows, other=0.0)[:, None]
    else:
        y = y * tl.load(x_scale)
    if PER_CHANNEL:
        y = y * tl.load(weight_scale + column, column < columns, other=0.0)[None]
    else:
        y = y * tl.load(weight_scale)
    return y


@triton.jit
def _tma_kernel(
    x, weight, out, x_scale, weight_scale, rows, columns, depth,
    IS_INT: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    num_m, num_n = tl.cdiv(rows, M), tl.cdiv(columns, N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=True):
        m, n = place(tile, num_m, num_n, GROUP)
        acc = tl.zeros((M, N), dtype=tl.int32 if IS_INT else tl.float32)
        for k in range(tl.cdiv(depth, K)):
            left = x.load([m * M, k * K])
            right = weight.load([n * N, k * K])
            acc = tl.dot(left, right.T, acc, out_dtype=acc.dtype)
        row, column = m * M + tl.arange(0, M), n * N + tl.arange(0, N)
        y = _scaled(
            acc, x_scale, weight_scale, row, column, rows, columns, PER_TOKEN, PER_CHANNEL
        ).to(out.dtype)
        if PARTS == 1:
            out.store([m * M, n * N], y)
        else:
            halves = tl.permute(tl.reshape(y, (M, 2, N // 2)), (0, 2, 1))
            left_half, right_half = tl.split(halves)
            out.store([m * M, n * N], left_half)
            out.store([m * M, n * N + N // 2], right_half)


@triton.jit
def _pointer_kernel(
    x, weight, out, x_scale, weight_scale, rows, columns, depth,
    IS_INT: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    m, n = place(tl.program_id(0), tl.cdiv(rows, M), tl.cdiv(columns, N), GROUP)
    row, column = m * M + tl.arange(0, M), n * N + tl.arange(0, N)
    deep = tl.arange(0, K)
    # Rows beyond the edge repeat the last one; their results are not stored.
    x_at = x + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * depth + deep[None]
    w_at = weight + tl.minimum(column, columns - 1).to(tl.int64)[None] * depth + deep[:, None]
    acc = tl.zeros((M, N), dtype=tl.int32 if IS_INT else tl.float32)
    for k in range(tl.cdiv(depth, K)):
        inside = deep < depth - k * K
        left = tl.load(x_at + k * K, inside[None], other=0.0)
        right = tl.load(w_at + k * K, inside[:, None], other=0.0)
        acc = tl.dot(left, right, acc, out_dtype=acc.dtype)
    y = _scaled(acc, x_scale, weight_scale, row, column, rows, columns, PER_TOKEN, PER_CHANNEL)
    mask = (row < rows)[:, None] & (column < columns)[None]
    target = out + row.to(tl.int64)[:, None] * columns + column[None]
    tl.store(target, y.to(out.dtype.element_ty), mask)
