"""A linear layer whose weight is stored, and multiplied, in 8 bits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zimage_fp8.kernels import scaled_mm
from zimage_fp8.kernels.rotate import rotate
from zimage_fp8.numerics import QuantSpec, amax, quantize, rotation_group, scale_of


class QuantLinear(nn.Module):
    """`y = scaled_mm(quantize(x), weight)`; no bias, as no quantizable linear of Z-Image has one.

    Buffers carry their names on disk: weight [out, in] in 8 bits, its rows rotated when the spec
    rotates; weight_scale fp32 [] or [out]; input_scale fp32 [] for static activations, None for
    scales computed per token.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self, spec: QuantSpec, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_scale", input_scale)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] in any float dtype. Returns [..., out] in x's dtype."""
        tokens = rotated(x.reshape(-1, x.shape[-1]), self.spec)
        scale = self.input_scale
        if scale is None:
            scale = scale_of(amax(tokens, per_row=True), self.spec.format)
        q = quantize(tokens, scale, self.spec.format)
        out = scaled_mm(q, scale, self.weight, self.weight_scale, x.dtype)
        return out.reshape(*x.shape[:-1], -1)


def rotated(x: Tensor, spec: QuantSpec) -> Tensor:
    """x [..., in], inputs or weights, as the spec quantizes them: rotated in fp32, or as they are.

    Both sides of the product turn by one orthogonal, symmetric matrix, so the product stays.
    """
    return rotate(x, rotation_group(x.shape[-1])) if spec.rotate else x


def weight_scales(amaxes: Sequence[Tensor], spec: QuantSpec) -> list[Tensor]:
    """The scale of every member of a fused group, from each member's amax ([] or [out, 1]).

    Per tensor, members share the largest: then a loader that fuses them (vLLM does) need not
    requantize, and ours is bit-exact. Sharing costs E4M3, a float, nothing.
    """
    if spec.weight == "per-channel":
        return [scale_of(value, spec.format).squeeze(-1) for value in amaxes]
    shared = scale_of(torch.stack(list(amaxes)).amax(), spec.format)
    return [shared] * len(amaxes)


def weight_amax(weight: Tensor, spec: QuantSpec) -> Tensor:
    """amax of a weight, rotated if the spec says so, at its granularity: [] or [out, 1]."""
    return amax(rotated(weight, spec), per_row=spec.weight == "per-channel")


def quantize_weight(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of weight [out, in], rotated if the spec says so, under scale [] or [out]."""
    return quantize(rotated(weight, spec), scale[:, None] if scale.ndim else scale, spec.format)
