"""RMS norm times a vector, and the gated residual in front of it, each in one pass over a row.

The vectors are products formed once per timestep: the norm's weight times adaLN's `1 + scale`, or
times `tanh(gate)`. Everything happens in fp32 on a row held in registers; the result is written as
the next linear layer reads it (`kernels.activation`), so no norm output ever goes to memory in
16 bits only to be read again and quantized.

Exactness against the references: the sum of squares is added in another order, an fp32 ulp of the
row's scale. BF16 values and 8-bit codes then agree except where a value lies within that ulp of a
rounding boundary: at most one in 1e4, by one step (tests/kernels/test_fused.py).
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
from zimage_fp8.kernels.hopper_row import program_for, residual_norm_hopper
from zimage_fp8.kernels.language import multiprocessors, runs_triton, tl, triton

# A program walks over rows: the vectors are read once for all of them, and the next two rows are on
# their way from memory while this one is summed. residual_norm to E4M3 at [2112, 3840] on an H200:
# 17.3 us, with one row on its way 23; a program per row took 18.6.
WARPS = 4
PROGRAMS_PER_MULTIPROCESSOR = 3
STAGES = 3
STAGED_BYTES = 64 * 2**10  # rows of x and h on their way, in shared memory; wider ones are not


def norm(x: Tensor, vector: Tensor, eps: float, out: Output) -> Activation:
    """`x / rms(x) · vector`, written as `out` asks for.

    x: [batch, tokens, dim]; vector: fp32 [batch, dim] or [1, dim],
    rows may be strided. Returns [batch · tokens, dim].
    """
    return (norm_triton if runs_triton(x) else norm_reference)(x, vector, eps, out)


def residual_norm(
    x: Tensor, h: Tensor, gate: Tensor, vector: Tensor, eps: float, out: Output
) -> tuple[Tensor, Activation]:
    """`x + h / rms(h) · gate` rounded to x's dtype, and `norm` of that sum.

    x: [batch, tokens, dim]; h: [batch · tokens, dim] contiguous; gate, vector: fp32 [batch, dim]
    or [1, dim].
    """
    if program := program_for(out, x.shape[-1], x.dtype, x.device, residual=True):
        return residual_norm_hopper(x, h, gate, vector, eps, out, program)
    run = residual_norm_triton if runs_triton(x) else residual_norm_reference
    return run(x, h, gate, vector, eps, out)


def residual(x: Tensor, h: Tensor, gate: Tensor, eps: float) -> Tensor:
    """The sum alone, for the last block: [batch, tokens, dim]."""
    return (residual_triton if runs_triton(x) else residual_reference)(x, h, gate, eps)


def norm_reference(x: Tensor, vector: Tensor, eps: float, out: Output) -> Activation:
    return encode_reference(_normed(x, vector, eps).flatten(0, 1), out, x.dtype)


def residual_norm_reference(
    x: Tensor, h: Tensor, gate: Tensor, vector: Tensor, eps: float, out: Output
) -> tuple[Tensor, Activation]:
    total = residual_reference(x, h, gate, eps)
    return total, norm_reference(total, vector, eps, out)


def residual_reference(x: Tensor, h: Tensor, gate: Tensor, eps: float) -> Tensor:
    return (x.float() + _normed(h.reshape(x.shape), gate, eps)).to(x.dtype)


def _normed(x: Tensor, vector: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * vector[:, None]


def norm_triton(x: Tensor, vector: Tensor, eps: float, out: Output) -> Activation:
    return _launch(x, None, None, vector, eps, out)[1]


def residual_norm_triton(
    x: Tensor, h: Tensor, gate: Tensor, vector: Tensor, eps: float, out: Output
) -> tuple[Tensor, Activation]:
    return _launch(x, h, gate, vector, eps, out)


def residual_triton(x: Tensor, h: Tensor, gate: Tensor, eps: float) -> Tensor:
    return _launch(x, h, gate, None, eps, Output())[0]


def _launch(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    vector: Tensor | None,
    eps: float,
    out: Output,
) -> tuple[Tensor, Activation]:
    batch, tokens, dim = x.shape
    x = x.contiguous()
    total = torch.empty_like(x) if h is not None else x
    result = Activation(x)
    if vector is not None:
        result = empty_activation(batch * tokens, dim, out, x)
    launch = Epilogue(out, dim, whole_rows=True)
    rows = batch * tokens
    # A constant of the GPU, not of the shape: otherwise every size of picture would compile anew.
    programs = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device)
    _norm_kernel[(min(rows, programs),)](
        x,
        x if h is None else h,
        total,
        x if gate is None else gate,
        x if vector is None else vector,
        *launch.pointers(result),
        rows,
        dim,
        tokens,
        _sample_stride(gate),
        _sample_stride(vector),
        eps,
        HAS_RESIDUAL=h is not None,
        HAS_NORM=vector is not None,
        IS_SHARED=_sample_stride(gate) == 0 and _sample_stride(vector) == 0,
        PROGRAMS=programs,
        STAGES=STAGES if 2 * STAGES * launch.block * x.element_size() <= STAGED_BYTES else 1,
        **launch.constants,
        num_warps=max(1, min(WARPS, launch.block // 128)),
    )
    return total, result


def _sample_stride(vector: Tensor | None) -> int:
    """0 where all samples share one vector."""
    return 0 if vector is None or len(vector) == 1 else vector.stride(0)


@triton.jit
def _norm_kernel(
    x,
    h,
    total,
    gate,
    vector,
    values,
    scales,
    rows,
    dim,
    tokens,
    gate_stride,
    vector_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_SHARED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    GROUP: tl.constexpr,
    QMAX: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    if IS_SHARED:  # one set of vectors, read once for all rows of this program
        if HAS_RESIDUAL:
            gates = tl.load(gate + columns, mask, other=0.0)
        if HAS_NORM:
            weights = tl.load(vector + columns, mask, other=0.0)
    first = tl.program_id(0)
    for index in tl.range(0, tl.cdiv(rows - first, PROGRAMS), num_stages=STAGES):
        row = first + index * PROGRAMS
        start = row.to(tl.int64) * dim
        sample = (row // tokens).to(tl.int64)
        wide = tl.load(x + start + columns, mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            if not IS_SHARED:
                gates = tl.load(gate + sample * gate_stride + columns, mask, other=0.0)
            added = tl.load(h + start + columns, mask, other=0.0).to(tl.float32)
            rstd = tl.math.rsqrt(tl.sum(added * added, axis=0) / dim + eps)
            rounded = (wide + added * rstd * gates).to(total.dtype.element_ty)
            tl.store(total + start + columns, rounded, mask)
            wide = rounded.to(tl.float32)
        if HAS_NORM:
            if not IS_SHARED:
                weights = tl.load(vector + sample * vector_stride + columns, mask, other=0.0)
            rstd = tl.math.rsqrt(tl.sum(wide * wide, axis=0) / dim + eps)
            store_row(
                wide * rstd * weights, values, scales, row, columns, mask, dim,
                BLOCK, FORMAT, PER_TOKEN, GROUP, QMAX, AMAX_FLOOR,
            )  # fmt: skip
