"""Rotary position embedding over three axes (caption position, row, column), interleaved pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 8  # channels whose pairs four lanes of a warp hold
PLACE_BITS = 10
PLACES = 1 << PLACE_BITS  # along an axis, what a kernel counts with


@dataclass(frozen=True)
class Rope:
    """How every token's heads are rotated.

    table: fp32 [tokens, head_dim / 2, 2], of `rope_table`. The same by axis, for a kernel that
    cannot afford to read a row per token: along: fp32 [head_dim / 16, PLACES, 4, 2, 2], the
    rotations of the four pairs of two blocks at every place of the blocks' axis; positions: int32
    [tokens], the places along three axes, the first in the lowest PLACE_BITS; both None where
    places are more than PLACES. axes: the blocks at which the second and the third axis begin.
    """

    table: Tensor
    along: Tensor | None = None
    positions: Tensor | None = None
    axes: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls, positions: Tensor, axes_dims: tuple[int, ...], theta: float, device: torch.device
    ) -> "Rope":
        """On `device`. positions: [tokens, 3] integers from 0; the rest as `rope_table`."""
        table = rope_table(positions, axes_dims, theta).to(device)
        if positions.amax() >= PLACES or any(dim % (2 * BLOCK) for dim in axes_dims):
            return cls(table)
        packed = (positions << PLACE_BITS * torch.arange(3)).sum(1).to(device, torch.int32)
        return cls(table, _along(axes_dims, theta, device), packed, first_blocks(axes_dims))


@cache  # the same for every picture, and half a megabyte
@torch.inference_mode(False)
def _along(axes_dims: tuple[int, ...], theta: float, device: torch.device) -> Tensor:
    places = torch.arange(PLACES)[:, None].expand(-1, 3)
    of_blocks = rope_table(places, axes_dims, theta).reshape(PLACES, -1, 2, BLOCK // 2, 2)
    return of_blocks.permute(1, 0, 3, 2, 4).contiguous().to(device)


def first_blocks(axes_dims: Sequence[int]) -> tuple[int, int]:
    """The blocks of eight channels at which the second and the third of three axes begin."""
    first, second, _ = axes_dims
    return first // BLOCK, (first + second) // BLOCK


def rope_table(positions: Tensor, axes_dims: Sequence[int], theta: float) -> Tensor:
    """Rotation of every pair of channels at every position.

    positions: [tokens, axes] integers; axes_dims: channels per axis, even, summing to the head
    dimension. Returns fp32 [tokens, head_dim / 2, 2] holding cos and sin. Angles are formed in
    fp64 and rounded once, as the original model does.
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
        angles.append(torch.outer(positions[:, axis].double(), theta**-exponent))
    angle = torch.cat(angles, dim=-1).float()  # [tokens, head_dim / 2]
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x [batch, tokens, heads, head_dim] by table [tokens, head_dim / 2, 2], in fp32."""
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = table[:, None].unbind(-1)  # [tokens, 1, head_dim / 2]
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
