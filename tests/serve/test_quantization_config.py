"""Every spelling of --quantization-config, and what it is taken to mean."""

import pytest

from zimage_fp8.errors import UsageError
from zimage_fp8.serve.quantization_config import Asked, choose_policy, resolve

SEED_CARD = (
    '{"method":"modelopt","quant_method":"FP8","is_checkpoint_fp8_serialized":true,'
    '"kv_cache_quant_method":null,"exclude_modules":["model*","lm_head*"]}'
)
FP8 = Asked(stored_algo="FP8")
ROW = Asked(stored_algo="FP8_PER_CHANNEL_PER_TOKEN")
ONLINE = Asked(policy="online_fp8")
NOTHING = Asked()

SPELLINGS = {
    SEED_CARD: FP8,
    '{"method":"modelopt","quant_algo":"FP8","ignore":["model*","lm_head*"]}': FP8,
    '{"quant_method":"modelopt","quant_algo":"fp8"}': FP8,
    '{"producer":{"name":"modelopt","version":"1"},"quant_algo":"FP8"}': FP8,
    '{"quant_method":"modelopt","quantization":{"quant_algo":"FP8","kv_cache_quant_algo":null,'
    '"exclude_modules":["model*"]}}': FP8,
    '{"method":"modelopt","quant_algo":"FP8_PER_CHANNEL_PER_TOKEN"}': ROW,
    '{"method":"modelopt"}': Asked(stored_algo="any"),
    "modelopt": Asked(stored_algo="any"),
    '{"method":"fp8","is_checkpoint_fp8_serialized":true}': Asked(stored_algo="any"),
    '{"method":"fp8"}': ONLINE,
    '{"quant_method":"fp8","activation_scheme":"dynamic"}': ONLINE,
    '"fp8"': ONLINE,
    "fp8": ONLINE,
    "FP8": ONLINE,
    '{"transformer":{"method":"fp8"},"text_encoder":null}': ONLINE,
    '{"default":"fp8"}': ONLINE,
    '{"transformer":null}': NOTHING,
    "none": NOTHING,
    "null": NOTHING,
    '"none"': NOTHING,
    "": NOTHING,
}


@pytest.mark.parametrize(("text", "meaning"), SPELLINGS.items(), ids=SPELLINGS)
def test_spellings(text: str, meaning: Asked) -> None:
    assert resolve(text) == meaning


def test_no_config_asks_for_nothing() -> None:
    assert resolve(None) == NOTHING


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"method":"fp8","weight_block_size":[128,128]}', "weight_block_size"),
        ('{"method":"modelopt","quant_algo":"FP8","excluded":[]}', "excluded"),
        ('{"method":"modelopt","quant_algo":"FP8","kv_cache_quant_algo":"FP8"}', "kv_cache"),
        ('{"transformer":{"method":"fp8"},"text_encoder":{"method":"fp8"}}', "text_encoder"),
    ],
)
def test_what_has_no_effect_is_named(text: str, named: str) -> None:
    (warning,) = resolve(text).warnings
    assert named in warning


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        "int8",
        '{"method":"awq"}',
        '{"method":"modelopt","quant_algo":"NVFP4"}',
        '{"method":"modelopt","quant_algo":"MIXED_PRECISION"}',
        '{"method":"fp8","activation_scheme":"static"}',
        '{"method":"fp8","ignored_layers":["layers.0"]}',
        '{"transformer":{"method":"bitsandbytes"}}',
    ],
)
def test_what_is_not_supported_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolve(text)
    assert refused.value.param == "quantization_config"
    assert refused.value.hint


def test_policy_option_decides_on_a_bf16_model() -> None:
    assert choose_policy(NOTHING, "full", None, "m") == ("full", ())
    assert choose_policy(ONLINE, None, None, "m") == ("online_fp8", ())
    assert choose_policy(ONLINE, "online_fp8", None, "m") == ("online_fp8", ())


def test_a_quantized_checkpoint_wins_over_online_fp8() -> None:
    policy, (warning,) = choose_policy(ONLINE, None, "FP8", "m")
    assert policy is None
    assert "already quantized" in warning


def test_a_matching_modelopt_config_changes_nothing() -> None:
    assert choose_policy(FP8, None, "FP8", "m") == (None, ())


@pytest.mark.parametrize(
    ("asked", "option", "stored"),
    [(ONLINE, "full", None), (FP8, None, None), (ROW, None, "FP8")],
    ids=["two policies", "BF16 model called quantized", "another algorithm"],
)
def test_contradictions_are_refused(asked: Asked, option: str | None, stored: str | None) -> None:
    with pytest.raises(UsageError) as refused:
        choose_policy(asked, option, stored, "m")
    assert refused.value.hint
