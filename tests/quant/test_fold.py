"""Channel scales folded into weights: the model stays the same, its outliers go."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from compare import same_bits
from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import ZImageError
from zimage_fp8.layout import block_names, read_config
from zimage_fp8.model.weights import load_transformer
from zimage_fp8.model.z_image import ZImageTransformer
from zimage_fp8.quant.fold import FEEDS, channel_factors, folded

CPU = torch.device("cpu")
MODULE = "layers.0.attention.to_qkv"


def weights(columns: list[float]) -> Mapping[str, torch.Tensor]:
    weight = torch.tensor([columns, [-0.5 * x for x in columns]])
    return {f"layers.0.attention.to_{m}.weight": weight for m in "qkv"}


def test_a_channel_and_its_column_share_their_size_equally() -> None:
    """Input 64 times a column of 1: both become 8, measured against the channel in balance."""
    amax = {MODULE: (1.0, 64.0, 1.0, 1 / 64)}
    factors = channel_factors([MODULE], weights([1.0] * 4).__getitem__, amax)
    assert factors[MODULE].tolist() == [1.0, 0.125, 1.0, 8.0]


def test_a_loud_input_with_a_quiet_column_is_exchanged() -> None:
    """What planting an outlier does, undone: 1,024 times the input, a 1,024th of the column."""
    amax = {MODULE: (1024.0, 1.0, 1.0, 1.0)}
    factors = channel_factors([MODULE], weights([2.0**-10, 1, 1, 1]).__getitem__, amax)[MODULE]
    assert (factors[0] / factors[1]).item() == 2.0**-10


def test_channels_that_are_always_zero_are_left_alone() -> None:
    amax = {MODULE: (0.0, 4.0, 1.0, 1.0)}
    factors = channel_factors([MODULE], weights([1.0, 1.0, 1.0, 0.0]).__getitem__, amax)
    assert factors[MODULE].isfinite().all()
    assert factors[MODULE][[0, 3]].tolist() == [1.0, 1.0]


@torch.inference_mode()
def velocity(model: ZImageTransformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 16, 8, 8, generator=generator)
    caption = torch.randn(1, 32, 32, generator=generator).to(torch.bfloat16)
    refined = model.refine_caption(caption, torch.arange(32)[None] >= 20)
    out: torch.Tensor = model(latent, torch.tensor([0.3]), refined)
    return out


def test_a_folded_model_computes_the_same_bits(tiny_model: Path) -> None:
    """Any powers of two, in BF16: sums and roundings are the same with other exponents."""
    folder = tiny_model / "transformer"
    config, _ = read_config(folder)
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for block in block_names(config):
        for module in FEEDS.values():
            width = config.ffn_dim if module.endswith("w2") else config.dim
            exponents = torch.randint(-8, 9, (width,), generator=generator)
            factors[f"{block}.{module}"] = exponents.float().exp2()
    model = load_transformer(
        folder, policy=None, calibration=None, dtype=torch.bfloat16, device=CPU
    ).model
    before = velocity(model)
    changed = 0
    with ShardReader(folder) as reader, torch.no_grad():
        for name, parameter in model.named_parameters():
            members = {"to_qkv": ("to_q", "to_k", "to_v"), "w13": ("w1", "w3")}
            fused = next((f for f in members if f".{f}." in name), None)
            names = [name.replace(fused, m) for m in members[fused]] if fused else [name]
            value = torch.cat([folded(n, reader.read(n), factors) for n in names])
            changed += not torch.equal(parameter, value)
            parameter.copy_(value)
    assert changed == len(factors) + 2 * len(block_names(config))  # every layer and two norms
    same_bits(velocity(model), before)


def test_what_a_dtype_cannot_hold_is_refused() -> None:
    name = "layers.0.attention_norm1.weight"
    factors = {MODULE: torch.tensor([2.0**20, 1.0])}
    weight = torch.tensor([1.0, 1.0])
    assert folded(name, weight.bfloat16(), factors).tolist() == [2.0**20, 1.0]
    with pytest.raises(ZImageError, match=r"attention_norm1.weight cannot take.*float16"):
        folded(name, weight.half(), factors)
