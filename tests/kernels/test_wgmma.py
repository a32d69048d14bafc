"""The kernel of CUDA C++: compiled without a GPU, run and compared on one.

`test_matmul.py` and `test_gated_matmul.py` run it at full size beside the others.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compare import relative_error, same_bits
from operands import operands
from zimage_fp8.engine.gemm import GATED, HEADS, measured
from zimage_fp8.kernels.activation import Activation, Output
from zimage_fp8.kernels.gated_matmul import gated_matmul, gated_matmul_reference
from zimage_fp8.kernels.hopper import compiled
from zimage_fp8.kernels.language import HAS_TRITON
from zimage_fp8.kernels.matmul import matmul
from zimage_fp8.kernels.nvrtc import find_library
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.kernels.wgmma import HEADS_TILE, WGMMA_TILE, Program, wgmma
from zimage_fp8.numerics import E4M3_STATIC, INT8_ROW, scale_of

OPERANDS = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "int8": torch.int8}
TILES = [
    WGMMA_TILE,
    Tile(m=192, n=160, stages=5),
    Tile(m=128, n=256, stages=4, group=3),
    replace(WGMMA_TILE, cluster=2),
    Tile(m=192, n=160, stages=5, cluster=2),
]
HEADS_TILES = [HEADS_TILE, replace(HEADS_TILE, m=128, stages=5)]
# (tokens, columns, depth): edges in every direction, one tile, more tiles than programs.
SHAPES = [(1, 64, 64), (37, 208, 96), (193, 400, 4000), (5000, 2000, 192)]


def heads_program(dtype: torch.dtype, tile: Tile) -> Program:
    shape = (tile.m // 64, tile.n, tile.stages, tile.cluster)
    return Program(dtype, *shape, scaled=dtype != torch.bfloat16, heads=(4, 10))


def programs() -> set[Program]:
    """What the table of choices runs, and the tiles that tests run."""
    found = set()
    for choice in measured():
        if choice.implementation.startswith("wgmma") and choice.tile is not None:
            kind = choice.kind.removesuffix(GATED).removesuffix(HEADS)
            format, _, scales = kind.partition("-")
            heads = (4, 10) if choice.kind.endswith(HEADS) else None
            gated, vectors = choice.kind.endswith(GATED), scales == "vector"
            codes = gated and scales == "scalar"
            shape = (choice.tile.m // 64, choice.tile.n, choice.tile.stages, choice.tile.cluster)
            flags = (gated, codes, format != "bf16", vectors, vectors)
            found.add(Program(OPERANDS[format], *shape, *flags, heads))
    found |= {heads_program(OPERANDS[format], tile) for format in OPERANDS for tile in HEADS_TILES}
    for tile in TILES:
        shape = (tile.m // 64, tile.n, tile.stages, tile.cluster)
        found.add(Program(torch.int8, *shape, scaled=True, per_channel=True))
    return found


@pytest.mark.skipif(find_library() is None, reason="NVRTC is not installed")
@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_every_program_compiles_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for program in programs():
        code = compiled(program)
        assert code.startswith(b"\x7fELF"), program
        assert b"wgmma_kernel" in code
        assert compiled(program) == code, "the second comes from the cache"
    assert len(list(tmp_path.rglob("wgmma.cubin"))) == len(programs())


@pytest.mark.skipif(find_library() is None, reason="NVRTC is not installed")
def test_a_compiler_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Program, "header", lambda self: "nonsense")
    with pytest.raises(RuntimeError, match="nonsense"):
        compiled(Program(torch.int8, 3, 192, 4))
    assert not list(tmp_path.rglob("wgmma.cubin"))


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        ((4, 192, 4), "256 x 192: expected 128 or 192 rows"),
        ((3, 100, 4), "multiple of 32 columns"),
        ((3, 288, 2), "up to 256"),
        ((3, 192, 5), "take fewer stages"),
    ],
)
def test_a_tile_that_does_not_fit(tile: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Program(torch.int8, *tile)


def test_a_gate_needs_whole_pairs_of_columns() -> None:
    with pytest.raises(ValueError, match="multiple of 64 columns"):
        Program(torch.int8, 3, 160, 4, gated=True)


def test_it_says_what_it_needs() -> None:
    x, weight, scale = operands(4, 32, 32, "int8", vectors=True)
    with pytest.raises(ValueError, match=r"Hopper's wgmma \(compute capability 9.0\)"):
        matmul(x, weight, scale, torch.bfloat16, "wgmma")
    with pytest.raises(ValueError, match=r"writes BF16 or codes, not torch\.float32"):
        wgmma(x, weight, scale, torch.float32)
    with pytest.raises(ValueError, match=r"on both sides, not torch\.int8 and torch\.bfloat16"):
        wgmma(x, weight.bfloat16(), scale, torch.bfloat16)
    with pytest.raises(ValueError, match=r"a multiple of 16, not \(20, 32\)"):
        wgmma(x, weight[:20], scale[:20], torch.bfloat16)
    with pytest.raises(ValueError, match="expected one of triton-gated, wgmma-gated"):
        gated_matmul(x, weight, scale, Output(), torch.bfloat16, "cublas")


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_vector", [True, False])
@pytest.mark.parametrize("weight_vector", [True, False])
def test_int8_is_exact(
    weight_vector: bool, x_vector: bool, shape: tuple[int, int, int], tile: Tile
) -> None:
    x, weight, scale = operands(*shape, "int8", vectors=True, device="cuda")
    assert x.scale is not None
    x = Activation(x.values, x.scale if x_vector else x.scale.max())
    scale = scale if weight_vector else scale.max()
    actual = matmul(x, weight, scale, torch.bfloat16, "wgmma", tile)
    total = (x.values.double() @ weight.double().T).float()
    assert x.scale is not None
    same_bits(actual, (total * x.scale * scale).to(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_unquantized(shape: tuple[int, int, int], tile: Tile) -> None:
    rows, columns, depth = shape
    torch.manual_seed(rows)
    x = torch.randn(rows, depth, device="cuda").bfloat16()
    weight = torch.randn(columns, depth, device="cuda").bfloat16()
    actual = matmul(Activation(x), weight, None, torch.bfloat16, "wgmma", tile)
    # A rounding to BF16 is at most 2^-8 off; of many values 1.7e-3 on average, of 64 up to 2.1e-3.
    assert relative_error(actual, x.double() @ weight.double().T) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES[1:])  # PyTorch's INT8 product wants 17 rows
def test_gated_codes_under_a_static_scale(shape: tuple[int, int, int]) -> None:
    """The sums are exact, so only SiLU's approximation can move a code, by one step."""
    rows, columns, depth = shape
    x, weight, scale = operands(rows, 2 * columns, depth, "int8", vectors=True, device="cuda")
    scale = scale / depth**0.5
    out = Output(E4M3_STATIC, scale_of(torch.tensor(5.0, device="cuda"), "e4m3"))
    actual = gated_matmul(x, weight, scale, out, torch.bfloat16, "wgmma-gated")
    expected = gated_matmul_reference(x, weight, scale, out, torch.bfloat16)
    apart = actual.values.float() != expected.values.float()  # zeros of either sign are equal
    assert apart.float().mean() < 1e-3
    codes, wanted = (it.values[apart].view(torch.uint8).int() for it in (actual, expected))
    assert ((codes - wanted).abs() <= 1).all()


@pytest.mark.gpu
def test_a_scale_per_token_is_a_second_kernels() -> None:
    x, weight, scale = operands(300, 2 * 640, 384, "int8", vectors=True, device="cuda")
    out = Output(INT8_ROW)
    actual = gated_matmul(x, weight, scale / 20, out, torch.bfloat16, "wgmma-gated")
    expected = gated_matmul_reference(x, weight, scale / 20, out, torch.bfloat16)
    assert actual.values.dtype == torch.int8
    assert actual.scale is not None
    assert expected.scale is not None
    ours, theirs = (it.values.float() * it.scale for it in (actual, expected))
    assert relative_error(ours, theirs) < 1e-2


@pytest.mark.gpu
def test_in_a_graph() -> None:
    """Its arguments are copied when it is recorded; what it reads are the same addresses."""
    x, weight, scale = operands(400, 384, 512, "int8", vectors=True, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        out = matmul(x, weight, scale, torch.bfloat16, "wgmma")
    x.values.copy_(x.values.flip(0))
    graph.replay()
    same_bits(out, matmul(x, weight, scale, torch.bfloat16, "wgmma"))
