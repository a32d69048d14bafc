"""Attention in CUDA C++: compiled without a GPU, compared with exact attention on one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from compare import sqnr_db
from zimage_fp8.kernels.activation import Output
from zimage_fp8.kernels.attention import attention
from zimage_fp8.kernels.hopper import SHARED_MEMORY, compiled, hopper_refusal
from zimage_fp8.kernels.hopper_attention import (
    HEAD_DIM,
    SHAPES,
    AttentionProgram,
    hopper_attention,
    program_for,
    programs,
)
from zimage_fp8.kernels.language import HAS_TRITON
from zimage_fp8.kernels.nvrtc import find_library
from zimage_fp8.numerics import E4M3_STATIC, INT8_ROT, QuantSpec, dequantize, scale_of

STATIC = Output(E4M3_STATIC, torch.ones([]))


@pytest.mark.skipif(find_library() is None, reason="NVRTC is not installed")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_it_compiles_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for program in (*programs(Output()), *programs(STATIC)):
        assert b"hopper_attention_kernel" in compiled(program)
        assert program.shared_memory <= SHARED_MEMORY


@pytest.mark.parametrize(
    ("tokens", "keys"),
    [(2112, 176), (4160, 80), (2144, 176), (1088, 80), (9280, 176)],  # the faster on an H200
)
def test_the_shape_that_computes_least_is_taken(tokens: int, keys: int) -> None:
    program = program_for(30, tokens, 132, to_codes=True)
    assert program.keys == keys
    assert program.to_codes
    assert program in set(programs(STATIC))
    assert program not in set(programs(Output()))


@pytest.fixture
def heads():
    """q, k and v of pictures as they lie packed, on a GPU that runs the kernel."""
    if reason := hopper_refusal(torch.device("cuda", 0)):
        pytest.skip(reason)

    def make(batch: int, tokens: int, of_k: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        packed = torch.randn(batch, tokens, 3, 3, HEAD_DIM, device="cuda").bfloat16()
        packed[:, :, 1] *= of_k
        return packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]

    return make


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 176, 257, 1000, 2112])
@pytest.mark.parametrize("of_k", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention(heads, shape: tuple[int, int, int], tokens: int, of_k: float) -> None:
    """Edges of queries and of keys, pictures behind each other, more work than multiprocessors;
    a softmax from almost even to one where sums shrink whenever a larger score comes."""
    q, k, v = heads(3, tokens, of_k)
    found = hopper_attention(q, k, v, program=AttentionProgram(False, *shape))
    exact = attention(q.double(), k.double(), v.double()).flatten(0, 1)
    theirs = attention(q, k, v).flatten(0, 1)
    assert found.values.dtype == torch.bfloat16
    ours = sqnr_db(found.values.double(), exact)
    assert ours > 45
    assert ours == torch.inf or ours > sqnr_db(theirs.double(), exact) - 1


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [E4M3_STATIC, INT8_ROT])
def test_it_writes_what_the_next_layer_reads(heads, spec: QuantSpec) -> None:
    q, k, v = heads(2, 300)
    static = scale_of(torch.tensor(0.7, device="cuda"), "e4m3") if spec.is_static else None
    plain = hopper_attention(q, k, v).values.float()
    found = hopper_attention(q, k, v, Output(spec, static))
    assert found.scale is not None
    if static is not None:
        got = dequantize(found.values, found.scale)
        # Nothing is rounded to BF16 in between: a code beside the nearest at most.
        assert (got - plain.clamp(-0.7, 0.7)).abs().max() < 0.7 / 16
        assert sqnr_db(got, plain.clamp(-0.7, 0.7)) > 30
    assert found.values.dtype == (torch.float8_e4m3fn if spec.is_static else torch.int8)


@pytest.mark.gpu
def test_the_largest_score_is_found_in_every_block(heads) -> None:
    """Each query knows one key, scores a hundred apart from the others."""
    _, k, v = heads(1, 700)
    keys = torch.randn_like(k).sign()
    wanted = torch.randperm(700, device="cuda")
    found = hopper_attention((4 * keys[:, wanted]).contiguous(), keys.contiguous(), v)
    assert torch.equal(found.values, v[0, wanted].flatten(1))


@pytest.mark.gpu
def test_nan_stays_nan(heads) -> None:
    """And does not stop the GPU."""
    q, k, v = heads(1, 400)
    q[:, 5] = torch.nan
    found = hopper_attention(q, k, v).values
    torch.cuda.synchronize()
    assert found[5].isnan().all()
    assert not found[6:].isnan().any()
