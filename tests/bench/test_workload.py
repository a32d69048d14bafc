"""The default workload, and workloads that make no sense."""

from pathlib import Path

import pytest

from zimage_fp8.bench.record import Parameters
from zimage_fp8.bench.variants import ALL, checkpoint_facts, make_checkpoints, plan_variants
from zimage_fp8.bench.workload import choose_parameters, is_test_model
from zimage_fp8.errors import UsageError, ZImageError


def choose(model: str, **changes: object) -> Parameters:
    defaults: dict[str, object] = {
        "prompts": None, "seeds": None, "size": None, "steps": 8, "guidance": 0.0,
        "warmup": 1, "runs": None, "dtype": "bfloat16", "device": None,
    }  # fmt: skip
    return choose_parameters(model, **{**defaults, **changes})


def test_the_seed_cards_workload() -> None:
    parameters = choose("Tongyi-MAI/Z-Image-Turbo")
    assert parameters.prompts[0].startswith("a cinematic photograph of an old fisherman")
    assert (parameters.seeds, parameters.size) == ([1235, 1236, 1237], "1024x512")
    assert (parameters.warmup, parameters.runs) == (1, 3)


def test_nano_has_prompts_of_its_own() -> None:
    parameters = choose("nano")
    assert parameters.size == "256x256"
    assert len(parameters.prompts) == 3
    assert "background" in parameters.prompts[0]


def test_small_local_models_count_as_test_models(tiny_model: Path, tmp_path: Path) -> None:
    assert is_test_model(str(tiny_model))
    assert not is_test_model(str(tmp_path))
    assert not is_test_model("Tongyi-MAI/Z-Image-Turbo")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompts": []}, "prompts"),
        ({"seeds": [1]}, "seeds"),
        ({"runs": 2}, "runs"),
        ({"warmup": -1}, "warmup"),
        ({"prompts": ["a", " ", "c"]}, "prompts"),
        ({"size": (100, 64)}, "size"),
        ({"size": (0, 64)}, "size"),
        ({"steps": 0}, "steps"),
        ({"guidance": -1.0}, "guidance"),
    ],
)
def test_workloads_that_make_no_sense(changes: dict[str, object], param: str) -> None:
    with pytest.raises(UsageError) as refused:
        choose("nano", **changes)
    assert refused.value.param == param


def test_all_is_the_cards_nine_rows() -> None:
    variants = plan_variants(["all"], Path("c"))
    assert [variant.policy for variant in variants] == list(ALL)
    assert len(variants) == 9
    assert [v.checkpoint for v in variants[:3]] == [None, None, Path("c/full")]


def test_the_reference_is_always_there_and_first() -> None:
    variants = plan_variants(["full[0-1]", "bf16_base", "full[0-1]"], Path("c"))
    assert [variant.policy for variant in variants] == ["bf16_base", "full[0-1]"]


def test_what_a_server_is_started_with() -> None:
    base, online, full = plan_variants(["online_fp8", "full"], Path("c"))
    assert base.serve_arguments("m", "bfloat16", None) == [
        "m", "--policy", "bf16_base", "--dtype", "bfloat16",
    ]  # fmt: skip
    assert online.serve_arguments("m", "bfloat16", "cpu")[-2:] == ["--device", "cpu"]
    assert full.serve_arguments("m", "float32", None) == ["c/full", "--dtype", "float32"]


@pytest.mark.parametrize("policies", [[], ["nonsense"]])
def test_unknown_policies(policies: list[str]) -> None:
    with pytest.raises(UsageError):
        plan_variants(policies, Path("c"))


def test_something_else_in_a_checkpoints_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    assert checkpoint_facts(tmp_path / "full") == {}
    with pytest.raises(ZImageError, match="is not full of nano"):
        make_checkpoints("nano", plan_variants(["full"], tmp_path), tmp_path, None)
