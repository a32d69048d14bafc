"""Every GEMM implementation against the reference on the same codes."""

import pytest
import torch
from torch import Tensor

from compare import relative_error, same_bits
from operands import operands
from zimage_fp8.kernels.activation import Activation
from zimage_fp8.kernels.language import HAS_TRITON
from zimage_fp8.kernels.matmul import IMPLEMENTATIONS, matmul, refusal
from zimage_fp8.kernels.scaled_mm import scaled_mm_reference
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.numerics import DTYPE

SMALL = Tile(m=32, n=32, k=32, warps=4, stages=2)
SMALL_PARTS = Tile(m=32, n=64, k=32, warps=4, stages=2, parts=2)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
SHAPES = [(37, 48, 96), (64, 112, 208)]  # edges in every direction
FULL_SIZE = [(2112, 11520, 3840), (2112, 3840, 10240), (4160, 3840, 3840), (96, 20480, 3840)]


def expected(x: Activation, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    assert x.scale is not None
    return scaled_mm_reference(x.values, x.scale, weight, scale, dtype)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "tile"),
    [("triton-tma", SMALL), ("triton-tma", SMALL_PARTS), ("triton", SMALL)],
)
@pytest.mark.parametrize("vectors", [True, False])
def test_int8_in_the_interpreter(
    name: str, tile: Tile, shape: tuple[int, int, int], vectors: bool
) -> None:
    """INT8 is exact, so the kernel must equal the exact sum scaled in the same order."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    x, weight, scale = operands(*shape, "int8", vectors=vectors)
    actual = IMPLEMENTATIONS[name](x, weight, scale, torch.float32, tile)
    total = x.values.double() @ weight.double().T
    same_bits(actual, total.float() * x.scale * scale)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FULL_SIZE)
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("name", ["triton-tma", "triton", "wgmma"])
def test_int8(name: str, vectors: bool, shape: tuple[int, int, int]) -> None:
    x, weight, scale = operands(*shape, "int8", vectors=vectors, device="cuda")
    actual = matmul(x, weight, scale, torch.bfloat16, name)
    total = (x.values[:64].double() @ weight.double().T).float()
    same_bits(actual[:64], (total * _rows(x, 64) * scale).to(torch.bfloat16))
    assert relative_error(actual, expected(x, weight, scale, torch.bfloat16)) < 3e-3


def _rows(x: Activation, count: int) -> Tensor:
    assert x.scale is not None
    return x.scale[:count] if x.scale.ndim else x.scale


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FULL_SIZE)
@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        ("cublas", False),
        ("cublas-slow", False),
        ("cublas-row", True),
        ("triton-tma", True),
        ("triton-tma", False),
        ("triton", True),
        ("wgmma", True),
        ("wgmma", False),
    ],
)
def test_e4m3(name: str, vectors: bool, shape: tuple[int, int, int]) -> None:
    """Against fp32 on the same codes. Fast accumulation keeps fewer bits: measured below 3e-3
    with the output's own rounding to BF16 (1.7e-3)."""
    x, weight, scale = operands(*shape, "e4m3", vectors=vectors, device="cuda")
    actual = matmul(x, weight, scale, torch.bfloat16, name)
    assert relative_error(actual, expected(x, weight, scale, torch.float32).float()) < 5e-3


def test_what_cannot_run_is_refused_with_the_reason() -> None:
    static, weight, scale = operands(16, 16, 32, "e4m3", vectors=False)
    rows, _, row_scale = operands(16, 16, 32, "e4m3", vectors=True)
    whole, _, whole_scale = operands(16, 16, 32, "int8", vectors=True)
    assert refusal("cublas", static, scale) is None
    assert refusal("cublas", rows, row_scale) == "it takes BF16, or E4M3 under two scalars"
    assert refusal("cublas-row", whole, whole_scale) == "it takes E4M3"
    assert refusal("triton", Activation(torch.zeros(1, 16)), None) == "it takes 8-bit codes"
    with pytest.raises(ValueError, match="'fast' cannot run this: expected one of reference"):
        matmul(static, weight, scale, torch.bfloat16, "fast")


def test_the_cpu_runs_the_reference() -> None:
    x, weight, scale = operands(16, 32, 64, "e4m3", vectors=False)
    same_bits(matmul(x, weight, scale, torch.bfloat16), expected(x, weight, scale, torch.bfloat16))
    assert DTYPE["e4m3"] == x.values.dtype
