"""A matrix that is there already, written as the next product reads it: codes, and scales."""

from torch import Tensor

from zimage_fp8.kernels.activation import (
    Activation,
    Epilogue,
    Output,
    empty_activation,
    encode_reference,
    store_row,
    store_two,
)
from zimage_fp8.kernels.hopper_row import encode_hopper, program_for
from zimage_fp8.kernels.language import runs_triton, tl, triton


def encode(x: Tensor, out: Output) -> Activation:
    """x: [tokens, width], written as `out` asks for; x itself when that is plain values."""
    if out.spec is None:
        return Activation(x)
    if not runs_triton(x):
        return encode_reference(x.float(), out, x.dtype)
    program = program_for(out, x.shape[-1], x.dtype, x.device) if x.is_contiguous() else None
    return encode_hopper(x, out, program) if program else encode_triton(x, out)


def encode_triton(x: Tensor, out: Output) -> Activation:
    rows, width = x.shape
    result = empty_activation(rows, width, out, x)
    launch = Epilogue(out, width, may_split=True)
    _encode_kernel[(rows, launch.chunks)](
        x,
        *launch.pointers(result),
        x.stride(0),
        width,
        REST=launch.rest,
        **launch.constants,
        num_warps=launch.warps,
    )
    return result


@triton.jit
def _encode_kernel(
    x,
    values,
    scales,
    x_stride,
    width,
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
    mask = columns < width
    start = x + row.to(tl.int64) * x_stride
    wide = tl.load(start + columns, mask, other=0.0).to(tl.float32)
    if REST == 0:
        store_row(
            wide, values, scales, row, columns, mask, width,
            BLOCK, FORMAT, PER_TOKEN, GROUP, QMAX, AMAX_FLOOR,
        )  # fmt: skip
    else:
        behind = BLOCK + tl.arange(0, REST)
        inside = behind < width
        narrow = tl.load(start + behind, inside, other=0.0).to(tl.float32)
        store_two(
            wide, narrow, values, scales, row, columns, mask, behind, inside, width,
            BLOCK, REST, FORMAT, GROUP, QMAX, AMAX_FLOOR,
        )  # fmt: skip
