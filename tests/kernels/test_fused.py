"""The fused kernels against their references: in Triton's interpreter here, on a GPU where one is.

E4M3 codes are compared on a GPU only: the interpreter casts to E4M3 wrongly.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from zimage_fp8.kernels import activation, hopper_row, norm, qk_norm_rope
from zimage_fp8.kernels.activation import Activation, Output
from zimage_fp8.kernels.encode import encode_triton
from zimage_fp8.kernels.hopper import compiled, hopper_refusal
from zimage_fp8.kernels.hopper_row import (
    RowProgram,
    encode_hopper,
    program_for,
    residual_norm_hopper,
)
from zimage_fp8.kernels.language import HAS_TRITON
from zimage_fp8.kernels.nvrtc import find_library
from zimage_fp8.kernels.qk_norm_rope import HeadNorms
from zimage_fp8.kernels.rope import rope_table
from zimage_fp8.kernels.swiglu import gated_reference, gated_triton
from zimage_fp8.numerics import (
    E4M3_ROW,
    E4M3_STATIC,
    INT8_ROT,
    INT8_ROW,
    QuantSpec,
    rotation_group,
)

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
ON_CPU: list[QuantSpec | None] = [None, INT8_ROW, INT8_ROT]
ON_GPU: list[QuantSpec | None] = [*ON_CPU, E4M3_STATIC, E4M3_ROW]
ON_HOPPER = [
    *(E4M3_STATIC, E4M3_ROW, INT8_ROW, INT8_ROT),
    *(replace(E4M3_STATIC, rotate=True), replace(E4M3_STATIC, format="int8")),
]
CASES = [
    *(("cpu", torch.float32, spec) for spec in ON_CPU),
    *(
        pytest.param("cuda", dtype, spec, marks=pytest.mark.gpu)
        for dtype in (torch.bfloat16, torch.float32)
        for spec in ON_GPU
    ),
]
WIDTHS = {"cpu": (192, 768, 1280), "cuda": (192, 512, 3840, 10240)}

# Per sample: more rows than programs, so that each walks over several.
TOKENS = {"cpu": 32, "cuda": 500}


def randn(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x[..., 3 % shape[-1]] *= 30  # a channel that stands out, and below a token of zeros
    return x.to(device, dtype)


def output(spec: QuantSpec | None, device: str) -> Output:
    static = spec is not None and spec.is_static
    return Output(spec, torch.tensor(0.0123, device=device) if static else None)


def agree(actual: Activation, expected: Activation, out: Output, dtype: torch.dtype) -> None:
    """Same scales to an fp32 ulp or two; codes equal but for one in 1e4, which are neighbours."""
    assert actual.values.dtype == expected.values.dtype
    if out.spec is None:
        tolerance = 1e-5 if dtype == torch.float32 else 1 / 128
        torch.testing.assert_close(actual.values, expected.values, rtol=tolerance, atol=1e-5)
        differ = actual.values != expected.values
        assert dtype == torch.float32 or differ.float().mean() < 1e-3
        return
    assert actual.scale is not None
    assert expected.scale is not None
    torch.testing.assert_close(actual.scale, expected.scale, rtol=1e-6, atol=0)
    steps = (codes(actual.values) - codes(expected.values)).abs()
    assert steps.max() <= 1, f"codes differ by {steps.max().item()} steps"
    assert (steps > 0).float().mean() <= 1e-4, f"{(steps > 0).float().mean().item():.1e} differ"


def codes(q: Tensor) -> Tensor:
    """8-bit codes as integers in the order of the values they stand for."""
    bits = q.view(torch.int8).int()
    if q.dtype == torch.int8:
        return bits
    return torch.where(bits < 0, -(bits & 127), bits)


@pytest.mark.parametrize(("device", "dtype", "spec"), CASES)
def test_encode(device: str, dtype: torch.dtype, spec: QuantSpec | None) -> None:
    """No arithmetic before the epilogue: every bit must agree."""
    out = output(spec, device)
    for width in WIDTHS[device]:
        x = randn(7, width, device=device, dtype=dtype)
        x[5] = 0
        actual = encode_triton(x, out)
        expected = activation.encode_reference(x.float(), out, dtype)
        assert (
            torch.equal(codes(actual.values), codes(expected.values))
            if spec
            else torch.equal(actual.values, expected.values)
        )
        if spec:
            assert actual.scale is not None
            assert expected.scale is not None
            assert torch.equal(actual.scale, expected.scale)


@pytest.mark.parametrize(("device", "dtype", "spec"), CASES)
def test_norm(device: str, dtype: torch.dtype, spec: QuantSpec | None) -> None:
    out = output(spec, device)
    for width in WIDTHS[device]:
        x = randn(2, TOKENS[device], width, device=device, dtype=dtype)
        x[1, 5] = 0
        vector = randn(2, 5, width, device=device, seed=1)[:, 2]  # strided, as the engine's is
        actual = norm.norm_triton(x, vector, 1e-5, out)
        agree(actual, norm.norm_reference(x, vector, 1e-5, out), out, dtype)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_one_vector_for_all_samples(device: str) -> None:
    x = randn(3, 32, 192, device=device)
    vector = randn(1, 5, 192, device=device, seed=1)[:, 2]
    actual = norm.norm_triton(x, vector, 1e-5, Output())
    agree(actual, norm.norm_reference(x, vector, 1e-5, Output()), Output(), torch.float32)


@pytest.mark.parametrize("vectors", [1, 2])  # one for all samples, or one each
@pytest.mark.parametrize(("device", "dtype", "spec"), CASES)
def test_residual_norm(
    device: str, dtype: torch.dtype, spec: QuantSpec | None, vectors: int
) -> None:
    out = output(spec, device)
    for width in WIDTHS[device]:
        x = randn(2, TOKENS[device], width, device=device, dtype=dtype)
        h = randn(2 * TOKENS[device], width, device=device, dtype=dtype, seed=2)
        table = randn(vectors, 5, width, device=device, seed=1)
        gate, vector = table[:, 1], table[:, 2]
        total, actual = norm.residual_norm_triton(x, h, gate, vector, 1e-5, out)
        expected_total = norm.residual_reference(x, h, gate, 1e-5)
        agree(Activation(total), Activation(expected_total), Output(), dtype)
        # The norm is compared on the kernel's own sum, so that its rounding is not counted twice.
        agree(actual, norm.norm_reference(total, vector, 1e-5, out), out, dtype)
        # Alone it is another kernel to the compiler, which may add the squares in another order.
        alone = norm.residual_triton(x, h, gate, 1e-5)
        agree(Activation(alone), Activation(expected_total), Output(), dtype)


@pytest.mark.skipif(find_library() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("spec", [INT8_ROT, E4M3_STATIC, E4M3_ROW])
def test_rows_compile_for_hopper(spec: QuantSpec) -> None:
    for dim, residual in ((3840, True), (10240, False)):
        program = RowProgram(dim, spec.format, not spec.is_static, spec.rotate, residual)
        assert program.parts == (1 if dim == 3840 else 4)
        assert b"row_kernel" in compiled(program)


def test_rows_are_written_by_other_kernels_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert program_for(Output(INT8_ROT), 3840, torch.bfloat16, cpu) is None
    monkeypatch.setattr(hopper_row, "hopper_refusal", lambda _: None)
    assert program_for(Output(INT8_ROT), 3840, torch.bfloat16, cpu) is not None
    assert program_for(Output(INT8_ROT), 3840, torch.float32, cpu) is None
    assert program_for(Output(), 3840, torch.bfloat16, cpu) is None
    assert program_for(Output(INT8_ROT), 3840 + 128, torch.bfloat16, cpu) is None
    assert program_for(Output(INT8_ROT), 10240, torch.bfloat16, cpu, residual=True) is None
    prime = 37 * 256  # no number of warps that divides it is small enough
    assert program_for(Output(INT8_ROT), prime, torch.bfloat16, cpu) is None


@pytest.mark.gpu
@pytest.mark.parametrize("vectors", [1, 3])  # one for all samples, or one each
@pytest.mark.parametrize("spec", ON_HOPPER)
def test_residual_norm_on_hopper(spec: QuantSpec, vectors: int) -> None:
    if reason := hopper_refusal(torch.device("cuda", 0)):
        pytest.skip(reason)
    out = output(spec, "cuda")
    for width in (256, 3840, 4096):
        # 3 x 167 rows: no whole number of warps, and a warp's rows of two samples.
        x = randn(3, 167, width, device="cuda", dtype=torch.bfloat16)
        h = randn(3 * 167, width, device="cuda", dtype=torch.bfloat16, seed=2)
        h[7] = 0
        table = randn(vectors, 5, width, device="cuda", seed=1)
        gate, vector = table[:, 1], table[:, 2]
        program = program_for(out, width, x.dtype, x.device, residual=True)
        assert program is not None
        total, actual = residual_norm_hopper(x, h, gate, vector, 1e-5, out, program)
        expected_total = norm.residual_reference(x, h, gate, 1e-5)
        agree(Activation(total), Activation(expected_total), Output(), x.dtype)
        agree(actual, norm.norm_reference(total, vector, 1e-5, out), out, x.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ON_HOPPER)
def test_encode_on_hopper(spec: QuantSpec) -> None:
    """No arithmetic before the epilogue: every bit must agree."""
    if reason := hopper_refusal(torch.device("cuda", 0)):
        pytest.skip(reason)
    out = output(spec, "cuda")
    for width in (256, 3840, 4096, 10240):
        x = randn(501, width, device="cuda", dtype=torch.bfloat16)
        x[5] = 0
        program = program_for(out, width, x.dtype, x.device)
        assert program is not None
        actual = encode_hopper(x, out, program)
        expected = activation.encode_reference(x.float(), out, x.dtype)
        assert torch.equal(codes(actual.values), codes(expected.values))
        assert actual.scale is not None
        assert expected.scale is not None
        assert torch.equal(actual.scale, expected.scale)


@pytest.mark.parametrize(("device", "dtype", "spec"), CASES)
def test_gated(device: str, dtype: torch.dtype, spec: QuantSpec | None) -> None:
    out = output(spec, device)
    for width in WIDTHS[device]:
        w13 = randn(5, 2 * width, device=device, dtype=dtype)
        agree(gated_triton(w13, out), gated_reference(w13, out), out, dtype)


@pytest.mark.parametrize(
    ("device", "dtype", "heads", "head_dim"),
    [
        ("cpu", torch.float32, 3, 64),
        pytest.param("cuda", torch.float32, 3, 64, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 3, 64, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, 30, 128, marks=pytest.mark.gpu),
    ],
)
def test_qk_norm_rope(device: str, dtype: torch.dtype, heads: int, head_dim: int) -> None:
    qkv, norms, table = heads_example(device, dtype, heads, head_dim)
    expected = qk_norm_rope.qk_norm_rope_reference(qkv.clone(), norms, table)
    actual = qk_norm_rope.qk_norm_rope_triton(qkv, norms, table)
    for got, wanted in zip(actual, expected, strict=True):
        agree(Activation(got), Activation(wanted), Output(), dtype)
    assert torch.equal(actual[2], expected[2])  # v is not touched


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 64), (30, 128)])
def test_qk_norm_rope_writes_codes(heads: int, head_dim: int) -> None:
    """On a GPU only: Triton's interpreter rounds to E4M3 wrongly."""
    qkv, norms, table = heads_example("cuda", torch.bfloat16, heads, head_dim)
    before = qkv.clone()
    scale = (torch.rand(3, 2, heads, device="cuda") + 0.1) / 100  # clips some of each
    expected = qk_norm_rope.qk_norm_rope_reference(qkv, norms, table, scale)
    actual = qk_norm_rope.qk_norm_rope_triton(qkv, norms, table, scale)
    assert torch.equal(qkv, before)
    for got, wanted, s in zip(actual, expected, scale, strict=True):
        assert got.dtype == torch.float8_e4m3fn
        assert got.float().abs().max() == 448
        per_token = s[:, None, :, None].expand_as(got).reshape(-1, 1)
        agree(
            Activation(got.reshape(-1, head_dim), per_token),
            Activation(wanted.reshape(-1, head_dim), per_token),
            Output(E4M3_ROW),
            torch.bfloat16,
        )
    assert torch.equal(actual[2].view(torch.uint8), expected[2].view(torch.uint8))


def heads_example(
    device: str, dtype: torch.dtype, heads: int, head_dim: int
) -> tuple[torch.Tensor, HeadNorms, torch.Tensor]:
    """q, k and v of two pictures of 32 tokens, the norms and a rotary table."""
    tokens = 32
    qkv = randn(2, tokens, 3 * heads * head_dim, device=device, dtype=dtype)
    weights = [1 + 0.1 * randn(head_dim, device=device, dtype=dtype, seed=s) for s in (1, 2)]
    positions = torch.arange(tokens)[:, None].expand(-1, 3)
    half = head_dim // 4
    norms = HeadNorms(*weights, 1e-5)
    return qkv, norms, rope_table(positions, (half, half, 2 * half), 256.0).to(device)


@pytest.mark.parametrize("longest", [0, 5])
def test_no_head_exceeds_its_reach(longest: int) -> None:
    """Not even one whose values all lie in the channel of the largest weight, nor after turning."""
    weight = torch.ones(16)
    weight[longest] = -3.0
    q = torch.zeros(1, 64, 3 * 16)
    q[..., longest] = 7.0
    positions = torch.arange(64)[:, None].expand(-1, 3)
    table = rope_table(positions, (4, 4, 8), 256.0)
    norms = HeadNorms(weight, weight, 1e-5)
    found, _, _ = qk_norm_rope.qk_norm_rope_reference(q, norms, table)
    reach = qk_norm_rope.reach_of_norm(weight)
    assert 0.99 * reach < found.abs().max() <= reach


def test_rotation_is_its_own_inverse_and_spreads() -> None:
    from zimage_fp8.kernels.rotate import rotate

    for width in (192, 512, 3840, 10240):
        group = rotation_group(width)
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(rotate(rotate(x, group), group), x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rotate(x, group).norm(dim=-1), x.norm(dim=-1))
        one_hot = torch.zeros(width)
        one_hot[group + 1 if width > group else 1] = 1
        assert rotate(one_hot, group).abs().max() == pytest.approx(group**-0.5)


def test_a_rotation_that_does_not_fit_is_refused() -> None:
    from zimage_fp8.kernels.rotate import rotate

    for width, group in ((100, 64), (128, 128), (192, 48)):
        with pytest.raises(ValueError, match="cannot rotate"):
            rotate(torch.zeros(width), group)
