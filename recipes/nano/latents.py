"""Latents and captions to train on, kept on the device and replaced oldest first."""

import time

import torch
from torch import Tensor

from recipes.nano.autoencoder import Codec
from recipes.nano.rows import RowQueue, Rows
from recipes.nano.scenes import Cutouts
from recipes.nano.shape import LATENT_CHANNELS, LATENT_SIZE, LONG, SHORT, Shape
from recipes.nano.tokenizer import VARIANTS


class LatentCache:
    """A ring of rows; each holds one picture's latent and several captions of both buckets."""

    def __init__(self, shape: Shape, codec: Codec, cutouts: Cutouts, queue: RowQueue) -> None:
        self.codec, self.cutouts, self.queue = codec, cutouts, queue
        rows, device = shape.cache_rows, cutouts.device
        self.chunk = shape.chunk
        side = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
        self.latents = torch.zeros(rows, *side, device=device, dtype=codec.dtype)
        self.ids = {
            bucket: torch.zeros(rows, VARIANTS, bucket, device=device, dtype=torch.int16)
            for bucket in (SHORT, LONG)
        }
        self.written = 0  # rows ever; the ring's position is this modulo its size
        self.chunk_s = 0.0

    @property
    def filled(self) -> int:
        return min(self.written, len(self.latents))

    def fill(self, rows: int) -> None:
        """Write the first rows, and time a chunk to budget later ones."""
        self.refresh()
        self._wait()
        begun, before = time.monotonic(), self.written
        while self.written < rows:
            self.refresh()
        self._wait()
        chunks = max(1, (self.written - before) // self.chunk)
        self.chunk_s = (time.monotonic() - begun) / chunks

    def refresh(self) -> None:
        """Replace the oldest chunk of rows."""
        rows, device = self.queue.next(), self.latents.device
        at = self.written % len(self.latents)
        place = slice(at, at + self.chunk)
        self.latents[place] = self.codec.encode(self._draw(rows)).to(self.latents.dtype)
        self.ids[SHORT][place] = _to_device(torch.from_numpy(rows.short), device)
        self.ids[LONG][place] = _to_device(torch.from_numpy(rows.long), device)
        self.written += self.chunk

    def next_images(self) -> Tensor:
        """One chunk's pictures, to compile the encoder with."""
        return self._draw(self.queue.next())

    def _draw(self, rows: Rows) -> Tensor:
        """Always of one size and layout: another would be another compilation."""
        scenes = _to_device(torch.from_numpy(rows.scenes), self.latents.device)
        images = self.cutouts.draw(scenes, rows.num_one)
        return images.contiguous(memory_format=torch.channels_last)

    def batch(self, size: int, bucket: int, without_prompt: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 latents and int64 ids, drawn at random; each row one of its captions.

        `without_prompt`: int64 [bucket], ids of the empty prompt, taken by 3 % of a short batch.
        """
        device = self.latents.device
        rows = torch.randint(self.filled, (size,), device=device)
        variants = torch.randint(VARIANTS, (size,), device=device)
        ids = self.ids[bucket][rows, variants].long()
        if bucket == SHORT:
            is_empty = torch.rand(size, 1, device=device) < 0.03
            ids = torch.where(is_empty, without_prompt, ids)
        return self.latents[rows].float(), ids

    def _wait(self) -> None:
        if self.latents.is_cuda:
            torch.cuda.synchronize()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Without waiting for queued work, which a copy from ordinary memory would do."""
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
