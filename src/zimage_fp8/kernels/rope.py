"""Rotary position embedding over three axes (caption position, row, column), interleaved pairs."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
