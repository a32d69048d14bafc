"""The text encoder's kernels: references against fp64 and transformers, Triton against references.

Triton runs in its interpreter here and on the GPU where there is one; E4M3 codes are compared on a
GPU only, because the interpreter casts to E4M3 wrongly.
"""

import pytest
import torch
from torch import Tensor

from compare import relative_error, same_bits
from zimage_fp8.kernels.activation import Activation, Output
from zimage_fp8.kernels.add_norm import add_norm_reference, add_norm_triton
from zimage_fp8.kernels.language import HAS_TRITON
from zimage_fp8.kernels.qwen_rope import (
    half_rope_table,
    qwen_norm_rope_reference,
    qwen_norm_rope_triton,
)
from zimage_fp8.numerics import E4M3_ROW, INT8_ROW, QuantSpec

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
WHERE = [
    ("cpu", torch.float32),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]


def randn(
    *shape: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    """Within an fp32 rounding or two; in BF16 all but one value in a thousand equal."""
    if expected.dtype == torch.float32:
        assert relative_error(actual, expected) < 1e-6
    else:
        assert relative_error(actual, expected) < 1e-3
        assert (actual != expected).float().mean() < 1e-3


def test_add_norm_equals_fp64() -> None:
    x, h, weight = randn(5, 100, seed=0), randn(5, 100, seed=1), randn(100, seed=2)
    total, normed = add_norm_reference(x, h, weight, 1e-6, Output())
    same_bits(total, x + h)
    wide = (x + h).double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert relative_error(normed.values, expected) < 2e-7
    untouched, _ = add_norm_reference(x, None, weight, 1e-6, Output())
    assert untouched is x


@needs_triton
@pytest.mark.parametrize(("device", "dtype"), WHERE)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dim", [100, 192, 2560])
def test_add_norm(device: str, dtype: torch.dtype, has_residual: bool, dim: int) -> None:
    x, h = (randn(7, dim, seed=s, device=device, dtype=dtype) for s in (0, 1))
    weight = randn(dim, seed=2, device=device, dtype=dtype)
    added = h if has_residual else None
    total, actual = add_norm_triton(x, added, weight, 1e-6, Output())
    expected_total, expected = add_norm_reference(x, added, weight, 1e-6, Output())
    same_bits(total, expected_total)
    close(actual.values, expected.values)


@needs_triton
@pytest.mark.parametrize(
    ("device", "dtype", "spec"),
    [
        ("cpu", torch.float32, INT8_ROW),
        pytest.param("cuda", torch.bfloat16, INT8_ROW, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, E4M3_ROW, marks=pytest.mark.gpu),
    ],
)
def test_add_norm_in_eight_bits(device: str, dtype: torch.dtype, spec: QuantSpec) -> None:
    x, h = (randn(7, 2560, seed=s, device=device, dtype=dtype) for s in (0, 1))
    weight = randn(2560, seed=2, device=device, dtype=dtype)
    _, actual = add_norm_triton(x, h, weight, 1e-6, Output(spec))
    _, expected = add_norm_reference(x, h, weight, 1e-6, Output(spec))
    assert actual.values.dtype == expected.values.dtype
    close(_scale(actual), _scale(expected))
    # An ulp of the norm moves a value over a rounding boundary once in some ten thousand.
    differ = actual.values.view(torch.int8) != expected.values.view(torch.int8)
    assert differ.float().mean() < 1e-3


def _scale(activation: Activation) -> Tensor:
    assert activation.scale is not None
    return activation.scale


@torch.no_grad()
def test_rotation_equals_transformers() -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import (
        Qwen3RMSNorm,
        Qwen3RotaryEmbedding,
        apply_rotary_pos_emb,
    )

    tokens, heads, kv_heads, head_dim, theta = 37, 6, 2, 64, 1e6
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, seed=0)
    weight_q, weight_k = 1 + 0.1 * randn(head_dim, seed=1), 1 + 0.1 * randn(head_dim, seed=2)
    table = half_rope_table(tokens, head_dim, theta)
    q, k, v = qwen_norm_rope_reference(qkv, weight_q, weight_k, table, kv_heads, 1e-6)

    config = Qwen3Config(
        head_dim=head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    cos, sin = Qwen3RotaryEmbedding(config)(qkv, torch.arange(tokens)[None])
    normed = []
    for part, weight in zip(
        qkv.split([heads * head_dim, 2 * kv_heads * head_dim], 1), (weight_q, weight_k), strict=True
    ):
        norm = Qwen3RMSNorm(head_dim, 1e-6)
        norm.weight.data = weight
        normed.append(norm(part.unflatten(-1, (-1, head_dim)))[None].transpose(1, 2))
    expected_q, expected_k = apply_rotary_pos_emb(normed[0], normed[1][:, :kv_heads], cos, sin)
    assert relative_error(q, expected_q[0].transpose(0, 1)) < 3e-7
    assert relative_error(k, expected_k[0].transpose(0, 1)) < 3e-7
    same_bits(v, qkv[:, (heads + kv_heads) * head_dim :].unflatten(-1, (kv_heads, head_dim)))


@needs_triton
@pytest.mark.parametrize(("device", "dtype"), WHERE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 64), (4, 2, 48), (32, 8, 128)])
def test_qwen_norm_rope(
    device: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    tokens = 5
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, seed=0, device=device, dtype=dtype)
    weights = [1 + 0.1 * randn(head_dim, seed=s, device=device, dtype=dtype) for s in (1, 2)]
    table = half_rope_table(tokens, head_dim, 1e6).to(device)
    expected = qwen_norm_rope_reference(qkv.clone(), *weights, table, kv_heads, 1e-6)
    actual = qwen_norm_rope_triton(qkv, *weights, table, kv_heads, 1e-6)
    for got, wanted in zip(actual[:2], expected[:2], strict=True):
        close(got, wanted)
    same_bits(actual[2], expected[2])  # v is not touched
