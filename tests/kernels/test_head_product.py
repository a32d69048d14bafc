"""Attention's packed projection with the norm and rotation of its heads, in one kernel."""

from dataclasses import replace

import pytest
import torch

from compare import relative_error, same_bits, worst_channel
from operands import operands
from zimage_fp8.kernels.activation import Activation
from zimage_fp8.kernels.head_product import head_product, head_product_reference, unfit
from zimage_fp8.kernels.hopper import needs_hopper
from zimage_fp8.kernels.matmul import matmul
from zimage_fp8.kernels.qk_norm_rope import HeadNorms, qk_norm_rope
from zimage_fp8.kernels.rope import PLACES, Rope
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.kernels.wgmma import HEADS_TILE, Program
from zimage_fp8.model.z_image import caption_positions, image_positions

CPU = torch.device("cpu")
AXES, THETA = (32, 48, 48), 256.0
TILES = [HEADS_TILE, replace(HEADS_TILE, m=128, stages=5, group=3)]


def heads_of(size: tuple[int, int], caption: int, device: str = "cpu") -> tuple[HeadNorms, Rope]:
    """Norms with weights of both signs, and the rotation of a picture with a caption behind it."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(128, generator=generator).bfloat16().to(device) for _ in "qk"]
    positions = torch.cat([image_positions(*size, caption), caption_positions(caption)])
    return HeadNorms(*weights, 1e-5), Rope.of(positions, AXES, THETA, torch.device(device))


def values_and_weight(
    rows: int, columns: int, depth: int, kind: str, device: str
) -> tuple[Activation, torch.Tensor, torch.Tensor | None]:
    format, _, scales = kind.partition("-")
    if format != "bf16":
        return operands(rows, columns, depth, format, vectors=scales == "vector", device=device)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=generator).bfloat16().to(device)
    return (
        Activation(x),
        torch.randn(columns, depth, generator=generator).bfloat16().to(device),
        None,
    )


def test_on_the_cpu_it_is_the_product_then_norm_and_rotation() -> None:
    norms, rope = heads_of((32, 48), 32)
    tokens = len(rope.table)
    x, weight, scale = operands(2 * tokens, 3 * 384, 64, "e4m3", vectors=True)
    fused = head_product(x, weight, scale, norms, rope)
    product = matmul(x, weight, scale, torch.float32).reshape(2, tokens, -1)
    heads = qk_norm_rope(product, norms, rope.table)
    assert fused.shape == (2 * tokens, 3 * 384)
    expected = torch.stack(heads, dim=2).flatten(2).flatten(0, 1)
    same_bits(fused, expected.bfloat16())


def test_what_does_not_fit_its_tiles_is_said() -> None:
    norms, rope = heads_of((32, 48), 32)
    assert unfit(torch.zeros(3 * 384, 8), norms, rope) is None
    two_heads = unfit(torch.zeros(3 * 256, 8), norms, rope)
    assert two_heads == "2 heads of 128 channels; expected a multiple of 3 of 128"
    small = HeadNorms(torch.zeros(64).bfloat16(), torch.zeros(64).bfloat16(), 1e-5)
    assert unfit(torch.zeros(3 * 384, 8), small, rope) is not None
    wide = HeadNorms(torch.zeros(128), torch.zeros(128), 1e-5)
    assert "torch.float32" in str(unfit(torch.zeros(3 * 384, 8), wide, rope))
    far = Rope.of(torch.tensor([[PLACES, 0, 0]]), AXES, THETA, CPU)
    assert "places" in str(unfit(torch.zeros(3 * 384, 8), norms, far))


def test_a_tile_must_be_half_of_three_heads() -> None:
    for tile in ((3, 160, 4, 2), (3, 192, 4, 1)):
        with pytest.raises(ValueError, match=r"heads of 128 channels want 192 in clusters of 2"):
            Program(torch.int8, *tile, heads=(4, 10))


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", ["bf16", "e4m3-scalar", "e4m3-vector", "int8-vector"])
# Rows: one tile and less, more than programs, two pictures whose edge lies inside a tile.
@pytest.mark.parametrize(
    ("size", "caption", "batch", "columns", "depth"),
    [
        ((16, 16), 32, 1, 3 * 384, 64),
        ((32, 48), 32, 3, 3 * 384, 400),
        ((128, 64), 64, 2, 3 * 3840, 192),
    ],
)
def test_it_equals_its_reference(
    size: tuple[int, int],
    caption: int,
    batch: int,
    columns: int,
    depth: int,
    kind: str,
    tile: Tile,
) -> None:
    if reason := needs_hopper(torch.cuda.get_device_capability()):
        pytest.skip(reason)
    norms, rope = heads_of(size, caption, "cuda")
    rows = batch * len(rope.table)
    x, weight, scale = values_and_weight(rows, columns, depth, kind, "cuda")
    expected = head_product_reference(x, weight, scale, norms, rope)
    for _ in range(3):  # numbers are exchanged between programs: no order of them may matter
        actual = head_product(x, weight, scale, norms, rope, tile)
        # A rounding to BF16, here and there another; E4M3's fast sums lose some bits more.
        assert relative_error(actual, expected) < 5e-3
        assert worst_channel(actual, expected) < 2e-2
        assert worst_channel(actual, expected, dim=0) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "e4m3-vector"])
def test_a_product_of_zeros_stays_zero(kind: str) -> None:
    if reason := needs_hopper(torch.cuda.get_device_capability()):
        pytest.skip(reason)
    norms, rope = heads_of((16, 16), 32, "cuda")
    x, weight, scale = values_and_weight(len(rope.table), 3 * 384, 64, kind, "cuda")
    x = replace(x, values=torch.zeros_like(x.values))
    assert not head_product(x, weight, scale, norms, rope).any()
