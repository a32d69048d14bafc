"""A test bed: the same model, with channel outliers of a chosen size planted into it.

Real transformers grow a few channels whose inputs are thousands of times the rest (w2 of Z-Image
was seen at 344,064), and what is quantized with one scale pays for them. nano has none, so they are
planted without changing what the model computes: by folding (`quant.fold`) backwards. What feeds a
channel is multiplied by the ratio, and the column of the next weight that reads it is divided by
it. The ratio is a power of two, so every product, and with it every sum and every rounding, is the
same number with another exponent: in floats the two models agree bit for bit.

The other kind of outlier is a token that is loud in all its channels. Weights are shared by all
tokens, so none can be planted there; but a token can be made loud around a layer: multiplied by a
power of two before the layer, divided by it after (`loud_tokens`). A linear layer without bias
computes each token by itself, so that, too, leaves the unquantized model as it was, bit for bit.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from zimage_fp8.checkpoint.shards import ShardReader, write_index, write_shard
from zimage_fp8.checkpoint.writer import SHARD_STEM, bring_components, complete_or_nothing
from zimage_fp8.errors import UsageError
from zimage_fp8.layout import ZImageConfig, block_names, fused_name, read_config
from zimage_fp8.quant.calibrate import Calibration
from zimage_fp8.quant.fold import FEEDS, Factors, folded

RATIOS = (1.0, 30.0, 1e3, 1e5)
MAX_RATIO = 2.0**20  # farther than any report; BF16's exponents would take 2^100
CHANNELS = 4  # outlier channels in the input of every linear layer
TOKENS = 4  # loud tokens in the input of every linear layer


def plant_outliers(
    source: Path, out: Path, ratio: float, *, channels: int = CHANNELS, seed: int = 0
) -> float:
    """Write the pipeline folder `source` to `out` with outliers; returns the ratio planted.

    In every block, `channels` input channels of each quantizable linear become the power of two
    nearest to `ratio` times as large, drawn by `seed`. Raises UsageError for a ratio below 1 or
    above 2^20, ZImageError when `out` cannot be written.
    """
    planted = power_of_two(ratio)
    config, _ = read_config(source / "transformer")
    write_folded(source, out, channel_factors(config, planted, channels, seed))
    return planted


def write_folded(source: Path, out: Path, factors: Factors) -> None:
    """Write the pipeline folder `source` to `out` with channel scales folded: the same pictures.

    Raises ZImageError when `out` cannot be written, or a weight's dtype cannot hold the result.
    """
    transformer = source / "transformer"
    with complete_or_nothing(out) as partial, ShardReader(transformer) as reader:
        bring_components(source, partial)
        target = partial / "transformer"
        target.mkdir()
        for file, names in reader.shards():
            write_shard(
                target / file,
                {name: reader.infos[name] for name in names},
                lambda name: folded(name, reader.read(name), factors),
                {"format": "pt"},
            )
        if len(reader.files) > 1:
            total = sum(info.num_bytes for info in reader.infos.values())
            write_index(target, SHARD_STEM, reader.shard_of, total)
        (target / "config.json").write_bytes((transformer / "config.json").read_bytes())


def power_of_two(ratio: float) -> float:
    """The nearest power of two, on a logarithmic scale: 30 -> 32, 1e3 -> 1024, 1e5 -> 131072."""
    if not 1 <= ratio <= MAX_RATIO:
        raise UsageError(
            f"an outlier ratio of {ratio:g}: expected 1 (none) to {MAX_RATIO:g}", param="ratio"
        )
    return float(2.0 ** round(math.log2(ratio)))


def channel_factors(config: ZImageConfig, ratio: float, channels: int, seed: int) -> Factors:
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


def multiplied(calibration: Calibration, factors: Factors) -> Calibration:
    """What calibrating the same model finds once the channels of its inputs are `factors` times as
    large; without the maxima per step, which are not known by channel."""
    channels = {
        module: (torch.tensor(values) * factors.get(module, torch.ones(()))).tolist()
        for module, values in calibration.channel_amax.items()
    }
    amax = {layer: (max(channels[fused_name(layer)]),) for layer in calibration.amax}
    loud = {module: tuple(values) for module, values in channels.items()}
    return replace(calibration, amax=amax, channel_amax=loud)


@contextmanager
def loud_tokens(
    model: nn.Module,
    modules: Sequence[str],
    ratio: float,
    *,
    tokens: int = TOKENS,
    seed: int = 0,
) -> Iterator[float]:
    """While open, `tokens` tokens in the input of each of `modules` are louder; yields the ratio.

    They become the power of two nearest to `ratio` times as large before the layer, whatever takes
    its place, and its output is divided by the same. Each module has its own tokens, drawn by
    `seed` as places along the sequence; observers that come later see the loud input. Raises
    UsageError for a ratio below 1 or above 2^20.
    """
    planted = power_of_two(ratio)
    generator = torch.Generator().manual_seed(seed)
    handles = []
    try:
        for name in modules:
            loud = _Loud(planted, torch.rand(tokens, generator=generator))
            layer = model.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(loud.before))
            handles.append(layer.register_forward_hook(loud.after))
        yield planted
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Loud:
    """places: where along the sequence the loud tokens are, from 0 to below 1."""

    ratio: float
    places: Tensor

    def before(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0] * self._factor(inputs[0]),)

    def after(self, _layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output / self._factor(output)

    def _factor(self, x: Tensor) -> Tensor:
        """[tokens, 1] of x [..., tokens, channels]."""
        factor = torch.ones(x.shape[-2], 1)
        factor[(self.places * x.shape[-2]).long()] = self.ratio
        return factor.to(x)
