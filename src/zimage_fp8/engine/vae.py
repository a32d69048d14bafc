"""The autoencoder's decoder made fast: channels_last, fused norms, a CUDA graph per size.

A picture flows through it as *bands*: tensors of some rows each, one below the other, written by
one layer and freed by the next as soon as it has read them. At 1024x1024 the widest layer is
512 MiB in BF16; in bands there is never a second copy of it, and what one kernel writes the next
finds in the GPU's cache. A 3x3 convolution needs a row of either neighbour: `_windows` gives it.

No convolution adds its bias: PyTorch would spend a kernel of its own on that. A `Picture` carries
the biases that its bands still lack, and whoever reads the bands next adds them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_fp8.engine.graphs import GraphCache
from zimage_fp8.kernels.group_norm import (
    Normalization,
    group_moments,
    normalize,
    normalize_window,
)
from zimage_fp8.model.autoencoder import Attention, MidBlock, Resnet
from zimage_fp8.model.vae import Decoder

BAND_ELEMENTS = 2**24  # of one band: 32 MiB in BF16, below an H100's 50 MB of L2

# (a band, the row above, the row below) -> what a convolution reads: a row more at either side,
# zeros beyond the picture's edge. See `kernels.group_norm.normalize_window`.
MakeWindow = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass
class Picture:
    """bands: [1, channels, rows, width] each, channels_last, from the top down.

    bias: fp32 [channels], still to be added to every pixel.
    """

    bands: list[Tensor]
    bias: Tensor


class FastDecoder(Decoder):
    """`Decoder` by another road: the same weights, and pixels equal to a rounding here and there.

    graphs: the cache to keep CUDA graphs in, shared with others so that memory is; its own when
    left out. band_elements: the most that one band holds. Raises ModelError for an autoencoder
    that is built otherwise than Z-Image's.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        graphs: GraphCache | None = None,
        band_elements: int = BAND_ELEMENTS,
    ) -> None:
        super().__init__(folder, dtype, device)
        # PyTorch's stubs do not know this form.
        self.vae.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.graphs = GraphCache(device) if graphs is None else graphs
        self._owner = object()  # in every key: the cache may be shared
        self.band_elements = band_elements

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> np.ndarray:
        """latent fp32 [1, channels, h, w] -> uint8 [8h, 8w, 3], rounded on the device.

        The first call of a size captures its graph and lets cuDNN try its algorithms.
        """
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            key = ("vae", self._owner, *latent.shape)
            levels = self.graphs.run(key, self._levels, latent)
        finally:
            torch.backends.cudnn.benchmark = before
        return _to_host(levels)

    def _levels(self, latent: Tensor) -> Tensor:
        """latent fp32 [1, channels, h, w] -> uint8 [8h, 8w, 3] on the device."""
        decoder = self.vae.decoder
        z = (latent / self.scaling + self.shift).to(self.vae.dtype)
        z = z.contiguous(memory_format=torch.channels_last)
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        x = F.conv2d(z, decoder.conv_in.weight, padding=1)
        picture = _middle(Picture([x], _bias(decoder.conv_in)), decoder.mid_block)
        del x
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                picture = _resnet(picture, resnet)
            for upsampler in block.upsamplers:
                picture = self._upsample(picture, upsampler.conv)
        last = decoder.conv_out
        rows = [
            _to_levels(F.conv2d(window, last.weight, last.bias, padding=(0, 1)))
            for _, window in _windows(picture.bands, _norm_silu(picture, decoder.conv_norm_out))
        ]
        return torch.cat(rows)

    def _upsample(self, picture: Picture, conv: nn.Conv2d) -> Picture:
        """Twice as many rows and columns, nearest neighbour, then the convolution."""
        width, bias = 2 * picture.bands[0].shape[3], picture.bias[:, None, None]
        step = max(1, self.band_elements // (2 * width * conv.out_channels))  # rows before doubling
        larger = []

        def make(band: Tensor, above: Tensor | None, below: Tensor | None) -> Tensor:
            window = _window_like(band)
            torch.add(band, bias, out=window[:, :, 1:-1])
            for row, edge in ((window[:, :, :1], above), (window[:, :, -1:], below)):
                row.zero_() if edge is None else torch.add(edge, bias, out=row)
            return window

        for band, window in _windows(picture.bands, make):
            for top in range(0, band.shape[2], step):
                rows = window[:, :, top : top + step + 2]
                doubled = F.interpolate(rows, scale_factor=2.0, mode="nearest")
                larger.append(_conv(doubled[:, :, 1:-1], conv))
                del doubled
            del band, window
        return Picture(larger, _bias(conv))


def _middle(picture: Picture, block: MidBlock) -> Picture:
    picture = _resnet(picture, block.resnets[0])
    for attention in block.attentions:
        picture = _attend(picture, attention)
    return _resnet(picture, block.resnets[1])


def _resnet(picture: Picture, block: Resnet) -> Picture:
    """x + conv2(norm2(conv1(norm1(x)))); empties `picture` and may change its tensors."""
    skipped, hidden = Picture([], picture.bias), Picture([], _bias(block.conv1))
    shortcut: nn.Conv2d | None = block.conv_shortcut
    if shortcut is not None:  # 1x1: what it makes of the missing bias is again a bias
        skipped.bias = shortcut.weight.flatten(1).float() @ picture.bias + _bias(shortcut)
    for band, window in _windows(picture.bands, _norm_silu(picture, block.norm1)):
        hidden.bands.append(_conv(window, block.conv1))
        skipped.bands.append(band if shortcut is None else F.conv2d(band, shortcut.weight))
        del band, window  # before the next window is made, so that its memory can be taken
    sums = iter(skipped.bands)
    for band, window in _windows(hidden.bands, _norm_silu(hidden, block.norm2)):
        next(sums).add_(_conv(window, block.conv2))
        del band, window
    return Picture(skipped.bands, skipped.bias + _bias(block.conv2))


def _norm_silu(picture: Picture, norm: nn.GroupNorm) -> MakeWindow:
    """Windows of the normalized picture; the moments, of all bands, are taken now."""
    by = _normalization(picture, norm, silu=True)
    return lambda band, above, below: normalize_window(band, above, below, by)


def _normalization(picture: Picture, norm: nn.GroupNorm, *, silu: bool) -> Normalization:
    moments = group_moments(picture.bands, norm.num_groups, norm.eps, picture.bias)
    return Normalization(moments, norm.weight, norm.bias, silu, picture.bias)


def _windows(bands: list[Tensor], make: MakeWindow) -> Iterator[tuple[Tensor, Tensor]]:
    """(band, the window that `make` makes of it and its neighbours' rows); empties `bands`."""
    above: Tensor | None = None
    while bands:
        band = bands.pop(0)
        window = make(band, above, bands[0][:, :, :1] if bands else None)
        above = band[:, :, -1:].clone(memory_format=torch.channels_last) if bands else None
        yield band, window
        del band, window


def _window_like(band: Tensor) -> Tensor:
    """Memory for a band with a row more at either side."""
    batch, channels, rows, width = band.shape
    return torch.empty(
        (batch, channels, rows + 2, width),
        dtype=band.dtype,
        device=band.device,
        memory_format=torch.channels_last,
    )


def _conv(window: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 convolution, its bias left out. It loses the window's first and last row."""
    return F.conv2d(window, conv.weight, padding=(0, 1))


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    if layer.bias is None:
        return layer.weight.new_zeros(len(layer.weight), dtype=torch.float32)
    return layer.bias.float()


def _attend(picture: Picture, block: Attention) -> Picture:
    """x + attention over all its pixels; changes x, which is one band."""
    (x,) = picture.bands
    normed = normalize(x, _normalization(picture, block.group_norm, silu=False))
    tokens = normed.permute(0, 2, 3, 1).flatten(1, 2)  # [1, pixels, channels]
    q, k, v = (layer(tokens)[:, None] for layer in (block.to_q, block.to_k, block.to_v))
    # 4.1 ms at 16,384 tokens and heads of 512, which FlashAttention does not take; products and a
    # softmax per chunk of queries took 4.9 (H200).
    mixed = F.scaled_dot_product_attention(q, k, v)
    last: nn.Linear = block.to_out[0]
    mixed = F.linear(mixed[:, 0], last.weight)
    x.add_(mixed.transpose(1, 2).reshape(x.shape))
    return Picture([x], picture.bias + _bias(last))


def _to_levels(picture: Tensor) -> Tensor:
    """[1, 3, rows, width] in −1 to 1 -> uint8 [rows, width, 3]."""
    levels = (picture.float() * 127.5 + 127.5).round_().clamp_(0, 255).to(torch.uint8)
    return levels[0].permute(1, 2, 0).contiguous()


def _to_host(levels: Tensor) -> np.ndarray:
    """A copy in host memory. The array owns it: the device's buffer is free when this returns."""
    if levels.is_cuda:
        host = torch.empty(levels.shape, dtype=levels.dtype, pin_memory=True)
        host.copy_(levels, non_blocking=True)
        torch.cuda.current_stream(levels.device).synchronize()
        levels = host
    pixels: np.ndarray = levels.numpy()
    return pixels
