"""The gate of the feed-forward: `silu(w1 x) · (w3 x)`."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(w13: Tensor) -> Tensor:
    """w13: [..., 2 · hidden], the outputs of w1 and w3 side by side. Returns [..., hidden],
    computed in fp32 and rounded once."""
    gate, value = w13.float().chunk(2, dim=-1)
    return (F.silu(gate) * value).to(w13.dtype)
