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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_its_reference(
    rows: int, token_scale: bool, row_scale: bool, dtype: torch.dtype
) -> None:
    q, weight = codes(rows, 64, seed=0), codes(96, 64, seed=1)
    scale = torch.rand(rows, 1) + 0.1 if token_scale else torch.tensor(0.37)
    weight_scale = torch.rand(96) + 0.1 if row_scale else torch.tensor(0.011)
    arguments = (q, scale, weight, weight_scale, dtype)
    same_bits(scaled_mm(*arguments), scaled_mm_reference(*arguments))


def test_the_reference_is_what_torch_computes() -> None:
    """So that a machine without a GPU tests the arithmetic that a GPU runs."""
    q, weight = codes(63, 64, seed=0), codes(96, 64, seed=1)
    scale, weight_scale = torch.tensor(0.37), torch.tensor(0.011)
    got = torch._scaled_mm(q, weight.T, scale, weight_scale, out_dtype=torch.bfloat16)
    same_bits(got, scaled_mm_reference(q, scale, weight, weight_scale, torch.bfloat16))


def test_a_product_on_the_cpu_takes_no_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs oneDNN emulates E4M3 under two scalars in plain loops: 5 s for this product."""
    monkeypatch.setattr(torch, "_scaled_mm", None)
    q, weight = codes(288, 384, seed=0), codes(384, 384, seed=1)
    assert (
        scaled_mm(q, torch.tensor(0.37), weight, torch.tensor(0.011), torch.bfloat16)
        .isfinite()
        .all()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["e4m3", "int8"])
@pytest.mark.parametrize("token_scale", [False, True])
@pytest.mark.parametrize("row_scale", [False, True])
@pytest.mark.parametrize(("dtype", "least_db"), [(torch.bfloat16, 50), (torch.float32, 60)])
def test_a_gpu_takes_every_combination(
    format: str, token_scale: bool, row_scale: bool, dtype: torch.dtype, least_db: float
) -> None:
    q, weight = codes(63, 64, seed=0), codes(96, 64, seed=1)
    if format == "int8":
        q, weight = ((x.float() / 4).to(torch.int8) for x in (q, weight))
    scale = torch.rand(63, 1) + 0.1 if token_scale else torch.tensor(0.37)
    weight_scale = torch.rand(96) + 0.1 if row_scale else torch.tensor(0.011)
    arguments = (q, scale, weight, weight_scale)
    got = scaled_mm(*(x.cuda() for x in arguments), dtype).cpu()
    assert got.dtype == dtype
    assert sqnr_db(got, scaled_mm_reference(*arguments, dtype)) > least_db
