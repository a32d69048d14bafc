"""Product and gate in one kernel, against the product in fp32 and the gate in PyTorch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compare import relative_error, same_bits
from operands import operands
from zimage_fp8.kernels.activation import PLAIN, Activation, Output, encode_reference
from zimage_fp8.kernels.gated_matmul import (
    gated_matmul,
    gated_matmul_reference,
    gated_matmul_triton,
)
from zimage_fp8.kernels.language import HAS_TRITON
from zimage_fp8.kernels.swiglu import gated_reference
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.numerics import (
    E4M3_ROW,
    E4M3_STATIC,
    INT8_ROT,
    INT8_ROW,
    QuantSpec,
    amax,
    scale_of,
)

SMALL = Tile(m=32, n=32, k=32, warps=4, stages=2, group=2)
SHAPES = [(37, 96, 48), (70, 160, 208)]  # (tokens, hidden, in): edges in every direction
FULL_SIZE = [(2112, 10240, 3840), (100, 10240, 3840), (333, 1280, 640)]
HOW: list[tuple[str, Tile | None]] = [
    ("triton-gated", None),
    ("triton-gated", Tile(n=64, warps=4, stages=3, per_sm=2, group=17)),
    ("wgmma-gated", None),
]


def gated_operands(
    rows: int, hidden: int, depth: int, format: str, *, vectors: bool, device: str = "cpu"
) -> tuple[Activation, Tensor, Tensor]:
    """Gates and values of about one, where a gate bends."""
    x, weight, scale = operands(rows, 2 * hidden, depth, format, vectors=vectors, device=device)
    return x, weight, scale / depth**0.5


def gate_in_fp64(x: Activation, weight: Tensor, scale: Tensor) -> Tensor:
    assert x.scale is not None
    wide = (x.values.double() * x.scale) @ (weight.double() * scale.reshape(-1, 1)).T
    gate, value = wide.chunk(2, dim=-1)
    return gate * gate.sigmoid() * value


def dequantized(activation: Activation) -> Tensor:
    values = activation.values.float()
    return values if activation.scale is None else values * activation.scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vectors", [True, False])
def test_the_reference_is_the_product_then_the_gate(
    shape: tuple[int, int, int], vectors: bool
) -> None:
    x, weight, scale = gated_operands(*shape, "int8", vectors=vectors)
    actual = gated_matmul(x, weight, scale, PLAIN, torch.float32)
    assert actual.values.dtype == torch.float32
    assert relative_error(actual.values, gate_in_fp64(x, weight, scale)) < 1e-6


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("spec", [None, INT8_ROT])
def test_in_the_interpreter(
    spec: QuantSpec | None, vectors: bool, shape: tuple[int, int, int]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    x, weight, scale = gated_operands(*shape, "int8", vectors=vectors)
    out = Output(spec)
    actual = gated_matmul_triton(x, weight, scale, out, torch.float32, SMALL)
    expected = gated_matmul_reference(x, weight, scale, out, torch.float32)
    if spec is None:
        assert relative_error(actual.values, expected.values) < 1e-6
        return
    assert actual.values.dtype == torch.int8
    assert (actual.values.int() - expected.values.int()).abs().max() <= 1
    assert (actual.values != expected.values).float().mean() < 1e-3


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("spec", [None, INT8_ROW])
def test_unquantized_inputs_in_the_interpreter(spec: QuantSpec | None) -> None:
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    x, weight = torch.randn(37, 48), torch.randn(192, 48) / 7
    out = Output(spec)
    actual = gated_matmul_triton(Activation(x), weight, None, out, torch.float32, SMALL)
    expected = gated_matmul_reference(Activation(x), weight, None, out, torch.float32)
    assert relative_error(dequantized(actual), dequantized(expected)) < (1e-3 if spec else 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "tile"), [(n, t and replace(t, k=64)) for n, t in HOW])
@pytest.mark.parametrize("shape", FULL_SIZE)
def test_unquantized_inputs(shape: tuple[int, int, int], name: str, tile: Tile | None) -> None:
    rows, hidden, depth = shape
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, depth, device="cuda", generator=generator).bfloat16()
    weight = torch.randn(2 * hidden, depth, device="cuda", generator=generator).bfloat16() / 60
    actual = gated_matmul(Activation(x), weight, None, PLAIN, torch.bfloat16, name, tile)
    wide = x[:64].double() @ weight.double().T
    gate, value = wide.chunk(2, dim=-1)
    assert relative_error(actual.values[:64], gate * gate.sigmoid() * value) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "tile"), HOW)
@pytest.mark.parametrize("shape", FULL_SIZE)
@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("format", ["e4m3", "int8"])
def test_plain_values(
    format: str, vectors: bool, shape: tuple[int, int, int], name: str, tile: Tile | None
) -> None:
    x, weight, scale = gated_operands(*shape, format, vectors=vectors, device="cuda")
    actual = gated_matmul(x, weight, scale, PLAIN, torch.bfloat16, name, tile)
    first = Activation(x.values[:64], x.scale[:64] if vectors else x.scale)  # type: ignore[index]
    # The output's rounding is 1.7e-3, what E4M3's fast accumulation loses comes on top.
    bound = 2e-3 if format == "int8" else 5e-3
    assert relative_error(actual.values[:64], gate_in_fp64(first, weight, scale)) < bound
    whole = gated_matmul_reference(x, weight, scale, PLAIN, torch.bfloat16)
    assert relative_error(actual.values, whole.values) < 2 * bound


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "tile"), HOW)
@pytest.mark.parametrize("shape", FULL_SIZE)
@pytest.mark.parametrize("spec", [E4M3_STATIC, E4M3_ROW, INT8_ROT])
def test_codes(spec: QuantSpec, shape: tuple[int, int, int], name: str, tile: Tile | None) -> None:
    """What the codes stand for is as near to fp64 as codes of the exact values are."""
    format = spec.format
    x, weight, scale = gated_operands(*shape, format, vectors=not spec.is_static, device="cuda")
    exact = gate_in_fp64(x, weight, scale).float()
    static = scale_of(amax(exact, per_row=False), format) if spec.is_static else None
    out = Output(spec, static)
    actual = gated_matmul(x, weight, scale, out, torch.bfloat16, name, tile)
    best = encode_reference(exact, out, torch.bfloat16)
    assert actual.values.dtype == best.values.dtype
    if static is not None:
        same_bits(actual.scale, static)
    assert relative_error(dequantized(actual), dequantized(best)) < 0.02
    unrotated = best if not spec.rotate else None
    if unrotated is not None:
        error, least = (relative_error(dequantized(it), exact) for it in (actual, unrotated))
        assert error < 1.03 * least


@pytest.mark.gpu
def test_a_gate_that_is_stored_apart_is_the_same_up_to_its_rounding() -> None:
    x, weight, scale = gated_operands(200, 1280, 640, "int8", vectors=True, device="cuda")
    wide = gated_matmul_reference(x, weight, scale, PLAIN, torch.float32)
    assert x.scale is not None
    product = (x.values.double() @ weight.double().T).float() * x.scale * scale
    apart = gated_reference(product.bfloat16(), PLAIN)
    at_once = gated_matmul(x, weight, scale, PLAIN, torch.bfloat16)
    rounded_twice = relative_error(apart.values.float(), wide.values)
    assert relative_error(at_once.values.float(), wide.values) < rounded_twice
