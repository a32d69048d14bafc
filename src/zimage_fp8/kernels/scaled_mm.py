"""The 8-bit matrix product: codes times codes, scaled once per output element."""

import torch
from torch import Tensor

from zimage_fp8.numerics import DTYPE, dequantize


def scaled_mm_reference(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """What `scaled_mm` computes: dequantize in fp32, multiply, round once."""
    x_hat = dequantize(q, scale)
    weight_hat = dequantize(weight, _column(weight_scale))
    return (x_hat @ weight_hat.T).to(dtype)


def scaled_mm(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """`(q · scale) @ (weight · weight_scale).T` on 8-bit codes.

    q: [tokens, in]; scale: fp32 [] or [tokens, 1]; weight: [out, in]; weight_scale: fp32 [] or
    [out]. Returns [tokens, out] in `dtype`. On the CPU E4M3 is the reference itself, which equals
    `torch._scaled_mm` there bit for bit in BF16 under two scalars. INT8 sums exactly, in int32,
    then multiplies by `scale` and by `weight_scale` in fp32 and rounds once.
    """
    if q.dtype == DTYPE["int8"]:
        total = torch._int_mm(q, weight.T)
        return (total.float() * scale * weight_scale).to(dtype)
    # Not `_scaled_mm`: on CPUs with AVX-512 FP16 (measured on a Xeon with AMX, torch 2.13) oneDNN
    # takes two scalars and emulates E4M3 in plain loops: 5 s for [288, 384] x [384, 384], where
    # this takes milliseconds. Vectors it takes only from PyTorch 2.12 on.
    if not q.is_cuda:
        return scaled_mm_reference(q, scale, weight, weight_scale, dtype)
    # PyTorch's row-wise products are made for BF16; anything else is scaled here, and rounded once.
    if (scale.ndim or weight_scale.ndim) and dtype != torch.bfloat16:
        one = torch.ones((), device=q.device)
        total = torch._scaled_mm(q, weight.T, one, one, out_dtype=torch.float32)
        return (total * scale * weight_scale).to(dtype)
    if scale.ndim or weight_scale.ndim:
        scale = _vector(scale, len(q))[:, None]  # two scalars or two vectors, nothing between
        weight_scale = _vector(weight_scale, len(weight))[None]
    return torch._scaled_mm(q, weight.T, scale, weight_scale, out_dtype=dtype)


def _vector(scale: Tensor, length: int) -> Tensor:
    return scale.reshape(-1).expand(length).clone(memory_format=torch.contiguous_format)


def _column(weight_scale: Tensor) -> Tensor:
    return weight_scale[:, None] if weight_scale.ndim else weight_scale
