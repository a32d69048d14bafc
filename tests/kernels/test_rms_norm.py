"""The norms against fp64."""

import torch

from compare import relative_error
from zimage_fp8.kernels import rms_norm, rms_norm_scaled, swiglu


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


def test_rms_norm_and_its_scaled_form() -> None:
    x, weight = torch.randn(2, 7, 100), torch.randn(100)
    scale = 1 + torch.randn(2, 1, 100)
    assert relative_error(rms_norm(x, weight, 1e-5), exact(x, weight)) < 2e-7
    scaled = rms_norm_scaled(x, weight, scale, 1e-5)
    assert relative_error(scaled, exact(x, weight) * scale) < 2e-7


def test_bf16_is_rounded_once() -> None:
    x, weight = torch.randn(4, 3, 64).to(torch.bfloat16), torch.randn(64).to(torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 1e-5), exact(x, weight).to(torch.bfloat16))


def test_swiglu_is_rounded_once_in_bf16() -> None:
    w13 = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    gate, value = w13.double().chunk(2, dim=-1)
    expected = (gate * torch.sigmoid(gate) * value).to(torch.bfloat16)
    assert torch.equal(swiglu(w13), expected)


def test_swiglu_gates_the_second_half_with_the_first() -> None:
    gate, value = torch.randn(3, 5), torch.randn(3, 5)
    expected = gate * torch.sigmoid(gate) * value
    assert relative_error(swiglu(torch.cat([gate, value], dim=-1)), expected) < 2e-7
