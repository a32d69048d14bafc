"""GroupNorm and SiLU: the reference against fp64, Triton's kernels against the reference.

The kernels run in Triton's interpreter on the CPU, and on a GPU where there is one.
"""

import pytest
import torch
from torch import Tensor

from compare import relative_error, same_bits
from zimage_fp8.kernels.group_norm import (
    Normalization,
    group_moments,
    group_moments_reference,
    group_moments_triton,
    group_norm,
    normalize_reference,
    normalize_triton,
    normalize_window_reference,
    normalize_window_triton,
)
from zimage_fp8.kernels.language import HAS_TRITON

EPS = 1e-6
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (channels, groups, height, width): groups of 1, 4, 8 and 12 channels, odd numbers of pixels.
SMALL = [
    (32, 8, 7, 9),
    (64, 8, 16, 16),
    (96, 8, 5, 13),
    (96, 32, 1, 3),
    (8, 8, 3, 1),
    (6, 2, 3, 67),
]
LARGE = [(128, 32, 1024, 1024), (256, 32, 513, 77), (512, 32, 128, 64), (512, 32, 31, 33)]


def picture(
    channels: int, height: int, width: int, *, batch: int = 1, device: str = "cpu"
) -> Tensor:
    generator = torch.Generator(device).manual_seed(channels + height)
    x = torch.randn(batch, channels, height, width, generator=generator, device=device) * 2 + 0.5
    x[:, channels // 2] *= 20  # a channel that stands out
    return x.contiguous(memory_format=torch.channels_last)


def affine(channels: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(channels, generator=generator, device=device) + 1
    return weight, torch.randn(channels, generator=generator, device=device)


def exact(x: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool) -> Tensor:
    y = torch.nn.functional.group_norm(x.double(), groups, weight.double(), bias.double(), EPS)
    return torch.nn.functional.silu(y) if silu else y


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "groups", "height", "width"), SMALL)
def test_the_reference_is_group_norm(
    channels: int, groups: int, height: int, width: int, silu: bool
) -> None:
    x, (weight, bias) = picture(channels, height, width, batch=2), affine(channels)
    found = group_norm(x, weight, bias, groups, EPS, silu=silu)
    assert relative_error(found, exact(x, weight, bias, groups, silu)) < 3e-7
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_bf16_is_rounded_once() -> None:
    x, (weight, bias) = picture(32, 9, 9).bfloat16(), affine(32)
    found = group_norm(x, weight, bias, 8, EPS, silu=True)
    differ = found != exact(x, weight, bias, 8, True).bfloat16()
    assert differ.float().mean() < 1e-3  # fp32 against fp64, next to a rounding boundary


@pytest.mark.parametrize("device", DEVICES)
def test_a_large_mean_does_not_spoil_the_variance(device: str) -> None:
    """Mean 1000, deviation 1: `E[x²] − E[x]²` in fp32 would lose the variance's digits."""
    x = picture(8, 40, 50, device=device)[:, :3].repeat(1, 8, 1, 1) + 1000
    x = x.contiguous(memory_format=torch.channels_last)
    run = group_moments_triton if HAS_TRITON else group_moments_reference
    _, inv_std = run([x], 2, EPS)
    expected = x.double().unflatten(1, (2, 12)).flatten(2).var(-1, correction=0).rsqrt()
    assert relative_error(inv_std, expected) < 1e-5


def test_a_shift_is_added_before_anything_else() -> None:
    x, (weight, bias) = picture(32, 9, 7), affine(32)
    shift = torch.linspace(-3, 3, 32)
    moments = group_moments([x], 8, EPS, shift)
    found = normalize_reference(x, Normalization(moments, weight, bias, True, shift))
    expected = exact(x + shift[:, None, None], weight, bias, 8, True)
    assert relative_error(found, expected) < 3e-7


def test_bands_have_the_moments_of_the_whole() -> None:
    x = picture(32, 30, 11, batch=2)
    bands = [x[:, :, :1], x[:, :, 1:20], x[:, :, 20:]]
    assert relative_error(group_moments(bands, 8, EPS), group_moments([x], 8, EPS)) < 1e-6


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("channels", "groups", "height", "width"), SMALL)
def test_kernels_equal_the_reference(
    channels: int, groups: int, height: int, width: int, device: str
) -> None:
    x, (weight, bias) = (
        picture(channels, height, width, batch=2, device=device),
        affine(channels, device),
    )
    cut = (height + 1) // 2
    bands = [x[:, :, :cut], x[:, :, cut:]] if height > 1 else [x]
    for shift in (None, bias * 3):
        moments = group_moments_triton(bands, groups, EPS, shift)
        assert relative_error(moments, group_moments_reference([x], groups, EPS, shift)) < 1e-6
        for silu in (False, True):
            by = Normalization(moments, weight, bias, silu, shift)
            expected = normalize_reference(x, by)
            assert relative_error(normalize_triton(x, by), expected) < 1e-6


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_above", [False, True])
@pytest.mark.parametrize("has_below", [False, True])
@pytest.mark.parametrize(("channels", "height", "width"), [(32, 12, 7), (96, 5, 61), (6, 4, 1)])
def test_windows_equal_the_reference(
    channels: int, height: int, width: int, has_below: bool, has_above: bool, device: str
) -> None:
    x, (weight, bias) = (
        picture(channels, height, width, batch=2, device=device),
        affine(channels, device),
    )
    moments = group_moments_reference([x], 2, EPS)
    by = Normalization(moments, weight, bias, True, bias * 3)
    above, band, below = x[:, :, :1], x[:, :, 1:-1], x[:, :, -1:]
    rows = (band, above if has_above else None, below if has_below else None)
    found, expected = normalize_window_triton(*rows, by), normalize_window_reference(*rows, by)
    assert relative_error(found, expected) < 1e-6
    whole = normalize_reference(x, by)
    assert torch.equal(
        expected[:, :, :1], whole[:, :, :1] if has_above else torch.zeros_like(above)
    )
    assert torch.equal(expected[:, :, 1:-1], whole[:, :, 1:-1])
    assert (found[:, :, -1] == 0).all() != has_below
    assert found.is_contiguous(memory_format=torch.channels_last)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("channels", "groups", "height", "width"), [*SMALL, *LARGE])
def test_bf16_on_the_gpu(channels: int, groups: int, height: int, width: int, silu: bool) -> None:
    x = picture(channels, height, width, device="cuda").bfloat16()
    weight, bias = (it.bfloat16() for it in affine(channels, "cuda"))
    found = group_norm(x, weight, bias, groups, EPS, silu=silu)
    moments = group_moments_reference([x], groups, EPS)
    expected = normalize_reference(x, Normalization(moments, weight, bias, silu))
    torch.testing.assert_close(found, expected, rtol=1 / 128, atol=1e-5)
    assert (found != expected).float().mean() < 1e-3
    same_bits(group_norm(x, weight, bias, groups, EPS, silu=silu), found)
