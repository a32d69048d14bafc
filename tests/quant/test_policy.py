"""Policies: which layers, for which reason, and what is refused."""

from pathlib import Path

import pytest

from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.layout import ZImageConfig, linear_shapes
from zimage_fp8.numerics import E4M3_DYNAMIC, E4M3_ROW, E4M3_STATIC, INT8_ROT
from zimage_fp8.quant.policy import PRESETS, STATIC_POLICIES, find_policy, resolve

FULL_SIZE = linear_shapes(ZImageConfig())

# Linears and billions of parameters per policy, as counted on the published checkpoints.
PUBLISHED = {
    "full": (238, 6.016),
    "ffn-attn-qkv": (204, 5.515),
    "ffn-attn-out": (136, 4.512),
    "ffn-only": (102, 4.011),
    "attn-only": (136, 2.005),
    "attn-qkv-only": (102, 1.504),
    "attn-out-only": (34, 0.501),
}


def test_the_seven_static_policies_are_those_of_the_published_family() -> None:
    assert set(STATIC_POLICIES) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_static_policies_quantize_what_the_published_ones_do(name: str) -> None:
    plan = resolve(PRESETS[name], FULL_SIZE)
    parameters = sum(FULL_SIZE[layer][0] * FULL_SIZE[layer][1] for layer in plan.quantized)
    assert (len(plan.quantized), round(parameters / 1e9, 3)) == PUBLISHED[name]
    assert {plan.spec(layer) for layer in plan.quantized} == {E4M3_STATIC}


def test_what_breaks_pictures_is_kept_and_says_why() -> None:
    plan = resolve(PRESETS["full"], FULL_SIZE)
    kept = [layer for layer in FULL_SIZE if plan.spec(layer) is None]
    assert len(kept) == 38
    assert all(plan.entries[layer].why for layer in kept)
    assert "noise" in plan.entries["layers.0.adaLN_modulation.0"].why


def test_online_and_row_policies_need_no_calibration() -> None:
    assert PRESETS["online_fp8"].specs == {E4M3_DYNAMIC}
    assert PRESETS["fp8-row"].specs == {E4M3_ROW}
    assert PRESETS["int8-rot"].specs == {INT8_ROT}
    assert not PRESETS["online_fp8"].needs_calibration
    assert not PRESETS["online_int8-rot"].needs_calibration
    assert PRESETS["int8-rot"].needs_calibration
    assert not PRESETS["bf16_base"].needs_calibration
    assert resolve(PRESETS["bf16_base"], FULL_SIZE).quantized == []


def blocks_of(policy: str) -> set[str]:
    plan = resolve(find_policy(policy), FULL_SIZE)
    return {".".join(layer.split(".")[:2]) for layer in plan.quantized}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("full[0-14]", {f"layers.{i}" for i in range(15)}),
        ("full[1]", {"layers.1"}),  # and not layers.10 to layers.19
        ("full[0,3-4]", {"layers.0", "layers.3", "layers.4"}),
        ("full[29,noise_refiner]", {"layers.29", "noise_refiner.0", "noise_refiner.1"}),
        (
            "ffn-only[!15-29]",
            {f"layers.{i}" for i in range(15)}
            | {f"{stack}_refiner.{i}" for stack in ("noise", "context") for i in range(2)},
        ),
        ("full[!refiners]", {f"layers.{i}" for i in range(30)}),
    ],
)
def test_block_ranges(policy: str, expected: set[str]) -> None:
    assert blocks_of(policy) == expected


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("fulll", "unknown policy 'fulll'"),
        ("full[", "no closing"),
        ("full[]", "cannot read ''"),
        ("full[a-b]", "cannot read 'a-b'"),
        ("full[7-3]", "not a range"),
        ("full[0-30]", r"no layer of this model matches 'layers.30"),
        ("full[!31]", r"no layer of this model matches 'layers.31"),
    ],
)
def test_a_bad_policy_is_one_sentence(policy: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        resolve(find_policy(policy), FULL_SIZE)


TOML = """
name = "gentle"
summary = "Feed-forward in FP8, except block 0."

[[rule]]
layers = "layers.0.*"
spec = "keep"
why = "first blocks hurt most"

[[rule]]
layers = "*.feed_forward.w[123]"
spec = "e4m3-row"
why = "two thirds of the parameters"
"""


def written(folder: Path, text: str) -> str:
    path = folder / "policy.toml"
    path.write_text(text)
    return str(path)


def test_a_policy_file_is_ordered_rules(tmp_path: Path) -> None:
    plan = resolve(find_policy(written(tmp_path, TOML)), FULL_SIZE)
    assert plan.policy == "gentle"
    assert len(plan.quantized) == 33 * 3
    assert plan.entries["layers.0.feed_forward.w1"].why == "first blocks hurt most"
    assert plan.spec("layers.1.feed_forward.w1") == E4M3_ROW
    assert plan.spec("layers.1.attention.to_q") is None


def test_a_policy_file_cannot_quantize_what_breaks_pictures(tmp_path: Path) -> None:
    everything = TOML.replace("*.feed_forward.w[123]", "*")
    plan = resolve(find_policy(written(tmp_path, everything)), FULL_SIZE)
    assert plan.spec("layers.1.adaLN_modulation.0") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('spec = "e4m3-row"', 'spec = "fp4"'), "'fp4'.*is unknown"),
        (('why = "two', 'because = "two'), "rule.1"),
        (('name = "gentle"', 'name = "full"'), "preset"),
        (('name = "gentle"', "name = "), "not valid TOML"),
        (('name = "gentle"', 'name = "../up"'), "becomes a folder's"),
        (("*.feed_forward.w[123]", "*.feed_forward.w1"), "mixes precisions"),
        (("layers.0.*", "layer.0.*"), "no layer of this model matches"),
    ],
)
def test_a_bad_policy_file_says_what_is_wrong(
    tmp_path: Path, change: tuple[str, str], said: str
) -> None:
    with pytest.raises(ZImageError, match=said):
        resolve(find_policy(written(tmp_path, TOML.replace(*change))), FULL_SIZE)


def test_a_missing_policy_file(tmp_path: Path) -> None:
    with pytest.raises(ZImageError, match="does not exist"):
        find_policy(str(tmp_path / "none.toml"))


def test_a_shape_that_fp8_gemm_cannot_take_is_refused() -> None:
    odd = linear_shapes(ZImageConfig(dim=32, n_heads=1, n_layers=1, n_refiner_layers=1))
    with pytest.raises(UsageError, match=r"\[85, 32\].*multiples of 16"):
        resolve(PRESETS["full"], odd)
