"""The 8-bit matrix product against its reference, every combination of scale shapes."""

import pytest
import torch

from compare import same_bits, sqnr_db
from zimage_fp8.kernels.scaled_mm import scaled_mm, scaled_mm_reference
from zimage_fp8.numerics import DTYPE


@pytest.mark.parametrize("rows", [1, 63])
@pytest.mark.parametrize("columns", [64, 2048])  # 2,048 · 127² passes 2^24: fp32 sums would round
def test_int8_sums_exactly(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(100, 128, (rows, columns), generator=generator).to(torch.int8)
    weight = torch.randint(100, 128, (96, columns), generator=generator).to(torch.int8)
    one = torch.ones(rows, 1)
    total = (q.double() @ weight.double().T).float()
    same_bits(scaled_mm(q, one, weight, torch.ones(96), torch.float32), total)
    scale, weight_scale = torch.rand(rows, 1) + 0.1, torch.rand(96) + 0.1
    got = scaled_mm(q, scale, weight, weight_scale, torch.bfloat16)
    same_bits(got, (total * scale * weight_scale).to(torch.bfloat16))
    arguments = (q, scale, weight, weight_scale, torch.float32)
    assert sqnr_db(scaled_mm(*arguments), scaled_mm_reference(*arguments)) > 120


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
        out_dtype = torch.bfloat16  # what a GPU is asked for
        same_bits(got, torch._scaled_mm(q, weight.T, scale, weight_scale, out_dtype=out_dtype))
