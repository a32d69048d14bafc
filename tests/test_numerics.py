"""The one formula, on cases whose answer is known without running it."""

import math

import pytest
import torch

from compare import same_bits
from zimage_fp8.numerics import (
    AMAX_FLOOR,
    DTYPE,
    QMAX,
    amax,
    dequantize,
    quantize,
    rotation_group,
    scale_of,
)

E4M3 = DTYPE["e4m3"]


def codes(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).to(E4M3)


def test_the_largest_value_becomes_the_largest_code() -> None:
    x = torch.tensor([-3.0, 0.5, 1.0])
    scale = scale_of(amax(x), "e4m3")
    assert scale.item() == torch.tensor(3.0 / 448.0).item()
    same_bits(quantize(x, scale, "e4m3")[0], codes(-448.0)[0])


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.0, 0.0),
        (-0.0, -0.0),
        (448.0, 448.0),
        (-448.0, -448.0),
        (1e9, 448.0),  # clamped, never NaN
        (-math.inf, -448.0),
        (17.0, 16.0),  # 16 and 18 are neighbours: the tie goes to the even mantissa
        (19.0, 20.0),
        (2.0**-9, 2.0**-9),  # the smallest subnormal
        (2.0**-10, 0.0),  # half of it: ties to even, which is zero
        (2.0**-10 * 1.01, 2.0**-9),
    ],
)
def test_codes_at_scale_one(x: float, expected: float) -> None:
    same_bits(quantize(torch.tensor([x]), torch.tensor(1.0), "e4m3"), codes(expected))


def test_nan_stays_nan() -> None:
    q = quantize(torch.tensor([math.nan, 1.0]), torch.tensor(1.0), "e4m3")
    assert q.float().isnan().tolist() == [True, False]


def test_a_tensor_of_zeros_has_a_scale_that_divides() -> None:
    scale = scale_of(amax(torch.zeros(4)), "e4m3")
    assert scale.item() == pytest.approx(AMAX_FLOOR / QMAX["e4m3"])
    same_bits(quantize(torch.zeros(4), scale, "e4m3"), codes(0, 0, 0, 0))


def test_the_division_happens_in_fp32_for_bf16_inputs() -> None:
    """Dividing in BF16 rounds twice; a counterexample where that moves the code."""
    x = (torch.randn(4096, generator=torch.Generator().manual_seed(3)) * 0.02).to(torch.bfloat16)
    scale = scale_of(amax(x), "e4m3")
    in_bf16 = (x / scale).float()  # BF16 over a 0-dim fp32 stays BF16
    assert (x / scale).dtype == torch.bfloat16
    in_bf16 = in_bf16.clamp(-448, 448).to(E4M3)
    in_fp32 = quantize(x, scale, "e4m3")
    same_bits(in_fp32, (x.double() / scale.double()).float().clamp(-448, 448).to(E4M3))
    assert (in_fp32.view(torch.uint8) != in_bf16.view(torch.uint8)).float().mean() > 0.01


def test_relative_error_is_that_of_three_mantissa_bits() -> None:
    x = torch.randn(2**16, generator=torch.Generator().manual_seed(1))
    scale = scale_of(amax(x), "e4m3")
    error = (dequantize(quantize(x, scale, "e4m3"), scale) - x).norm() / x.norm()
    assert 0.0255 < error < 0.0275  # 2.65 % on Gaussian data


def test_amax_per_row_keeps_the_row_axis() -> None:
    x = torch.tensor([[1.0, -5.0], [2.0, 0.0]], dtype=torch.bfloat16)
    found = amax(x, per_row=True)
    assert found.dtype == torch.float32
    assert found.tolist() == [[5.0], [2.0]]


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.5, 0),  # ties go to the even code
        (1.5, 2),
        (2.5, 2),
        (-0.5, 0),
        (-1.5, -2),
        (0.51, 1),
        (126.5, 126),
        (127.0, 127),
        (-128.0, -127),  # the grid is symmetric: -128 is never used
        (1e9, 127),
        (-math.inf, -127),
    ],
)
def test_int8_codes_at_scale_one(x: float, expected: int) -> None:
    q = quantize(torch.tensor([x]), torch.tensor(1.0), "int8")
    assert q.dtype == torch.int8
    assert q.tolist() == [expected]


def test_nan_survives_in_the_scale_of_int8() -> None:
    x = torch.tensor([[math.nan, 1.0], [2.0, 1.0]])
    scale = scale_of(amax(x, per_row=True), "int8")
    x_hat = dequantize(quantize(x, scale, "int8"), scale)
    assert x_hat.isnan().all(-1).tolist() == [True, False]


def test_int8_error_is_a_share_of_the_largest_value() -> None:
    """A grid of steps `amax / 127` has an error of step / sqrt(12) rms."""
    x = torch.rand(2**16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    scale = scale_of(amax(x), "int8")
    error = (dequantize(quantize(x, scale, "int8"), scale) - x).pow(2).mean().sqrt()
    assert error == pytest.approx(1 / 127 / math.sqrt(12), rel=0.01)


@pytest.mark.parametrize(
    ("channels", "group"),
    [(3840, 256), (10240, 256), (512, 256), (192, 64), (96, 16), (48, 16), (20, 4), (15, 1)],
)
def test_rotation_groups(channels: int, group: int) -> None:
    assert rotation_group(channels) == group
