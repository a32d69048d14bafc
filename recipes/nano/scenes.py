"""Pictures: objects cut out, placed, and laid on a plain colour, on whatever device trains.

Sizes. A single object's longest side is 180 to 208 pixels, its centre within 8 pixels of the
middle: less freedom than a photograph's, so that a few million looks suffice for sharp pictures.
Two objects are 100 to 112 pixels, centred 62 pixels left and right of the middle, within 4.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from recipes.nano.captions import RGB, Thing
from recipes.nano.shape import SIZE

ONE_LONGEST, ONE_JITTER = (180.0, 208.0), 8.0
TWO_LONGEST, TWO_JITTER, TWO_OFFSET = (100.0, 112.0), 4.0, 62.0
# Each cut-out is kept at two sizes, near those it is drawn at: resampling stays close to 1:1.
LARGE, SMALL = (256, 208), (128, 106)  # canvas, longest side


@dataclass(frozen=True)
class Placement:
    """Longest side and centre offset from the middle, in pixels: [batch] each."""

    longest: Tensor
    dx: Tensor
    dy: Tensor

    @classmethod
    def at(cls, longest: float, dx: float, dy: float, batch: int, device: torch.device):
        values = torch.tensor([longest, dx, dy], device=device)[:, None].expand(3, batch)
        return cls(*values)


def between(low: float, high: float, batch: int, device: torch.device) -> Tensor:
    return torch.empty(batch, device=device).uniform_(low, high)


class Cutouts:
    """Every object without background, uint8 [things, 4, side, side]."""

    def __init__(self, data: Path, things: list[Thing], device: torch.device) -> None:
        blob = (data / "pictures.bin").read_bytes()
        with ThreadPoolExecutor() as pool:
            decoded = list(
                pool.map(lambda t: _decode(blob[t.offset : t.offset + t.length]), things)
            )
        self.device = device
        self.large = torch.from_numpy(np.stack([large for large, _ in decoded])).to(device)
        self.small = torch.from_numpy(np.stack([small for _, small in decoded])).to(device)
        self.palette = torch.from_numpy(RGB).to(device)

    def __len__(self) -> int:
        return len(self.large)

    def mean_rgb(self) -> np.ndarray:
        """Mean colour of each object, 0..255, from its small cut-out: [things, 3]."""
        pixels = self.small.cpu().double()
        alpha = pixels[:, 3:]
        mean = (pixels[:, :3] * alpha).sum((2, 3)) / alpha.sum((2, 3))
        return mean.numpy()

    def place(self, things: Tensor, at: Placement, *, small: bool) -> Tensor:
        """Premultiplied RGBA in 0..1, [batch, 4, 256, 256], of things (int64 [batch])."""
        cutouts, (canvas, longest) = (self.small, SMALL) if small else (self.large, LARGE)
        source = cutouts[things].float() / 255
        source = torch.cat([source[:, :3] * source[:, 3:], source[:, 3:]], dim=1)
        zoom = longest / at.longest * SIZE / canvas
        theta = torch.zeros(len(things), 2, 3, device=self.device)
        theta[:, 0, 0] = theta[:, 1, 1] = zoom
        theta[:, 0, 2] = -at.dx / (SIZE / 2) * zoom
        theta[:, 1, 2] = -at.dy / (SIZE / 2) * zoom
        grid = F.affine_grid(theta, [len(things), 4, SIZE, SIZE], align_corners=False)
        # bicubic: bilinear sampling between pixels softens the very edges we want learned
        drawn = F.grid_sample(source, grid, mode="bicubic", align_corners=False)
        alpha = drawn[:, 3:].clamp(0, 1)
        return torch.cat([torch.minimum(drawn[:, :3].clamp(min=0), alpha), alpha], dim=1)

    def on_color(self, layers: list[Tensor], rgb: Tensor) -> Tensor:
        """Layers from back to front on rgb (0..255, [batch, 3]): [batch, 3, 256, 256] in -1..1."""
        image = (rgb / 255)[:, :, None, None]
        for layer in layers:
            image = layer[:, :3] + image * (1 - layer[:, 3:])
        return image * 2 - 1

    def one(self, things: Tensor, colors: Tensor) -> Tensor:
        """Single objects, placed as captions' pictures are."""
        batch = len(things)
        at = Placement(
            between(*ONE_LONGEST, batch, self.device),
            between(-ONE_JITTER, ONE_JITTER, batch, self.device),
            between(-ONE_JITTER, ONE_JITTER, batch, self.device),
        )
        return self.on_color([self.place(things, at, small=False)], self.palette[colors])

    def two(self, left: Tensor, right: Tensor, colors: Tensor) -> Tensor:
        """Two objects side by side."""
        layers = []
        for things, middle in ((left, -TWO_OFFSET), (right, TWO_OFFSET)):
            batch = len(things)
            at = Placement(
                between(*TWO_LONGEST, batch, self.device),
                between(middle - TWO_JITTER, middle + TWO_JITTER, batch, self.device),
                between(-TWO_JITTER, TWO_JITTER, batch, self.device),
            )
            layers.append(self.place(things, at, small=True))
        return self.on_color(layers, self.palette[colors])

    def draw(self, scenes: Tensor, num_one: int) -> Tensor:
        """scenes: int64 [batch, 3] of first, second, colour; the first `num_one` are single."""
        first, second, colors = scenes.unbind(1)
        one = self.one(first[:num_one], colors[:num_one])
        two = self.two(first[num_one:], second[num_one:], colors[num_one:])
        return torch.cat([one, two])

    def varied(self, batch: int) -> tuple[Tensor, Tensor]:
        """What the autoencoder trains on: any size, place and colour, mirrored at will.

        Returns images [batch, 3, 256, 256] in -1..1 and their coverage [batch, 1, 256, 256].
        """
        num_two = batch // 5
        num_one = batch - num_two
        longest = between(130, 224, num_one, self.device)
        room = (SIZE / 2 - longest / 2).clamp(max=28)
        at = Placement(
            longest,
            between(-1, 1, num_one, self.device) * room,
            between(-1, 1, num_one, self.device) * room,
        )
        layer = self.place(self._any(num_one), at, small=False)
        mirrored = torch.rand(num_one, 1, 1, 1, device=self.device) < 0.5
        layer = torch.where(mirrored, layer.flip(3), layer)
        images, cover = [self.on_color([layer], self._any_rgb(num_one))], [layer[:, 3:]]
        if num_two:
            pair = [
                self.place(self._any(num_two), self._loose(middle, num_two), small=True)
                for middle in (-TWO_OFFSET, TWO_OFFSET)
            ]
            images.append(self.on_color(pair, self._any_rgb(num_two)))
            cover.append(torch.maximum(pair[0][:, 3:], pair[1][:, 3:]))
        return torch.cat(images), torch.cat(cover)

    def _any(self, batch: int) -> Tensor:
        return torch.randint(len(self), (batch,), device=self.device)

    def _any_rgb(self, batch: int) -> Tensor:
        named = self.palette[torch.randint(len(RGB), (batch,), device=self.device)]
        free = between(0, 255, 3 * batch, self.device).view(batch, 3)
        return torch.where(torch.rand(batch, 1, device=self.device) < 0.3, free, named)

    def _loose(self, middle: float, batch: int) -> Placement:
        return Placement(
            between(90, 118, batch, self.device),
            between(middle - 6, middle + 6, batch, self.device),
            between(-20, 20, batch, self.device),
        )


def _decode(picture: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The picture cropped to what is visible, centred on the large and the small canvas."""
    image = Image.open(BytesIO(picture)).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox())
    return _centred(image, *LARGE), _centred(image, *SMALL)


def _centred(image: Image.Image, canvas: int, longest: int) -> np.ndarray:
    zoom = longest / max(image.size)
    width, height = (max(1, round(side * zoom)) for side in image.size)
    out = Image.new("RGBA", (canvas, canvas), (0, 0, 0, 0))
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    out.paste(resized, ((canvas - width) // 2, (canvas - height) // 2))
    return np.asarray(out).transpose(2, 0, 1).copy()
