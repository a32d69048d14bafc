"""Which variants a benchmark has, and which checkpoints it takes for its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from zimage_fp8.bench.engines import find_engine
from zimage_fp8.bench.facts import read_facts
from zimage_fp8.bench.variants import (
    ALL,
    check_policies,
    find_missing,
    make_checkpoints,
    plan_variants,
)
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.model.source import display_name
from zimage_fp8.quantize import quantize


def test_all_is_the_cards_nine_rows() -> None:
    variants = plan_variants(["all"], Path("c"))
    assert [variant.policy for variant in variants] == list(ALL)
    assert len(variants) == 9
    assert [v.checkpoint for v in variants[:3]] == [None, None, Path("c/full")]


def test_the_reference_is_always_there_and_first() -> None:
    variants = plan_variants(["full[0-1]", "bf16_base", "full[0-1]"], Path("c"))
    assert [variant.policy for variant in variants] == ["bf16_base", "full[0-1]"]


def test_an_engine_decides_what_is_stored() -> None:
    policies = ["fp8-row", "online_fp8"]
    ours = plan_variants(policies, Path("c"))
    theirs = plan_variants(policies, Path("c"), find_engine("vllm-omni", None))
    assert [v.checkpoint for v in ours] == [None, None, None]
    assert [v.checkpoint for v in theirs] == [None, Path("c/fp8-row"), None]


@pytest.mark.parametrize("policies", [[], ["nonsense"]])
def test_unknown_policies(policies: list[str]) -> None:
    with pytest.raises(UsageError):
        plan_variants(policies, Path("c"))


def test_two_policies_of_one_name(tmp_path: Path) -> None:
    rules = 'name = "mine"\nsummary = "x"\n[[rule]]\nlayers = "*"\nspec = "keep"\nwhy = "x"\n'
    files = [tmp_path / "a.toml", tmp_path / "b.toml"]
    for file in files:
        file.write_text(rules)
    with pytest.raises(UsageError, match="two policies are named 'mine'"):
        plan_variants(list(map(str, files)), Path("c"))


def test_policies_must_suit_the_model(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match=r"no layer of this model matches 'layers\.2\."):
        check_policies(plan_variants(["full[0-99]"], Path("c")), tiny_model)


def test_a_policy_that_cannot_be_stored(tiny_model: Path, tmp_path: Path) -> None:
    """vLLM-Omni applies no policy while loading but its own."""
    rule = 'name = "nothing"\nsummary = "x"\n[[rule]]\nlayers = "*"\nspec = "keep"\nwhy = "x"\n'
    (tmp_path / "nothing.toml").write_text(rule)
    asked = [str(tmp_path / "nothing.toml")]
    variants = plan_variants(asked, Path("c"), find_engine("vllm-omni", None))
    with pytest.raises(UsageError, match="'nothing' quantizes nothing"):
        check_policies(variants, tiny_model)


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`full` of the tiny model, as an earlier run left it."""
    out = tmp_path_factory.mktemp("bench") / "full"
    quantize(str(tiny_model), ["full"], out)
    return out


def missing(checkpoint: Path, model: Path, dtype: str = "bfloat16") -> list[str]:
    variants = plan_variants(["full"], checkpoint.parent)
    return [v.policy for v in find_missing(variants, str(model), model, dtype)]


def test_a_checkpoint_of_an_earlier_run_is_used(tiny_model: Path, checkpoint: Path) -> None:
    assert missing(checkpoint, tiny_model) == []
    assert missing(checkpoint.parent / "none" / "full", tiny_model) == ["full"]


def test_a_checkpoint_of_a_quantized_model_has_no_reference(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="already quantized"):
        check_policies(plan_variants(["full"], Path("c")), checkpoint)


Facts = dict[str, object]
CHANGES: dict[str, tuple[Callable[[Facts], object], str]] = {
    "weights": (lambda f: f.update(base_fingerprint="0"), "made from other weights"),
    "model": (lambda f: f.update(base_model="other"), "made from other"),
    "policy": (lambda f: f.update(policy="ffn-only"), "its policy is ffn-only"),
    "rules": (lambda f: f["rules"].pop(0), "its policy has other rules"),
    "version": (lambda f: f.update(version="0.0.1"), "made by version 0.0.1"),
    "dtype": (lambda f: f["calibration"].update(dtype="float32"), "calibrated in float32"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_checkpoint_is_refused(
    change: str, tiny_model: Path, checkpoint: Path, tmp_path: Path
) -> None:
    apply, message = CHANGES[change]
    config = json.loads((checkpoint / "transformer" / "config.json").read_text())
    apply(config["quantization_config"]["zimage_fp8"])
    changed = tmp_path / "full" / "transformer" / "config.json"
    changed.parent.mkdir(parents=True)
    changed.write_text(json.dumps(config))
    with pytest.raises(
        ZImageError, match=f"is not full of {display_name(str(tiny_model))}.*{message}"
    ) as refused:
        missing(tmp_path / "full", tiny_model)
    assert refused.value.hint == "remove it or choose another --out"


def test_something_else_in_a_checkpoints_place_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    assert read_facts(tmp_path / "full") is None
    with pytest.raises(ZImageError, match="no checkpoint of this program"):
        missing(tmp_path / "full", tiny_model)


def test_calibration_computes_in_the_benchmarks_type(tiny_model: Path, tmp_path: Path) -> None:
    variants = plan_variants(["full"], tmp_path)
    notes = tmp_path / "servers.txt"
    make_checkpoints(str(tiny_model), variants[1:], tmp_path, "float32", "cpu", notes)
    assert len(notes.read_text().split()) == 2  # a process, and when it was born
    facts = read_facts(tmp_path / "full")
    assert facts
    assert facts.calibration
    assert facts.calibration.dtype == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_being_ended_while_quantizing_leaves_nothing_half_written(
    number: signal.Signals, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "zimage_fp8", "bench", str(tiny_model), "--out", str(out)]
    started = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/.*.partial-*")):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(started.pid, number)
    assert started.wait(60) != 0
    assert not list(out.glob("checkpoints/.*"))
