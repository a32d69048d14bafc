"""RMS norm of every query and key head and their rotary rotation, on the packed q, k, v.

One program per token reads its q and k once and writes them back; v is not touched. Attention in
8 bits reads codes instead: then v is read too, and the codes of all three go to memory of their
own. Exactness: as `kernels.norm`, an fp32 ulp before the one rounding.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zimage_fp8.kernels.activation import FORMATS, codes_of
from zimage_fp8.kernels.language import next_power_of_2, runs_triton, tl, triton
from zimage_fp8.kernels.rms_norm import rms_norm
from zimage_fp8.kernels.rope import apply_rope
from zimage_fp8.numerics import DTYPE, QMAX, quantize

Heads = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class HeadNorms:
    """The RMS norms of q's and k's heads. Weights: [head_dim]. by_lane: both as a lane of the fused
    kernel reads them, which holds one pair in four: [2, 4, head_dim / 8, 2], or None where a head
    is no multiple of eight."""

    weight_q: Tensor
    weight_k: Tensor
    eps: float
    by_lane: Tensor | None = field(init=False)  # made here: a graph must not be what makes it

    def __post_init__(self) -> None:
        both = torch.stack([self.weight_q, self.weight_k])
        whole = both.shape[1] % 8 == 0
        by_lane = both.reshape(2, -1, 4, 2).transpose(1, 2).contiguous() if whole else None
        object.__setattr__(self, "by_lane", by_lane)


def qk_norm_rope(
    qkv: Tensor, norms: HeadNorms, table: Tensor, scale: Tensor | None = None
) -> Heads:
    """qkv: [batch, tokens, 3 · heads · head_dim]; table: fp32 [tokens, head_dim / 2, 2]; scale:
    fp32 [3, batch, heads], of q, k and v, or None for values of qkv's dtype. Returns q, k, v:
    [batch, tokens, heads, head_dim], E4M3 codes under `scale`; on the GPU values without a scale
    are views of qkv, which is overwritten."""
    run = qk_norm_rope_triton if runs_triton(qkv) else qk_norm_rope_reference
    return run(qkv, norms, table, scale)


def qk_norm_rope_reference(
    qkv: Tensor, norms: HeadNorms, table: Tensor, scale: Tensor | None = None
) -> Heads:
    q, k, v = split_heads(qkv, len(norms.weight_q))
    q = apply_rope(rms_norm(q.float(), norms.weight_q, norms.eps), table)
    k = apply_rope(rms_norm(k.float(), norms.weight_k, norms.eps), table)
    if scale is None:
        return q.to(qkv.dtype), k.to(qkv.dtype), v
    of_q, of_k, of_v = scale[:, :, None, :, None]
    return quantize(q, of_q, "e4m3"), quantize(k, of_k, "e4m3"), quantize(v, of_v, "e4m3")


def qk_norm_rope_triton(
    qkv: Tensor, norms: HeadNorms, table: Tensor, scale: Tensor | None = None
) -> Heads:
    batch, tokens, width = qkv.shape
    head_dim = len(norms.weight_q)
    heads = width // (3 * head_dim)
    out = qkv if scale is None else torch.empty_like(qkv, dtype=DTYPE["e4m3"])
    _qk_norm_rope_kernel[(batch * tokens,)](
        qkv,
        out,
        norms.weight_q,
        norms.weight_k,
        table,
        qkv if scale is None else scale,  # without one it is not read
        batch,
        tokens,
        width,
        norms.eps,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=next_power_of_2(2 * heads),
        FORMAT=FORMATS[None if scale is None else "e4m3"],
        QMAX=QMAX["e4m3"],
        num_warps=8 if width > 4096 else 4,
    )
    return split_heads(out, head_dim)


def split_heads(qkv: Tensor, head_dim: int) -> Heads:
    """[batch, tokens, 3 · heads · head_dim] as q, k and v, [batch, tokens, heads, head_dim]."""
    q, k, v = qkv.reshape(*qkv.shape[:2], 3, -1, head_dim).unbind(2)
    return q, k, v


def reach_of_norm(weight: Tensor) -> Tensor:
    """The largest magnitude that a head can have here, fp32 []: an RMS norm leaves a vector of
    length √head_dim at most, and the rotation keeps the length of each pair."""
    return math.sqrt(len(weight)) * weight.float().abs().amax()


@triton.jit
def _qk_norm_rope_kernel(
    qkv, out, weight_q, weight_k, table, scale, batch, tokens, width, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    FORMAT: tl.constexpr, QMAX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None]
    mask = head < 2 * HEADS
    at = row.to(tl.int64) * width + head * HEAD_DIM + channel
    x = tl.load(qkv + at, mask, other=0.0).to(tl.float32)
    w_q = tl.load(weight_q + channel).to(tl.float32)
    w_k = tl.load(weight_k + channel).to(tl.float32)
    rstd = tl.math.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / HEAD_DIM + eps)
    x = x * rstd * tl.where(head < HEADS, w_q, w_k)
    even, odd = tl.split(tl.reshape(x, (BLOCK_HEADS, HEAD_DIM // 2, 2)))
    pair = tl.arange(0, HEAD_DIM // 2)[None]
    angle = table + ((row % tokens) * (HEAD_DIM // 2) + pair) * 2
    cos, sin = tl.load(angle), tl.load(angle + 1)
    turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    x = tl.reshape(turned, (BLOCK_HEADS, HEAD_DIM))
    if FORMAT:
        # The scales lie as q's, k's and v's of every picture: [3, batch, heads].
        of_head = scale + (row // tokens) * HEADS + head % HEADS
        each = batch * HEADS
        s = tl.load(of_head + head // HEADS * each, mask, other=1.0)
        tl.store(out + at, codes_of(x, s, FORMAT, QMAX).to(out.dtype.element_ty), mask)
        head_v = tl.arange(0, BLOCK_HEADS // 2)[:, None]
        mask_v = head_v < HEADS
        at_v = row.to(tl.int64) * width + (2 * HEADS + head_v) * HEAD_DIM + channel
        v = tl.load(qkv + at_v, mask_v, other=0.0).to(tl.float32)
        s_v = tl.load(scale + 2 * each + (row // tokens) * HEADS + head_v, mask_v, other=1.0)
        tl.store(out + at_v, codes_of(v, s_v, FORMAT, QMAX).to(out.dtype.element_ty), mask_v)
    else:
        tl.store(out + at, x.to(out.dtype.element_ty), mask)
