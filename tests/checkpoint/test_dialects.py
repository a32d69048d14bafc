"""The ModelOpt dialect: our config, other writers' configs, and vLLM's way of matching."""

import json
from fnmatch import fnmatchcase
from typing import Any

import pytest

from zimage_fp8.checkpoint.dialects import (
    CONFIG_KEY,
    algorithm_of,
    ignore_list,
    read_stored,
    stored_infos,
    tensor_problems,
    write_config,
)
from zimage_fp8.checkpoint.shards import TensorInfo
from zimage_fp8.errors import ModelError, UsageError
from zimage_fp8.layout import ZImageConfig, fused_name, linear_shapes, tensor_shapes
from zimage_fp8.numerics import E4M3_ROW, E4M3_STATIC, INT8_ROT
from zimage_fp8.quant.policy import STATIC_POLICIES, Plan, Policy, Rule, find_policy, resolve

CONFIG = ZImageConfig()
LINEARS = linear_shapes(CONFIG)
STORABLE = [*STATIC_POLICIES, "fp8-row", "full[0-14]", "ffn-only[!15-29]", "full[!1]"]


def plan_of(policy: str) -> Plan:
    return resolve(find_policy(policy), LINEARS)


@pytest.mark.parametrize("policy", [*STORABLE, "int8-rot", "int8-rot[!refiners]"])
def test_a_config_reads_back_as_its_plan(policy: str) -> None:
    plan = plan_of(policy)
    raw = write_config(plan, {"dim": 3840}, {"version": "0"}, LINEARS)
    stored = read_stored(raw, LINEARS)
    assert stored is not None
    assert stored.plan.policy == policy
    assert {n: stored.plan.spec(n) for n in LINEARS} == {n: plan.spec(n) for n in LINEARS}


@pytest.mark.parametrize("policy", STORABLE)
def test_vllm_would_quantize_the_same_fused_modules(policy: str) -> None:
    """Its rule, written again: a runtime name is ignored when equal, contained or matched."""
    plan, ignore = plan_of(policy), ignore_list(plan_of(policy))
    for layer in LINEARS:
        if ".attention." not in layer and ".feed_forward." not in layer:
            continue  # vLLM-Omni never gives these a quantization config
        name = fused_name(layer)
        ignored = any(p in name or fnmatchcase(name, p) for p in ignore)
        assert ignored == (plan.spec(layer) is None), name


@pytest.mark.parametrize(
    ("policy", "own"),
    [
        ("full", []),
        ("ffn-only", ["*attention*"]),
        ("attn-only", ["*feed_forward*"]),
        ("ffn-attn-qkv", ["*attention.to_out*"]),
        ("ffn-attn-out", ["*attention.to_q*", "*attention.to_k*", "*attention.to_v*"]),
    ],
)
def test_the_ignore_list_is_short_and_has_the_text_encoder(policy: str, own: list[str]) -> None:
    ignore = ignore_list(plan_of(policy))
    assert ignore[:2] == ["model*", "lm_head*"]
    assert ignore[7:] == own
    assert all("*" in pattern for pattern in ignore)


def stored_with(config: dict[str, object]) -> Plan:
    stored = read_stored({CONFIG_KEY: config}, LINEARS)
    assert stored is not None
    return stored.plan


def test_modelopt_s_own_forms_are_read() -> None:
    ignored = ["*attention*", "model*"]
    flat = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ignored}
    nested = {
        "quant_method": "modelopt",
        "quantization": {"quant_algo": "FP8", "exclude_modules": ignored},
    }
    for config in (flat, nested):
        plan = stored_with(config)
        assert plan.spec("layers.0.feed_forward.w2") == E4M3_STATIC
        assert plan.spec("layers.0.attention.to_q") is None
    assert (
        stored_with(flat | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}).spec(
            "layers.0.feed_forward.w2"
        )
        == E4M3_ROW
    )


def test_the_wrong_key_in_the_flat_form_excludes_nothing() -> None:
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["*attention*"]}
    assert stored_with(config).spec("layers.0.attention.to_q") == E4M3_STATIC


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "torchao"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "modelopt"},
        "fp8",
    ],
)
def test_other_formats_are_refused_by_name(config: object) -> None:
    with pytest.raises(ModelError):
        read_stored({CONFIG_KEY: config}, LINEARS)


def test_policies_that_cannot_be_stored_say_what_to_do() -> None:
    with pytest.raises(UsageError, match="needs no checkpoint") as raised:
        algorithm_of(plan_of("online_fp8"))
    assert "--policy online_fp8" in str(raised.value.hint)
    with pytest.raises(UsageError, match="quantizes nothing"):
        algorithm_of(plan_of("bf16_base"))


MIXED = Policy(
    "mixed",
    "Three formats.",
    (
        Rule("layers.0.*.w[123]", INT8_ROT, "first"),
        Rule("layers.1.*.w[123]", E4M3_STATIC, "second"),
        Rule("layers.2.*.w[123]", E4M3_ROW, "third"),
        Rule("*", None, "rest"),
    ),
)


def own_config_of_mixed() -> dict[str, object]:
    raw = write_config(resolve(MIXED, LINEARS), {}, {"version": "0"}, LINEARS)
    config = json.loads(json.dumps(raw[CONFIG_KEY]))
    assert isinstance(config, dict)
    return config


def test_several_formats_share_a_checkpoint_of_our_own_method() -> None:
    plan, config = resolve(MIXED, LINEARS), own_config_of_mixed()
    assert config["quant_method"] == "zimage-fp8"
    assert set(config["schemes"]) == {"int8-rot", "e4m3-static", "e4m3-row"}
    assert config["layers"]["layers.0.feed_forward.w2"] == {
        "scheme": "int8-rot",
        "rotation_group": 256,
    }
    assert config["layers"]["layers.1.feed_forward.w2"] == {"scheme": "e4m3-static"}
    read = stored_with(config)
    assert {n: read.spec(n) for n in LINEARS} == {n: plan.spec(n) for n in LINEARS}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("format_version",), 2, "format_version is 2"),
        (("activation_clip",), 0.9, "activation_clip.*not permitted"),
        (("layers", "layers.0.feed_forward.w1", "rotation_group"), 64, "groups of 64, expected"),
        (("layers", "layers.0.feed_forward.w1", "scheme"), "int4", "'int4', which is not"),
        (("layers", "layers.99.feed_forward.w1"), {"scheme": "int8-rot"}, "no linear layer"),
        (("schemes", "int8-rot", "format"), "int4", "schemes.int8-rot"),
    ],
)
def test_what_would_be_misread_is_refused(path: tuple[str, ...], value: object, said: str) -> None:
    config = own_config_of_mixed()
    place: Any = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ModelError, match=said):
        stored_with(config)


def test_tensors_of_a_rotated_checkpoint() -> None:
    infos = stored_infos(plan_of("int8-rot"), tensor_shapes(CONFIG))
    assert infos["layers.0.feed_forward.w2.weight"] == TensorInfo("I8", (3840, 10240))
    assert infos["layers.0.feed_forward.w2.weight_scale"] == TensorInfo("F32", (3840,))
    assert "layers.0.feed_forward.w2.input_scale" not in infos


def test_tensors_of_a_static_checkpoint() -> None:
    infos = stored_infos(plan_of("full"), tensor_shapes(CONFIG))
    assert infos["layers.0.attention.to_q.weight"] == TensorInfo("F8_E4M3", (3840, 3840))
    assert infos["layers.0.attention.to_q.weight_scale"] == TensorInfo("F32", ())
    assert infos["layers.0.attention.to_q.input_scale"] == TensorInfo("F32", ())
    assert infos["layers.0.adaLN_modulation.0.weight"].dtype == "BF16"
    assert len(infos) == 521 + 2 * 238
    rows = stored_infos(plan_of("fp8-row"), tensor_shapes(CONFIG))
    assert rows["layers.0.feed_forward.w1.weight_scale"] == TensorInfo("F32", (10240,))
    assert "layers.0.feed_forward.w1.input_scale" not in rows


def test_size_after_quantizing_matches_the_published_savings() -> None:
    """GiB saved in the transformer, as computed from the published checkpoints' tensors."""
    saved = {"full": 5.603, "ffn-only": 3.735, "attn-only": 1.868, "attn-out-only": 0.467}
    shapes = tensor_shapes(CONFIG)
    before = sum(TensorInfo("BF16", shape).num_bytes for shape in shapes.values())
    for policy, gib in saved.items():
        after = sum(i.num_bytes for i in stored_infos(plan_of(policy), shapes).values())
        assert (before - after) / 2**30 == pytest.approx(gib, abs=0.001)


def test_every_difference_is_one_sentence() -> None:
    expected = {
        "a": TensorInfo("BF16", (2,)),
        "b": TensorInfo("F8_E4M3", (2, 2)),
        "c": TensorInfo("F32", ()),
        "d": TensorInfo("BF16", (1,)),
    }
    found = {
        "a": TensorInfo("F32", (2,)),  # any float stands for BF16
        "b": TensorInfo("BF16", (2, 3)),
        "c": TensorInfo("F32", (1,)),  # so does [1] for a scalar
        "e": TensorInfo("F32", ()),
    }
    assert tensor_problems(found, expected) == [
        "d: missing",
        "e: unexpected",
        "b: shape [2, 3], expected [2, 2]",
        "b: BF16, expected F8_E4M3",
    ]
