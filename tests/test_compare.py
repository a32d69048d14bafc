"""A yardstick that cannot fail measures nothing: each is seen failing here."""

import math

import pytest
import torch

from compare import relative_error, same_bits, sqnr_db, worst_channel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_same_bits_names_the_first_difference(dtype: torch.dtype) -> None:
    expected = torch.arange(6).reshape(2, 3).to(dtype)
    actual = expected.clone()
    same_bits(actual, expected)
    actual[1, 1] = 7
    with pytest.raises(AssertionError, match=r"1 of 6 .* index 4 = \(1, 1\): 7.*expected 4"):
        same_bits(actual, expected)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.tensor([math.nan]), torch.tensor([0.0])),
    ],
)
def test_same_bits_forgives_nothing(actual: torch.Tensor, expected: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        same_bits(actual, expected)


def test_same_bits_takes_scalars_and_nan() -> None:
    same_bits(torch.tensor(math.nan), torch.tensor(math.nan))


def test_relative_error_and_sqnr_agree() -> None:
    expected = torch.tensor([3.0, 4.0])
    actual = torch.tensor([3.0, 4.05])
    assert relative_error(actual, expected) == pytest.approx(0.01, rel=1e-5)
    assert sqnr_db(actual, expected) == pytest.approx(40, abs=1e-4)
    assert sqnr_db(expected, expected) == math.inf


def test_worst_channel_sees_what_the_average_hides() -> None:
    expected = torch.tensor([[100.0, 1.0], [100.0, 1.0]])
    actual = torch.tensor([[100.0, 2.0], [100.0, 2.0]])
    assert worst_channel(actual, expected) == 1.0
    assert worst_channel(actual, expected, dim=0) < 0.02


@pytest.mark.parametrize("yardstick", [relative_error, sqnr_db, worst_channel])
def test_nan_is_never_a_small_error(yardstick) -> None:
    with pytest.raises(AssertionError, match="actual holds NaN"):
        yardstick(torch.tensor([math.nan]), torch.tensor([1.0]))
