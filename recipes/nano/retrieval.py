"""Which object is drawn? The nearest of all, by colours averaged over a coarse grid.

A picture is averaged to 32x32 cells and compared (squared distance) with every object on the wanted
colour, at several sizes and shifts, the best of which counts. Averaging is linear, so objects are
placed and averaged once without a background, and any colour is put behind them afterwards.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.nano.scenes import (
    ONE_JITTER,
    ONE_LONGEST,
    TWO_JITTER,
    TWO_LONGEST,
    TWO_OFFSET,
    Cutouts,
    Placement,
)
from recipes.nano.shape import SIZE

CELLS = 32
BORDER = 6  # pixels
PLACED_AT_ONCE = 128


@dataclass(frozen=True)
class Search:
    """Where an object is looked for: columns of cells, sizes and shifts in pixels."""

    small: bool
    columns: slice
    longest: tuple[float, ...]
    dx: tuple[float, ...]
    dy: tuple[float, ...]


def _around(middle: float, spread: float, count: int) -> tuple[float, ...]:
    return tuple(middle + spread * (2 * i / (count - 1) - 1) for i in range(count))


def _half(middle: float, columns: slice) -> Search:
    sizes = _around(sum(TWO_LONGEST) / 2, (TWO_LONGEST[1] - TWO_LONGEST[0]) / 2, 3)
    return Search(True, columns, sizes, _around(middle, TWO_JITTER, 3), _around(0, TWO_JITTER, 3))


_SIZES = _around(sum(ONE_LONGEST) / 2, (ONE_LONGEST[1] - ONE_LONGEST[0]) / 2, 4)
_SHIFTS = _around(0, ONE_JITTER, 5)
WHOLE = Search(False, slice(0, CELLS), _SIZES, _SHIFTS, _SHIFTS)
LEFT = _half(-TWO_OFFSET, slice(0, CELLS // 2))
RIGHT = _half(TWO_OFFSET, slice(CELLS // 2, CELLS))


@torch.no_grad()
def distances(images: Tensor, colors: Tensor, search: Search, cutouts: Cutouts) -> Tensor:
    """images: [batch, 3, 256, 256] in -1..1; colors: int64 [batch]. Returns [batch, objects]."""
    cells = _average((images.float() + 1) / 2)[..., search.columns].flatten(1)
    best = torch.full((len(images), len(cutouts)), torch.inf, device=images.device)
    for rgb, alpha in _placed(search, cutouts):
        for color in colors.unique():
            chosen = colors == color
            behind = (cutouts.palette[color] / 255)[:, None, None]
            shown = (rgb + (1 - alpha) * behind).flatten(1)
            distance = torch.cdist(cells[chosen], shown)
            best[chosen] = torch.minimum(best[chosen], distance)
    return best


def ranks(distance: Tensor, objects: Tensor) -> Tensor:
    """How many objects are nearer than the right one: int64 [batch]."""
    right = distance.gather(1, objects[:, None])
    return (distance < right).sum(1)


@torch.no_grad()
def nearest_colors(images: Tensor, palette: Tensor) -> Tensor:
    """The palette colour nearest to the median of each picture's border: int64 [batch]."""
    pixels = (images.float() + 1) * 127.5
    edges = [
        pixels[:, :, :BORDER].flatten(2),
        pixels[:, :, -BORDER:].flatten(2),
        pixels[..., :BORDER].flatten(2),
        pixels[..., -BORDER:].flatten(2),
    ]
    return torch.cdist(torch.cat(edges, dim=2).median(2).values, palette).argmin(1)


def _average(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, SIZE // CELLS)


def _placed(search: Search, cutouts: Cutouts) -> Iterator[tuple[Tensor, Tensor]]:
    """All objects, averaged, at one size and shift after another: colour and coverage."""
    things = torch.arange(len(cutouts), device=cutouts.device)
    for longest, dx, dy in product(search.longest, search.dx, search.dy):
        parts = [
            _average(
                cutouts.place(
                    part,
                    Placement.at(longest, dx, dy, len(part), cutouts.device),
                    small=search.small,
                )
            )
            for part in things.split(PLACED_AT_ONCE)
        ]
        cells = torch.cat(parts)[..., search.columns]
        yield cells[:, :3], cells[:, 3:]
