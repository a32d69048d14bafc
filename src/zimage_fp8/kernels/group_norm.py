"""GroupNorm, with SiLU when wanted, on channels_last pictures that may come in bands of rows.

The statistics of a group span the whole picture, the rest is pixel by pixel. So there are two
steps: `group_moments` reads all bands once, `normalize` and `normalize_window` read one band and
write it, the latter with a row of either neighbour, as a 3x3 convolution wants it. Both steps work
in fp32; the result is rounded once.

The bias of the convolution before need not be in what is read: `shift`, one value per channel, is
added on the way, so a bias costs no pass over memory of its own.

Variance is never a difference of two large sums: every block takes its squares around its own
mean, and blocks are merged by Chan's formula. No atomics: the same picture gives the same bits.

Exactness of the Triton kernels: sums run in another order than the reference's and the exponential
differs by an fp32 ulp or two, so BF16 results agree but for values within that of a rounding
boundary: neighbours, at most one in 1e3 (tests/kernels/test_group_norm.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage_fp8.kernels.language import next_power_of_2, runs_triton, tl, triton

TILE = 8192  # values per program of the two kernels that touch the picture
CHANNELS = 128  # per tile at most: 256 contiguous bytes of a BF16 pixel
WARPS = 8
MERGED_AT_ONCE = 1024  # partial moments that one program holds


@dataclass(frozen=True)
class Normalization:
    """What becomes of a pixel: `silu?((x + shift − mean) · (1/std · weight) + bias)`.

    moments: fp32 [2, batch, groups], mean and 1/std, of `group_moments`; weight, bias, shift:
    [channels].
    """

    moments: Tensor
    weight: Tensor
    bias: Tensor
    silu: bool
    shift: Tensor | None = None


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, *, silu: bool
) -> Tensor:
    """`silu?((x − mean) / sqrt(var + eps) · weight + bias)`, mean and var per group of channels.

    x: [batch, channels, height, width], channels_last; weight, bias: [channels]. Returns x's
    shape, dtype and memory format.
    """
    moments = group_moments([x], num_groups, eps)
    return normalize(x, Normalization(moments, weight, bias, silu))


def group_moments(
    bands: Sequence[Tensor], num_groups: int, eps: float, shift: Tensor | None = None
) -> Tensor:
    """Moments of the picture that the bands make up, one below the other, `shift` added.

    bands: [batch, channels, rows, width] each, channels_last; shift: [channels]. Returns fp32
    [2, batch, groups]: the mean and `1 / sqrt(var + eps)`.
    """
    run = group_moments_triton if runs_triton(bands[0]) else group_moments_reference
    return run(bands, num_groups, eps, shift)


def normalize(x: Tensor, by: Normalization) -> Tensor:
    """x: [batch, channels, rows, width], channels_last or rows of such a tensor."""
    return (normalize_triton if runs_triton(x) else normalize_reference)(x, by)


def normalize_window(
    x: Tensor, above: Tensor | None, below: Tensor | None, by: Normalization
) -> Tensor:
    """`normalize` of x with one more row at either side: [batch, channels, rows + 2, width].

    above, below: [batch, channels, 1, width], laid out like x; zeros come where there is None.
    """
    run = normalize_window_triton if runs_triton(x) else normalize_window_reference
    return run(x, above, below, by)


def group_moments_reference(
    bands: Sequence[Tensor], num_groups: int, eps: float, shift: Tensor | None = None
) -> Tensor:
    counts, means, squares = [], [], []
    for band in bands:
        groups = _shifted(band, shift).unflatten(1, (num_groups, -1)).flatten(2)
        mean = groups.mean(-1)
        counts.append(torch.full_like(mean, groups.shape[-1]))
        means.append(mean)
        squares.append((groups - mean[..., None]).square().sum(-1))
    count, means_ = torch.stack(counts), torch.stack(means)
    mean = (count * means_).sum(0) / count.sum(0)
    square = (torch.stack(squares) + count * (means_ - mean).square()).sum(0)
    return torch.stack([mean, 1 / torch.sqrt(square / count.sum(0) + eps)])


def normalize_reference(x: Tensor, by: Normalization) -> Tensor:
    per_group = x.shape[1] // by.moments.shape[-1]
    mean, inv_std = (it.repeat_interleave(per_group, -1)[..., None, None] for it in by.moments)
    weight, bias = (it.float()[:, None, None] for it in (by.weight, by.bias))
    y = (_shifted(x, by.shift) - mean) * (inv_std * weight) + bias
    return (F.silu(y) if by.silu else y).to(x.dtype)


def normalize_window_reference(
    x: Tensor, above: Tensor | None, below: Tensor | None, by: Normalization
) -> Tensor:
    edge = torch.zeros_like(x[:, :, :1])
    rows = [edge if it is None else normalize_reference(it, by) for it in (above, below)]
    window = torch.cat([rows[0], normalize_reference(x, by), rows[1]], dim=2)
    return window.contiguous(memory_format=torch.channels_last)


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    return x.float() if shift is None else x.float() + shift.float()[:, None, None]


def group_moments_triton(
    bands: Sequence[Tensor], num_groups: int, eps: float, shift: Tensor | None = None
) -> Tensor:
    batch, channels = bands[0].shape[:2]
    per_group = channels // num_groups
    lanes = next_power_of_2(per_group)
    at_once = min(next_power_of_2(num_groups), max(1, CHANNELS // lanes))  # groups per program
    pixels_at_once = max(1, TILE // (at_once * lanes))
    blocks = [-(-band.shape[2] * band.shape[3] // pixels_at_once) for band in bands]
    total, first = sum(blocks), 0
    partial = bands[0].new_empty((3, batch, num_groups, total), dtype=torch.float32)
    for band, count in zip(bands, blocks, strict=True):
        pixels = band.shape[2] * band.shape[3]
        _partial_moments_kernel[(count, -(-num_groups // at_once), batch)](
            band, shift, partial, first, total, pixels, *_strides(band), num_groups,
            per_group, lanes, at_once, pixels_at_once, num_warps=WARPS,
        )  # fmt: skip
        first += count
    moments = partial.new_empty((2, batch, num_groups))
    _merge_moments_kernel[(batch * num_groups,)](
        partial, moments, total, batch * num_groups, eps, MERGED_AT_ONCE
    )
    return moments


def normalize_triton(x: Tensor, by: Normalization) -> Tensor:
    return _normalize_triton(x, None, None, by, edge_rows=0)


def normalize_window_triton(
    x: Tensor, above: Tensor | None, below: Tensor | None, by: Normalization
) -> Tensor:
    return _normalize_triton(x, above, below, by, edge_rows=1)


def _normalize_triton(
    x: Tensor, above: Tensor | None, below: Tensor | None, by: Normalization, *, edge_rows: int
) -> Tensor:
    batch, channels, rows, width = x.shape
    out = torch.empty(
        (batch, channels, rows + 2 * edge_rows, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    at_once = min(next_power_of_2(channels), CHANNELS)
    pixels_at_once = TILE // at_once
    written = out.shape[2] * width
    num_groups = by.moments.shape[-1]
    # How many pixels a neighbour has is a number, not a kind of kernel: a first picture would
    # compile four of each for a picture's top, middle, bottom and all in one.
    above_pixels, below_pixels = (0 if it is None else width for it in (above, below))
    above, below = (x if it is None else it for it in (above, below))
    _normalize_kernel[(-(-written // pixels_at_once), -(-channels // at_once), batch)](
        x, above, below, out, by.moments, by.weight, by.bias, by.shift,
        rows * width, above_pixels, below_pixels, width, written, channels,
        *_strides(x), *_strides(above), *_strides(below), num_groups,
        channels // num_groups, by.silu, edge_rows, at_once, pixels_at_once, num_warps=WARPS,
    )  # fmt: skip
    return out


def _strides(x: Tensor) -> tuple[int, int]:
    """Of the batch and of the pixel. The kernels take pixels in memory order, channels inside."""
    batch, channel, row, pixel = x.stride()
    height, width = x.shape[2:]
    is_pixel_list = (width == 1 or height == 1 or row == width * pixel) and channel == 1
    assert is_pixel_list, f"strides {x.stride()} of {tuple(x.shape)}: channels_last is expected"
    return batch, pixel if width > 1 else row


# Triton would compile for multiples of 16, for 1 and for all other counts of blocks.
@triton.jit(do_not_specialize=["first", "total"])
def _partial_moments_kernel(
    x, shift, partial, first, total, pixels, batch_stride, pixel_stride, num_groups,
    PER_GROUP: tl.constexpr, LANES: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squares around it, of GROUPS groups over PIXELS pixels."""
    block, batch = tl.program_id(0), tl.program_id(2)
    pixel = (block * PIXELS + tl.arange(0, PIXELS))[:, None, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, LANES)[None, None, :]
    mask = (pixel < pixels) & (group < num_groups)[None, :, None]
    if LANES != PER_GROUP:
        mask = mask & (lane < PER_GROUP)
    offset = batch.to(tl.int64) * batch_stride + pixel.to(tl.int64) * pixel_stride
    channel = group[None, :, None] * PER_GROUP + lane
    values = tl.load(x + offset + channel, mask, other=0.0).to(tl.float32)
    if shift is not None:
        is_channel = (group < num_groups)[None, :, None] & (lane < PER_GROUP)
        values += tl.load(shift + channel, is_channel, other=0.0).to(tl.float32)
    count = (tl.minimum(pixels - block * PIXELS, PIXELS) * PER_GROUP).to(tl.float32)
    values = tl.where(mask, values, 0.0)
    mean = tl.sum(tl.sum(values, axis=2), axis=0) / count
    away = tl.where(mask, values - mean[None, :, None], 0.0)
    squares = tl.sum(tl.sum(away * away, axis=2), axis=0)
    target = partial + (batch * num_groups + group) * total + first + block
    step = tl.num_programs(2) * num_groups * total
    inside = group < num_groups
    tl.store(target, tl.zeros_like(mean) + count, inside)
    tl.store(target + step, mean, inside)
    tl.store(target + 2 * step, squares, inside)


@triton.jit(do_not_specialize=["total"])
def _merge_moments_kernel(partial, moments, total, num_rows, eps, BLOCK: tl.constexpr):
    """One group of one picture: all its partial moments into mean and 1/std."""
    row = tl.program_id(0)
    counts = partial + row * total
    means = counts + num_rows * total
    squares = means + num_rows * total
    index = tl.arange(0, BLOCK)
    count_sum = tl.zeros((BLOCK,), tl.float32)
    mean_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, total, BLOCK):
        mask = start + index < total
        count = tl.load(counts + start + index, mask, other=0.0)
        count_sum += count
        mean_sum += count * tl.load(means + start + index, mask, other=0.0)
    count_all = tl.sum(count_sum, axis=0)
    mean = tl.sum(mean_sum, axis=0) / count_all
    square_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, total, BLOCK):
        mask = start + index < total
        count = tl.load(counts + start + index, mask, other=0.0)
        away = tl.load(means + start + index, mask, other=0.0) - mean
        square_sum += tl.load(squares + start + index, mask, other=0.0) + count * away * away
    variance = tl.sum(square_sum, axis=0) / count_all
    tl.store(moments + row, mean)
    tl.store(moments + num_rows + row, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)))


@triton.jit(do_not_specialize=["per_group"])
def _normalize_kernel(
    x, above, below, out, moments, weight, bias, shift,
    pixels, above_pixels, below_pixels, width, written, channels,
    batch_stride, pixel_stride, above_batch_stride, above_pixel_stride,
    below_batch_stride, below_pixel_stride, num_groups, per_group,
    SILU: tl.constexpr, EDGE_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    position = (tl.program_id(0) * PIXELS + tl.arange(0, PIXELS))[:, None]  # in out
    pixel = position - EDGE_ROWS * width  # in x
    inside = channel < channels
    row = moments + batch * num_groups + channel // per_group
    mean = tl.load(row, inside, other=0.0)
    inv_std = tl.load(row + tl.num_programs(2) * num_groups, inside, other=0.0)
    factor = inv_std * tl.load(weight + channel, inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, inside, other=0.0).to(tl.float32)
    is_pixel = (pixel >= 0) & (pixel < pixels)
    start = x + batch * batch_stride + pixel.to(tl.int64) * pixel_stride + channel[None, :]
    values = tl.load(start, is_pixel & inside[None, :], other=0.0).to(tl.float32)
    is_above = (pixel < 0) & (pixel >= -above_pixels)
    start = above + batch * above_batch_stride + position * above_pixel_stride
    mask = is_above & inside[None, :]
    values += tl.load(start + channel[None, :], mask, other=0.0).to(tl.float32)
    is_below = (pixel >= pixels) & (pixel < pixels + below_pixels)
    start = below + batch * below_batch_stride + (pixel - pixels) * below_pixel_stride
    mask = is_below & inside[None, :]
    values += tl.load(start + channel[None, :], mask, other=0.0).to(tl.float32)
    is_pixel = is_pixel | is_above | is_below
    if shift is not None:
        values += tl.load(shift + channel, inside, other=0.0).to(tl.float32)[None, :]
    y = (values - mean[None, :]) * factor[None, :] + offset[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    y = tl.where(is_pixel, y, 0.0)
    target = out + (batch * written + position) * channels + channel[None, :]
    tl.store(target, y.to(out.dtype.element_ty), (position < written) & inside[None, :])
