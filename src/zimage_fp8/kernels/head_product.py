"""Attention's packed projection with the norm and the rotation of its heads, in one kernel.

A tile and the one beside it are three heads (`head_product.cuh`): q and k are written once, normed
and rotated, where `qk_norm_rope` reads and writes them again.

Exactness. Products are not rounded between product and norm, which `matmul` followed by
`qk_norm_rope` does: this is the more exact of the two.
"""

import torch
from torch import Tensor

from zimage_fp8.kernels.activation import Activation
from zimage_fp8.kernels.hopper import hopper_refusal
from zimage_fp8.kernels.language import runs_triton
from zimage_fp8.kernels.qk_norm_rope import HeadNorms, qk_norm_rope_reference
from zimage_fp8.kernels.rope import Rope
from zimage_fp8.kernels.scaled_mm import scaled_mm
from zimage_fp8.kernels.tile import Tile
from zimage_fp8.kernels.wgmma import HEAD_DIM, HEADS_TILE, wgmma_heads


def head_product(
    x: Activation,
    weight: Tensor,
    weight_scale: Tensor | None,
    norms: HeadNorms,
    rope: Rope,
    tile: Tile | None = None,
) -> Tensor:
    """x: [batch · tokens, in]; weight: [3 · heads · head_dim, in], q above k above v; both BF16 or
    codes; rope: of a picture's tokens. Returns q, k and v side by side,
    [batch · tokens, 3 · heads · head_dim], q and k normed and rotated, in the dtype of the norms.

    Raises ValueError when the kernel cannot run it.
    """
    if not runs_triton(weight):
        return head_product_reference(x, weight, weight_scale, norms, rope)
    reason = hopper_refusal(weight.device) or unfit(weight, norms, rope)
    if reason:
        raise ValueError(f"the product with norm and rotation cannot run this: {reason}")
    return wgmma_heads(x, weight, weight_scale, norms, rope, tile)


def unfit(weight: Tensor, norms: HeadNorms, rope: Rope) -> str | None:
    """Why the kernel's tiles do not fit these heads, or None."""
    dtype, head_dim = norms.weight_q.dtype, len(norms.weight_q)
    columns = HEADS_TILE.n * HEADS_TILE.cluster
    if head_dim != HEAD_DIM or len(weight) % (3 * columns):
        return (
            f"{len(weight) // 3 // head_dim} heads of {head_dim} channels; "
            f"expected a multiple of {columns // HEAD_DIM} of {HEAD_DIM}"
        )
    if dtype != torch.bfloat16:
        return f"norms in {dtype}, expected torch.bfloat16"
    return "a picture with more places than the table of rotations" if rope.along is None else None


def head_product_reference(
    x: Activation, weight: Tensor, weight_scale: Tensor | None, norms: HeadNorms, rope: Rope
) -> Tensor:
    if x.scale is None or weight_scale is None:
        wide = x.values.float() @ weight.float().T
    else:
        wide = scaled_mm(x.values, x.scale, weight, weight_scale, torch.float32)
    qkv = wide.unflatten(0, (-1, len(rope.table)))
    heads = qk_norm_rope_reference(qkv, norms, rope.table)
    return torch.stack(heads, dim=2).flatten(2).flatten(0, 1).to(norms.weight_q.dtype)
