"""Random codes and scales for tests of matrix products."""

import torch
from torch import Tensor

from zimage_fp8.kernels.activation import Activation
from zimage_fp8.numerics import amax, quantize, scale_of


def operands(
    rows: int, columns: int, depth: int, format: str, *, vectors: bool, device: str = "cpu"
) -> tuple[Activation, Tensor, Tensor]:
    """x [rows, depth], weight [columns, depth] and the weight's scale; vectors: a scale per row of
    both, else one each."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=generator).to(device)
    weight = torch.randn(columns, depth, generator=generator).to(device)
    x_scale = scale_of(amax(x, per_row=vectors), format)
    w_scale = scale_of(amax(weight, per_row=vectors), format)
    q = Activation(quantize(x, x_scale, format), x_scale)
    return q, quantize(weight, w_scale, format), w_scale.squeeze(-1)
