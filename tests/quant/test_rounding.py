"""Rounding by statistics: closer outputs on the inputs it knows, within the same format."""

import pytest
import torch

from compare import relative_error, same_bits, sqnr_db
from zimage_fp8.numerics import E4M3_ROW, E4M3_STATIC, INT8_ROT, QuantSpec, dequantize
from zimage_fp8.quant.linear import quantize_weight, rotated, weight_amax, weight_scales
from zimage_fp8.quant.rounding import COLUMNS, rotated_gram, round_weight

SPECS = {"static": E4M3_STATIC, "row": E4M3_ROW, "rot": INT8_ROT}


def correlated(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Inputs that share a few directions, as those of a transformer do."""
    mixing = torch.randn(width // 8, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, width // 8, generator=generator) @ mixing
    return shared + 0.3 * torch.randn(tokens, width, generator=generator)


def outputs(codes: torch.Tensor, scale: torch.Tensor, spec: QuantSpec, x: torch.Tensor):  # type: ignore[no-untyped-def]
    w_hat = dequantize(codes, scale[:, None] if scale.ndim else scale)
    return rotated(x, spec).double() @ w_hat.double().T


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_outputs_are_closer_on_inputs_it_has_not_seen(spec: QuantSpec) -> None:
    width = COLUMNS + 64  # more than one block of columns
    weight = torch.randn(48, width, generator=torch.Generator().manual_seed(1))
    seen, unseen = correlated(2000, width, seed=2), correlated(200, width, seed=3)
    (scale,) = weight_scales([weight_amax(weight, spec)], spec)
    exact = unseen.double() @ weight.double().T
    nearest = outputs(quantize_weight(weight, scale, spec), scale, spec, unseen)
    codes = round_weight(weight, scale, spec, seen.T @ seen)
    assert codes.dtype == quantize_weight(weight, scale, spec).dtype
    gain = sqnr_db(outputs(codes, scale, spec, unseen), exact) - sqnr_db(nearest, exact)
    assert gain > 11  # measured 12.4 to 12.5 dB


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_without_correlations_the_nearest_codes_are_best(spec: QuantSpec) -> None:
    """Independent inputs of one size: an error cannot be made up for by another column."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    (scale,) = weight_scales([weight_amax(weight, spec)], spec)
    codes = round_weight(weight, scale, spec, torch.eye(64))
    # The gram is rotated in fp32, so its off-diagonal is not exactly zero.
    assert (codes.float() != quantize_weight(weight, scale, spec).float()).float().mean() < 0.001


def test_a_layer_that_was_never_fed_is_rounded_to_nearest() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    (scale,) = weight_scales([weight_amax(weight, E4M3_ROW)], E4M3_ROW)
    codes = round_weight(weight, scale, E4M3_ROW, torch.zeros(32, 32))
    same_bits(codes, quantize_weight(weight, scale, E4M3_ROW))


def test_channels_that_are_always_zero_do_not_break_the_rest() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    x = correlated(500, 32, seed=2)
    x[:, 5] = 0
    (scale,) = weight_scales([weight_amax(weight, E4M3_STATIC)], E4M3_STATIC)
    codes = round_weight(weight, scale, E4M3_STATIC, x.T @ x)
    assert dequantize(codes, scale).isfinite().all()


def test_the_gram_of_rotated_inputs() -> None:
    x = correlated(100, 64, seed=4)
    turned = rotated(x, INT8_ROT)
    assert relative_error(rotated_gram(x.T @ x, INT8_ROT), turned.T @ turned) < 1e-5
