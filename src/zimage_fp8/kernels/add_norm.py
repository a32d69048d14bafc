"""The residual sum of a language model's layer and the RMS norm that reads it, in one pass.

The text encoder's counterpart of `kernels.norm`: no gate, no batch, the weight as it is on disk.
Exactness: the sum is equal bit for bit; the norm as stated in `kernels.norm`.
"""

import torch
from torch import Tensor

from zimage_fp8.kernels.activation import (
    Activation,
    Epilogue,
    Output,
    empty_activation,
    encode_reference,
    store_row,
)
from zimage_fp8.kernels.language import runs_triton, tl, triton
from zimage_fp8.kernels.rms_norm import rms_norm


def add_norm(
    x: Tensor, h: Tensor | None, weight: Tensor, eps: float, out: Output
) -> tuple[Tensor, Activation]:
    """`x + h` rounded to x's dtype, and its RMS norm times weight, written as `out` asks for.

    x: [tokens, dim] contiguous; h: the same, or None for nothing to add; weight: [dim].
    """
    return (add_norm_triton if runs_triton(x) else add_norm_reference)(x, h, weight, eps, out)


def add_norm_reference(
    x: Tensor, h: Tensor | None, weight: Tensor, eps: float, out: Output
) -> tuple[Tensor, Activation]:
    total = x if h is None else x + h
    return total, encode_reference(rms_norm(total.float(), weight, eps), out, x.dtype)


def add_norm_triton(
    x: Tensor, h: Tensor | None, weight: Tensor, eps: float, out: Output
) -> tuple[Tensor, Activation]:
    tokens, dim = x.shape
    total = x if h is None else torch.empty_like(x)
    result = empty_activation(tokens, dim, out, x)
    launch = Epilogue(out, dim, whole_rows=True)
    _add_norm_kernel[(tokens,)](
        x,
        x if h is None else h,
        total,
        weight,
        *launch.pointers(result),
        dim,
        eps,
        HAS_RESIDUAL=h is not None,
        **launch.constants,
        num_warps=launch.warps,
    )
    return total, result


@triton.jit
def _add_norm_kernel(
    x,
    h,
    total,
    weight,
    values,
    scales,
    dim,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    GROUP: tl.constexpr,
    QMAX: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    start = row.to(tl.int64) * dim
    wide = tl.load(x + start + columns, mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(h + start + columns, mask, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + start + columns, rounded, mask)
        wide = rounded.to(tl.float32)
    weights = tl.load(weight + columns, mask, other=0.0).to(tl.float32)
    rstd = tl.math.rsqrt(tl.sum(wide * wide, axis=0) / dim + eps)
    store_row(
        wide * rstd * weights, values, scales, row, columns, mask, dim,
        BLOCK, FORMAT, PER_TOKEN, GROUP, QMAX, AMAX_FLOOR,
    )  # fmt: skip
