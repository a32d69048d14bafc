"""Softmax attention over all tokens. No mask: Z-Image's padding tokens are learned and attended."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v: [batch, tokens, heads, head_dim]. Returns [batch, tokens, heads · head_dim]."""
    mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return mixed.transpose(1, 2).flatten(2)
