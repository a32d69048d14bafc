"""RMS norm of Qwen3's query and key heads and their rotation, in place in the packed q, k, v.

Unlike Z-Image's rotation (`kernels.rope`), a channel is paired with the one half a head away, and
there are fewer key and value heads than query heads. Exactness: as `kernels.norm`, an fp32 ulp
before the one rounding.
"""

import torch
from torch import Tensor

from zimage_fp8.kernels.language import next_power_of_2, runs_triton, tl, triton
from zimage_fp8.kernels.rms_norm import rms_norm

Heads = tuple[Tensor, Tensor, Tensor]

HEADS_PER_PROGRAM = 8  # prompts are short: one program per token would leave the GPU half idle


def half_rope_table(tokens: int, head_dim: int, theta: float) -> Tensor:
    """cos and sin of every pair's angle at positions 0 to tokens - 1: fp32
    [tokens, head_dim / 2, 2]. Frequencies and angles are formed in fp32, as Qwen3 was trained."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angle = torch.outer(torch.arange(tokens, dtype=torch.float32), 1.0 / theta**exponent)
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def qwen_norm_rope(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor, kv_heads: int, eps: float
) -> Heads:
    """qkv: [tokens, (heads + 2 · kv_heads) · head_dim] contiguous; weights: [head_dim]; table: of
    `half_rope_table`. Returns q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim];
    on the GPU they are views of qkv, which is overwritten."""
    run = qwen_norm_rope_triton if runs_triton(qkv) else qwen_norm_rope_reference
    return run(qkv, weight_q, weight_k, table, kv_heads, eps)


def qwen_norm_rope_reference(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor, kv_heads: int, eps: float
) -> Heads:
    q, k, v = _heads(qkv, len(weight_q), kv_heads)
    return _turned(q, weight_q, table, eps), _turned(k, weight_k, table, eps), v


def _turned(x: Tensor, weight: Tensor, table: Tensor, eps: float) -> Tensor:
    low, high = rms_norm(x.float(), weight, eps).chunk(2, dim=-1)
    cos, sin = table[:, None].unbind(-1)  # [tokens, 1, head_dim / 2]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(x.dtype)


def _heads(qkv: Tensor, head_dim: int, kv_heads: int) -> Heads:
    heads = qkv.unflatten(-1, (-1, head_dim))
    q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    return q, k, v


def qwen_norm_rope_triton(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor, kv_heads: int, eps: float
) -> Heads:
    tokens, width = qkv.shape
    head_dim = len(weight_q)
    heads = width // head_dim - 2 * kv_heads
    programs = -(-(heads + kv_heads) // HEADS_PER_PROGRAM)
    _qwen_norm_rope_kernel[(tokens, programs)](
        qkv,
        weight_q,
        weight_k,
        table,
        width,
        heads,
        heads + kv_heads,
        eps,
        HALF=head_dim // 2,
        BLOCK_HALF=next_power_of_2(head_dim // 2),
        BLOCK_HEADS=HEADS_PER_PROGRAM,
        num_warps=4,
    )
    return _heads(qkv, head_dim, kv_heads)


@triton.jit
def _qwen_norm_rope_kernel(
    qkv,
    weight_q,
    weight_k,
    table,
    width,
    num_q,
    num_qk,
    eps,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    channel = tl.arange(0, BLOCK_HALF)[None]
    in_head = channel < HALF
    mask = (head < num_qk) & in_head
    target = qkv + row.to(tl.int64) * width + head * (2 * HALF) + channel
    low = tl.load(target, mask, other=0.0).to(tl.float32)
    high = tl.load(target + HALF, mask, other=0.0).to(tl.float32)
    squares = tl.sum(low * low, axis=1, keep_dims=True) + tl.sum(
        high * high, axis=1, keep_dims=True
    )
    rstd = tl.math.rsqrt(squares / (2 * HALF) + eps)
    low = low * rstd * _weight(weight_q, weight_k, channel, in_head, head < num_q)
    high = high * rstd * _weight(weight_q, weight_k, HALF + channel, in_head, head < num_q)
    angle = table + (row * HALF + channel) * 2
    cos = tl.load(angle, in_head, other=0.0)
    sin = tl.load(angle + 1, in_head, other=0.0)
    tl.store(target, (low * cos - high * sin).to(qkv.dtype.element_ty), mask)
    tl.store(target + HALF, (high * cos + low * sin).to(qkv.dtype.element_ty), mask)


@triton.jit
def _weight(weight_q, weight_k, channel, in_head, is_q):
    of_q = tl.load(weight_q + channel, in_head, other=0.0).to(tl.float32)
    of_k = tl.load(weight_k + channel, in_head, other=0.0).to(tl.float32)
    return tl.where(is_q, of_q, of_k)
