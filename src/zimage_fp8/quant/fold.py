"""Channel scales moved out of a linear layer's input, into weights, without changing the model.

Some input channels are far louder than the rest, and whatever shares a scale with them pays. A
channel can be made quieter for free where a tensor feeds it linearly: divide the feeding row or
norm weight by a number, multiply the column that reads the channel by the same.

    input of      is fed by               and the product stays because
    q, k, v       attention_norm1.weight  adaLN's (1 + scale) multiplies channel by channel, too
    w1, w3        ffn_norm1.weight        (the same)
    w2            rows of w3              silu(w1·x) · (w3·x) is linear in w3
    to_out        rows of V               attention is linear in V

The numbers are powers of two: every product is the same number with another exponent, so the folded
model draws the BF16 model's pictures bit for bit, and what is written is a plain checkpoint.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from zimage_fp8.errors import ZImageError
from zimage_fp8.layout import fused_name, members_of

# Which tensor of a block feeds the input channels of a fused group: a norm, or a linear's rows.
FEEDS: dict[str, str] = {
    "attention_norm1.weight": "attention.to_qkv",
    "ffn_norm1.weight": "feed_forward.w13",
    "feed_forward.w3.weight": "feed_forward.w2",
    "attention.to_v.weight": "attention.to_out.0",
}

Read = Callable[[str], Tensor]
Factors = Mapping[str, Tensor]  # fused module -> what its input channels are multiplied by, [in]


def channel_factors(
    modules: Iterable[str], read: Read, channel_amax: Mapping[str, Sequence[float]]
) -> dict[str, Tensor]:
    """Per fused module, the powers of two that balance its inputs against its weight's columns.

    read: tensor name -> the unquantized tensor. channel_amax: fused module -> max |input| of every
    channel. A channel's input and column share its size equally, up to the rounding of the factor;
    the geometric mean of a module's factors is about 1. Channels that are always zero are left.
    """
    factors = {}
    for module in modules:
        columns = [read(f"{m}.weight").float().abs().amax(0) for m in members_of(module)]
        weight = torch.stack(columns).amax(0).cpu().double()
        inputs = torch.tensor(channel_amax[module], dtype=torch.float64)
        ratio = 0.5 * (weight.log2() - inputs.log2())  # infinite where a channel is always zero
        ratio -= ratio[ratio.isfinite()].mean() if ratio.isfinite().any() else 0
        factors[module] = torch.where(ratio.isfinite(), ratio.round(), 0.0).exp2().float()
    return factors


def folded(name: str, tensor: Tensor, factors: Factors) -> Tensor:
    """What tensor `name` becomes, in its own dtype: rows times what they feed, columns divided.

    Raises ZImageError where its dtype cannot hold that exactly (the exponents of F16 are short).
    """
    changed = tensor
    for feed, module in FEEDS.items():
        if name.endswith(f".{feed}") and (name.removesuffix(feed) + module) in factors:
            factor = factors[name.removesuffix(feed) + module].to(tensor)
            changed = changed * (factor if tensor.ndim == 1 else factor[:, None])
    reads = factors.get(fused_name(name.removesuffix(".weight")))
    if name.endswith(".weight") and reads is not None:
        changed = changed / reads.to(tensor)
    if changed is not tensor and not _is_exact(tensor, changed):
        raise ZImageError(
            f"{name} cannot take its channel scales exactly in {tensor.dtype}",
            hint="convert the model to BF16 first",
        )
    return changed


def _is_exact(before: Tensor, after: Tensor) -> bool:
    """Whether only exponents changed: the mantissas of all values are what they were."""
    same: Tensor = before.float().frexp().mantissa == after.float().frexp().mantissa
    return bool(same.all())
