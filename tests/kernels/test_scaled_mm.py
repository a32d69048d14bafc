"""The 8-bit matrix product against its reference, every combination of scale shapes."""

import pytest
import torch

from compare import same_bits, sqnr_db
from zimage_fp8.kernels.scaled_mm import scaled_mm, scaled_mm_reference
from zimage_fp8.numerics import DTYPE


def codes(*shape: int, seed: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 100
    return x.clamp(-448, 448).to(DTYPE["e4m3"])


@pytest.mark.parametrize("rows", [1, 63])
@pytest.mark.parametrize("token_scale", [False, True])
@pytest.mark.parametrize("row_scale", [False, True])
def test_equals_its_reference(rows: int, token_scale: bool, row_scale: bool) -> None:
    q, weight = codes(rows, 64, seed=0), codes(96, 64, seed=1)
    scale = torch.rand(rows, 1) + 0.1 if token_scale else torch.tensor(0.37)
    weight_scale = torch.rand(96) + 0.1 if row_scale else torch.tensor(0.011)
    arguments = (q, scale, weight, weight_scale)
    if row_scale or token_scale:  # the scale is applied after the sum: another order of rounding
        out = scaled_mm(*arguments, torch.float32)
        assert sqnr_db(out, scaled_mm_reference(*arguments, torch.float32)) > 120
    else:
        got = scaled_mm(*arguments, torch.bfloat16)
        same_bits(got, scaled_mm_reference(*arguments, torch.bfloat16))
