"""A test bed: the same model, with channel outliers of a chosen size planted into it.

Real transformers grow a few channels whose inputs are thousands of times the rest (w2 of Z-Image
was seen at 344,064), and what is quantized with one scale pays for them. nano has none, so they are
planted without changing what the model computes: what feeds a channel is multiplied by the ratio,
and the column of the next weight that reads it is divided by it.

    input of      is fed by               in block
    q, k, v       attention_norm1.weight
    w1, w3        ffn_norm1.weight
    w2            rows of w3              silu(w1·x) · (w3·x) is linear in w3
    to_out        rows of V               attention is linear in V

The ratio is a power of two, so every product, and with it every sum and every rounding, is the same
number with another exponent: in floats the two models agree bit for bit.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from zimage_fp8.checkpoint.shards import ShardReader, write_index, write_shard
from zimage_fp8.checkpoint.writer import SHARD_STEM, bring_components, complete_or_nothing
from zimage_fp8.errors import UsageError
from zimage_fp8.layout import ZImageConfig, block_names, fused_name, read_config

RATIOS = (1.0, 30.0, 1e3, 1e5)
MAX_RATIO = 2.0**20  # farther than any report; BF16's exponents would take 2^100
CHANNELS = 4  # outlier channels in the input of every linear layer

# Which tensor of a block feeds the input channels of a fused group; a linear's rows, or a norm.
FEEDS: dict[str, str] = {
    "attention_norm1.weight": "attention.to_qkv",
    "ffn_norm1.weight": "feed_forward.w13",
    "feed_forward.w3.weight": "feed_forward.w2",
    "attention.to_v.weight": "attention.to_out.0",
}

Channels = Mapping[str, Tensor]  # fused module -> what its input channels are multiplied by, [in]


def plant_outliers(
    source: Path, out: Path, ratio: float, *, channels: int = CHANNELS, seed: int = 0
) -> float:
    """Write the pipeline folder `source` to `out` with outliers; returns the ratio planted.

    In every block, `channels` input channels of each quantizable linear become the power of two
    nearest to `ratio` times as large, drawn by `seed`. Raises UsageError for a ratio below 1 or
    above 2^20, ZImageError when `out` cannot be written.
    """
    planted = power_of_two(ratio)
    transformer = source / "transformer"
    config, _ = read_config(transformer)
    factors = channel_factors(config, planted, channels, seed)
    with complete_or_nothing(out) as partial, ShardReader(transformer) as reader:
        bring_components(source, partial)
        target = partial / "transformer"
        target.mkdir()
        for file, names in reader.shards():
            write_shard(
                target / file,
                {name: reader.infos[name] for name in names},
                lambda name: multiplied(name, reader.read(name), factors),
                {"format": "pt"},
            )
        if len(reader.files) > 1:
            total = sum(info.num_bytes for info in reader.infos.values())
            write_index(target, SHARD_STEM, reader.shard_of, total)
        (target / "config.json").write_bytes((transformer / "config.json").read_bytes())
    return planted


def power_of_two(ratio: float) -> float:
    """The nearest power of two, on a logarithmic scale: 30 -> 32, 1e3 -> 1024, 1e5 -> 131072."""
    if not 1 <= ratio <= MAX_RATIO:
        raise UsageError(
            f"an outlier ratio of {ratio:g}: expected 1 (none) to {MAX_RATIO:g}", param="ratio"
        )
    return float(2.0 ** round(math.log2(ratio)))


def channel_factors(config: ZImageConfig, ratio: float, channels: int, seed: int) -> Channels:
    """For every fused module of every block, `ratio` on some input channels and 1 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    widths = dict.fromkeys(FEEDS.values(), config.dim) | {"feed_forward.w2": config.ffn_dim}
    factors = {}
    for block in block_names(config):
        for module, width in widths.items():
            factor = torch.ones(width)
            factor[torch.randperm(width, generator=generator)[:channels]] = ratio
            factors[f"{block}.{module}"] = factor
    return factors


def multiplied(name: str, tensor: Tensor, factors: Channels) -> Tensor:
    """What tensor `name` becomes, in its own dtype: rows times what they feed, columns divided."""
    layer = name.removesuffix(".weight")
    for feed, module in FEEDS.items():
        if name.endswith(f".{feed}"):
            factor = factors[name.removesuffix(feed) + module].to(tensor)
            tensor = tensor * (factor if tensor.ndim == 1 else factor[:, None])
    reads = factors.get(fused_name(layer))
    return tensor if reads is None else tensor / reads.to(tensor)
