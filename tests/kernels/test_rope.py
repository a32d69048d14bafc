"""RoPE against complex multiplication in fp64."""

import torch

from compare import relative_error
from zimage_fp8.kernels import apply_rope, rope_table


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
