"""What every engine is started with."""

from dataclasses import replace
from pathlib import Path

import pytest

from zimage_fp8.bench.engines import Start, find_engine, shown
from zimage_fp8.errors import UsageError, ZImageError

BASE = Start("m", "bf16_base", None, "bfloat16", None, port=8001)
FULL = replace(BASE, policy="full", checkpoint=Path("out/checkpoints/full"))
ONLINE = replace(BASE, policy="online_fp8")


def words(engine: str, start: Start, launch: str | None = None) -> str:
    return " ".join(find_engine(engine, launch).command(start))


def test_ours() -> None:
    assert words("zimage-fp8", BASE) == (
        "zimage-fp8 serve m --policy bf16_base --dtype bfloat16 --no-warm-up "
        "--host 127.0.0.1 --port 8001"
    )
    start = replace(FULL, dtype="float32", device="cpu", attention="TORCH_SDPA")
    assert words("zimage-fp8", start) == (
        "zimage-fp8 serve out/checkpoints/full --dtype float32 --no-warm-up --device cpu "
        "--attention-backend TORCH_SDPA --host 127.0.0.1 --port 8001"
    )


def test_a_picture_above_our_servers_limit_raises_the_limit() -> None:
    assert "--max-pixels 8388608" in words("zimage-fp8", replace(BASE, max_pixels=2**23))
    assert "--max-pixels" not in words("zimage-fp8", replace(BASE, max_pixels=2**22))


def test_vllm_omni_gets_the_flags_that_are_fair_to_it() -> None:
    common = "--omni --tensor-parallel-size 1"
    end = "--host 127.0.0.1 --port 8001"
    assert words("vllm-omni", BASE) == f"vllm-omni serve m {common} {end}"
    assert words("vllm-omni", FULL) == (
        f"vllm-omni serve out/checkpoints/full {common} --force-cutlass-fp8 {end}"
    )
    assert words("vllm-omni", ONLINE) == (
        f'vllm-omni serve m {common} --diffusion-quantization-config {{"method":"fp8"}} {end}'
    )
    assert "--diffusion-attention-backend SAGE_ATTN" in words(
        "vllm-omni", replace(BASE, attention="SAGE_ATTN")
    )


def test_vllm_omni_draws_its_noise_where_we_do() -> None:
    assert find_engine("vllm-omni", None).body == {"generator_device": "cpu"}


@pytest.mark.parametrize(
    ("engine", "policy", "is_static", "is_needed"),
    [
        ("zimage-fp8", "full", True, True),
        ("zimage-fp8", "fp8-row", False, False),
        ("vllm-omni", "fp8-row", False, True),
        ("vllm-omni", "online_fp8", False, False),
        ("vllm-omni", "bf16_base", False, False),
    ],
)
def test_who_needs_a_checkpoint(engine: str, policy: str, is_static: bool, is_needed: bool) -> None:
    found = find_engine(engine, None)
    assert found.needs_checkpoint(policy, is_static=is_static) is is_needed


TEMPLATE = "docker-ish 'run it' {model} --p {port} --q {policy}"


def test_a_command_of_the_users_own() -> None:
    engine = find_engine("zimage-fp8", TEMPLATE)
    assert engine.name == "docker-ish"
    assert engine.command(FULL) == [
        "docker-ish", "run it", "out/checkpoints/full", "--p", "8001", "--q", "full",
    ]  # fmt: skip
    assert shown(engine, FULL)[2:5] == ["checkpoints/full", "--p", "PORT"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "is empty"),
        ("serve 'x", "cannot be read as a command"),
        ("serve {port}", r"lacks \{model\}"),
        ("serve {model}", r"lacks \{port\}"),
        ("serve {model} {port} {gpu}", r"has the field \{gpu\}"),
        ("serve {model} {port} {", "braces"),
    ],
)
def test_a_template_that_cannot_work(template: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_engine("zimage-fp8", template)


def test_a_template_must_tell_policies_apart() -> None:
    engine = find_engine("zimage-fp8", "serve {model} {port}")
    assert not engine.needs_checkpoint("bf16_base", is_static=False)
    assert engine.needs_checkpoint("full", is_static=True)
    with pytest.raises(UsageError, match="online_fp8 and bf16_base would be one server"):
        engine.needs_checkpoint("online_fp8", is_static=False)


def test_a_template_must_place_the_backend_that_a_profile_asks_for() -> None:
    engine = find_engine("zimage-fp8", TEMPLATE)
    with pytest.raises(UsageError, match=r"lacks \{attention\}, but SAGE_ATTN"):
        engine.command(replace(BASE, attention="SAGE_ATTN"))


def test_a_program_that_is_not_there_is_said_before_anything_is_quantized() -> None:
    with pytest.raises(ZImageError, match="cannot run 'no-such-program'"):
        find_engine("zimage-fp8", "no-such-program {model} {port}").check()
    find_engine("zimage-fp8", "sh {model} {port}").check()
    find_engine("zimage-fp8", "zimage-fp8 serve {model} --port {port}").check()


def test_an_unknown_engine() -> None:
    with pytest.raises(UsageError, match="expected zimage-fp8 or vllm-omni"):
        find_engine("sglang", None)


@pytest.mark.parametrize(
    ("says", "message"), [("vllm-omni 0.24.1", "0.24, which runs guidance"), ("0.30.0", None)]
)  # without --omni the program is vLLM
def test_a_vllm_omni_that_cannot_be_compared_is_refused(
    says: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "vllm-omni"
    program.write_text(f'#!/bin/sh\ncase "$*" in *--omni*) echo {says};; *) echo 0.29.0;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    engine = find_engine("vllm-omni", None)
    if message is None:
        engine.check()
        return
    with pytest.raises(ZImageError, match=message):
        engine.check()


def test_a_vllm_omni_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ZImageError, match="vllm-omni cannot be run"):
        find_engine("vllm-omni", None).check()
