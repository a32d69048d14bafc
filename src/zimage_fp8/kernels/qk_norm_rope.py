"""RMS norm of every query and key head and their rotary rotation, in place in the packed q, k, v.

One program per token reads its q and k once and writes them back; v is not touched. Exactness: as
`kernels.norm`, an fp32 ulp before the one rounding.
"""

from torch import Tensor

from zimage_fp8.kernels.language import next_power_of_2, runs_triton, tl, triton
from zimage_fp8.kernels.rms_norm import rms_norm
from zimage_fp8.kernels.rope import apply_rope

Heads = tuple[Tensor, Tensor, Tensor]


def qk_norm_rope(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor, eps: float
) -> Heads:
    """qkv: [batch, tokens, 3 · heads · head_dim]; weights: [head_dim]; table: fp32
    [tokens, head_dim / 2, 2]. Returns q, k, v: [batch, tokens, heads, head_dim]; on the GPU they
    are views of qkv, which is overwritten."""
    run = qk_norm_rope_triton if runs_triton(qkv) else qk_norm_rope_reference
    return run(qkv, weight_q, weight_k, table, eps)


def qk_norm_rope_reference(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor, eps: float
) -> Heads:
    q, k, v = _heads(qkv, len(weight_q))
    q = apply_rope(rms_norm(q.float(), weight_q, eps), table).to(qkv.dtype)
    k = apply_rope(rms_norm(k.float(), weight_k, eps), table).to(qkv.dtype)
    return q, k, v


def qk_norm_rope_triton(
    qkv: Tensor, weight_q: Tensor, weight_k: Tensor, table: Tensor, eps: float
) -> Heads:
    batch, tokens, width = qkv.shape
    head_dim = len(weight_q)
    heads = width // (3 * head_dim)
    _qk_norm_rope_kernel[(batch * tokens,)](
        qkv,
        weight_q,
        weight_k,
        table,
        tokens,
        width,
        eps,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=next_power_of_2(2 * heads),
        num_warps=8 if width > 4096 else 4,
    )
    return _heads(qkv, head_dim)


def _heads(qkv: Tensor, head_dim: int) -> Heads:
    q, k, v = qkv.reshape(*qkv.shape[:2], 3, -1, head_dim).unbind(2)
    return q, k, v


@triton.jit
def _qk_norm_rope_kernel(
    qkv,
    weight_q,
    weight_k,
    table,
    tokens,
    width,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None]
    mask = head < 2 * HEADS
    target = qkv + row.to(tl.int64) * width + head * HEAD_DIM + channel
    x = tl.load(target, mask, other=0.0).to(tl.float32)
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
    tl.store(target, x.to(qkv.dtype.element_ty), mask)
