"""The autoencoder's decoder made fast: channels_last, fused norms, a CUDA graph per size.

A picture flows through it as *bands*: tensors of some rows each, one below the other, written by
one layer and freed by the next as soon as it has read them. At 1024x1024 the widest layer is
512 MiB in BF16; in bands there is never a second copy of it, and what one kernel writes the next
finds in the GPU's cache. A 3x3 convolution needs a row of either neighbour: `_windows` gives it.

No convolution adds its bias: PyTorch would spend a kernel of its own on that. A `Picture` carries
the biases that its bands still lack, and whoever reads the bands next adds them.

Nothing is computed twice. A 3x3 convolution of a doubled picture meets every pixel up to four
times; `_Doubling` adds the weights instead and runs as a 2x2 convolution of the small one. The
attention's keys and values are linear in the same pixels, so both stay out of its sum
(`kernels.pixel_attention`).
"""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
from zimage_fp8.kernels.pixel_attention import pixel_attention
from zimage_fp8.model.autoencoder import Attention, MidBlock, Resnet
from zimage_fp8.model.vae import Decoder

log = logging.getLogger(__name__)

BAND_ELEMENTS = 2**24  # of one band: 32 MiB in BF16, below an H100's 50 MB of L2
# Beyond as many pixels as 1024x512 has, bands are twice that: 31.9 to 29.1 ms at 1024x1024, and
# 190 MiB of the decoder's own (H200). Smaller pictures have less of both to win and to lose.
LARGE_PIXELS = 2**19

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
    left out. band_elements: the most that one band holds; by the picture's size when left out.
    Raises ModelError for an autoencoder that is built otherwise than Z-Image's.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        *,
        graphs: GraphCache | None = None,
        band_elements: int | None = None,
    ) -> None:
        super().__init__(folder, dtype, device)
        # PyTorch's stubs do not know this form.
        self.vae.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.doublings = [
            [_Doubling(upsampler.conv) for upsampler in block.upsamplers]
            for block in self.vae.decoder.up_blocks
        ]
        self.graphs = GraphCache(device) if graphs is None else graphs
        self._owner = object()  # in every key: the cache may be shared
        self.band_elements = band_elements
        self._rehearsal: Future[None] | None = None
        if device.type == "cuda":
            pool = ThreadPoolExecutor(1, thread_name_prefix="rehearsal")
            self._rehearsal = pool.submit(self._rehearse)
            pool.shutdown(wait=False)

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> np.ndarray:
        """latent fp32 [1, channels, h, w] -> uint8 [8h, 8w, 3], rounded on the device.

        The first call of a size captures its graph. cuDNN chooses its algorithms by itself: trying
        them makes a picture 1 to 4 % faster, takes 1.4 to 3 s per size, and tens of MiB (H200).
        """
        if self._rehearsal is not None:
            if error := self._rehearsal.exception():
                log.warning("the decoder's rehearsal failed: %s", error)
            self._rehearsal = None
        key = ("vae", self._owner, *latent.shape)
        return _to_host(self.graphs.run(key, self._levels, latent))

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Decode a small latent while the other models load: kernels are compiled and libraries
        loaded then, which on a machine that never ran them takes 5 s."""
        device = self.vae.device
        with torch.cuda.device(device):
            self._levels(torch.zeros(1, self.vae.config.latent_channels, 16, 16, device=device))

    def _levels(self, latent: Tensor) -> Tensor:
        """latent fp32 [1, channels, h, w] -> uint8 [8h, 8w, 3] on the device."""
        decoder = self.vae.decoder
        z = (latent / self.scaling + self.shift).to(self.vae.dtype)
        z = z.contiguous(memory_format=torch.channels_last)
        if self.vae.post_quant_conv is not None:
            z = self.vae.post_quant_conv(z)
        x = F.conv2d(z, decoder.conv_in.weight, padding=1)
        is_large = 64 * latent.shape[2] * latent.shape[3] > LARGE_PIXELS
        most = self.band_elements or BAND_ELEMENTS * (2 if is_large else 1)
        picture = _middle(Picture([x], _bias(decoder.conv_in)), decoder.mid_block)
        del x
        for block, doublings in zip(decoder.up_blocks, self.doublings, strict=True):
            for resnet in block.resnets:
                picture = _resnet(picture, resnet)
            for doubling in doublings:
                picture = doubling.run(picture, most)
        last = decoder.conv_out
        rows = [
            _to_levels(F.conv2d(window, last.weight, last.bias, padding=(0, 1)))
            for _, window in _windows(picture.bands, _norm_silu(picture, decoder.conv_norm_out))
        ]
        return torch.cat(rows)


class _Doubling:
    """Twice the rows and columns, nearest neighbour, then a 3x3 convolution: at 4/9 of its work.

    An output pixel at row 2i reads the small picture's row i - 1 once and row i twice, at row
    2i + 1 row i twice and row i + 1 once; columns alike. So each of the four kinds of output pixel
    (row even or odd, column even or odd) is a 2x2 convolution of the small picture, whose weights
    are sums of the 3x3 ones, made in fp32 and rounded once. One convolution makes all four.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        rows = _phases(conv.weight.float(), dim=2)
        kinds = torch.cat([kind for row in rows for kind in _phases(row, dim=3)])
        self.weight = kinds.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)
        self.conv = conv

    def run(self, picture: Picture, band_elements: int) -> Picture:
        """Empties `picture`."""
        width, bias = picture.bands[0].shape[3], picture.bias[:, None, None]
        step = max(1, band_elements // (4 * width * self.conv.out_channels))  # rows of the small
        larger = []

        def make(band: Tensor, above: Tensor | None, below: Tensor | None) -> Tensor:
            window = _window_like(band)
            torch.add(band, bias, out=window[:, :, 1:-1])
            for row, edge in ((window[:, :, :1], above), (window[:, :, -1:], below)):
                row.zero_() if edge is None else torch.add(edge, bias, out=row)
            return window

        for band, window in _windows(picture.bands, make):
            for top in range(0, band.shape[2], step):
                larger.append(self._double(window[:, :, top : top + step + 2]))
            del band, window
        return Picture(larger, _bias(self.conv))

    def _double(self, window: Tensor) -> Tensor:
        """[1, channels, rows + 2, width] -> [1, out channels, 2 rows, 2 width], channels_last."""
        kinds = F.conv2d(window, self.weight, padding=(0, 1))  # [1, 4 out, rows + 1, width + 1]
        kinds = kinds.contiguous(memory_format=torch.channels_last)  # which it is already
        rows, width, out = window.shape[2] - 2, window.shape[3], self.conv.out_channels
        # In memory: row, column, kind of row, kind of column, channel. An odd row's values lie one
        # row further down, an odd column's one to the right.
        pixel, row = 4 * out, 4 * out * (width + 1)
        larger = kinds.as_strided(
            (rows, 2, width, 2, out), (row, row + 2 * out, pixel, pixel + out, 1)
        )
        return larger.reshape(1, 2 * rows, 2 * width, out).permute(0, 3, 1, 2)


def _phases(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """A kernel's three taps along `dim`, as the two that an even and an odd output pixel sees."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)


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
    tokens = normed[0].permute(1, 2, 0).flatten(0, 1)  # [pixels, channels]
    queries = block.to_q(tokens) @ block.to_k.weight
    mixed = block.to_v(pixel_attention(queries, tokens))
    last: nn.Linear = block.to_out[0]
    x.add_(F.linear(mixed, last.weight).T.reshape(x.shape))
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
