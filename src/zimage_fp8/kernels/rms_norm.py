"""Root-mean-square normalization, alone and with the adaLN scale that follows it."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) · weight` over the last axis.

    x: [..., dim], weight: [dim]. Everything in fp32, one rounding to x's dtype at the end
    (diffusers rounds once more, before the weight: a BF16 ulp, nothing in fp32).
    """
    return _rms_norm_fp32(x, weight, eps).to(x.dtype)


def rms_norm_scaled(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`rms_norm(x) · scale`, the input of a modulated projection, rounded once.

    x: [batch, tokens, dim], weight: [dim], scale: [batch, 1, dim] (adaLN's `1 + scale`).
    """
    return (_rms_norm_fp32(x, weight, eps) * scale.float()).to(x.dtype)


def _rms_norm_fp32(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()
