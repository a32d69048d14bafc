"""The names and shapes of a checkpoint, against diffusers' own class."""

import json
from pathlib import Path

import pytest
import torch

from zimage_fp8.errors import ModelError
from zimage_fp8.layout import (
    KINDS,
    ZImageConfig,
    block_names,
    fused_name,
    linear_shapes,
    members_of,
    product_shapes,
    read_config,
    tensor_shapes,
)


def test_full_size_names_and_shapes_are_diffusers() -> None:
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        theirs = ZImageTransformer2DModel().state_dict()
    assert tensor_shapes(ZImageConfig()) == {n: tuple(t.shape) for n, t in theirs.items()}


def test_products_are_the_linears_of_a_block_as_they_are_loaded() -> None:
    config = ZImageConfig()
    linears = linear_shapes(config)
    products = product_shapes(config)
    assert len(products) == len(KINDS)
    for module, (columns, depth) in zip(KINDS, products.values(), strict=True):
        shapes = [linears[name] for name in members_of(f"layers.0.{module}")]
        assert (sum(rows for rows, _ in shapes), {depth}) == (columns, {it for _, it in shapes})
    assert [*products] == [module.removesuffix(".0").rpartition(".")[2] for module in KINDS]


def test_full_size_counts_are_those_of_the_model() -> None:
    config = ZImageConfig()
    linears = linear_shapes(config)
    quantizable = [n for n in linears if ".attention." in n or ".feed_forward." in n]
    assert len(block_names(config)) == 34
    assert (len(linears), len(quantizable)) == (276, 238)
    elements = sum(linears[name][0] * linears[name][1] for name in quantizable)
    assert round(elements / 1e9, 3) == 6.016
    parameters = sum(torch.Size(shape).numel() for shape in tensor_shapes(config).values())
    assert round(parameters / 1e9, 3) == 6.155


def test_fused_names_and_members_are_inverse() -> None:
    for layer in linear_shapes(ZImageConfig(n_layers=1, n_refiner_layers=1)):
        assert layer in members_of(fused_name(layer))
    assert members_of("layers.3.feed_forward.w13") == (
        "layers.3.feed_forward.w1",
        "layers.3.feed_forward.w3",
    )
    assert fused_name("layers.3.feed_forward.w2") == "layers.3.feed_forward.w2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim"),
        ({"n_kv_heads": 1}, "n_kv_heads"),
        ({"qk_norm": False}, "qk_norm"),
    ],
)
def test_another_architecture_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    raw = json.loads((tiny_model / "transformer" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ModelError, match=said):
        read_config(tmp_path)
