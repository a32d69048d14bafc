"""RoPE against complex multiplication in fp64."""

import pytest
import torch

from compare import relative_error, same_bits
from zimage_fp8.kernels import apply_rope, rope_table
from zimage_fp8.kernels.rope import PLACE_BITS, PLACES, Rope, first_blocks
from zimage_fp8.model.z_image import caption_positions, image_positions

CPU = torch.device("cpu")


def test_rotation_equals_complex_multiplication() -> None:
    positions = torch.tensor([[0, 0, 0], [1, 0, 5], [33, 63, 2]])
    dims, theta = (8, 12, 12), 256.0
    x = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0))
    angles = torch.cat(
        [
            positions[:, a, None].double()
            * theta ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)
            for a, d in enumerate(dims)
        ],
        dim=1,
    )
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.view_as_real(turned).flatten(-2)
    assert relative_error(apply_rope(x, rope_table(positions, dims, theta)), expected) < 2e-7


def test_position_zero_changes_nothing_and_dtype_is_kept() -> None:
    table = rope_table(torch.zeros(5, 3, dtype=torch.int64), (4, 2, 2), 256.0)
    x = torch.randn(1, 5, 2, 8).to(torch.bfloat16)
    assert torch.equal(apply_rope(x, table), x)


@pytest.mark.parametrize("dims", [(32, 48, 48), (16, 16, 32)])
def test_the_same_rotations_by_axis(dims: tuple[int, int, int]) -> None:
    """What a kernel looks up by a token's places is what PyTorch reads from the token's row."""
    positions = torch.cat([image_positions(64, 48, 40), caption_positions(40)])
    rope = Rope.of(positions, dims, 256.0, CPU)
    assert rope.along is not None
    assert rope.positions is not None
    assert rope.axes == first_blocks(dims)
    for block in range(sum(dims) // 8):
        axis = sum(block >= first for first in rope.axes)
        places = rope.positions.long() >> PLACE_BITS * axis & PLACES - 1
        found = rope.along[block // 2, places, :, block % 2]  # [tokens, 4, 2]
        same_bits(found, rope.table[:, 4 * block : 4 * block + 4])


@pytest.mark.parametrize(
    ("place", "dims"), [(PLACES, (32, 48, 48)), (5, (8, 16, 16))], ids=["too far", "one block"]
)
def test_without_a_table_by_axis_there_is_the_plain_one(
    place: int, dims: tuple[int, int, int]
) -> None:
    rope = Rope.of(torch.tensor([[0, 0, place]]), dims, 256.0, CPU)
    assert rope.along is None
    assert rope.positions is None
    same_bits(rope.table, rope_table(torch.tensor([[0, 0, place]]), dims, 256.0))
