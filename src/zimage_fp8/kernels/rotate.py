"""A rotation that spreads outliers: every group of channels times a regular Hadamard matrix.

The matrix of a group of 4^n channels is the n-th Kronecker power of `J/2 - I`, where J is the 4x4
matrix of ones. It is symmetric, orthogonal and its own inverse, and its rows have equal sums, so
a constant offset of a group does not pile up in one channel as under Sylvester's matrix. Applying
it takes n passes of `x <- (a + b + c + d) / 2 - x` over channels 1, 4, 16, ... apart.

Rotating a linear layer's input and, offline, the rows of its weight by the same matrix leaves the
product unchanged. Eight bits then meet values without outliers.
"""

from torch import Tensor


def rotate(x: Tensor, group: int) -> Tensor:
    """Each run of `group` channels of x's last axis, rotated; fp32 inside and out.

    group: a power of four that divides the last axis.
    """
    if x.shape[-1] % group or group & (group - 1) or group.bit_length() % 2 == 0:
        raise ValueError(f"cannot rotate {x.shape[-1]} channels in groups of {group}")
    wide, stride = x.float(), 1
    while stride < group:
        quads = wide.reshape(*x.shape[:-1], -1, 4, stride)
        a, b, c, d = quads.unbind(-2)
        half = 0.5 * ((a + b) + (c + d))
        wide = (half.unsqueeze(-2) - quads).reshape(x.shape)
        stride *= 4
    return wide
