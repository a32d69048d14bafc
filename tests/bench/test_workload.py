"""The default workload, and workloads that make no sense."""

import json
from pathlib import Path

import pytest

from zimage_fp8.bench.workload import (
    FULL_SIZE,
    NANO,
    Wishes,
    choose_parameters,
    is_test_model,
    profile_of,
    recorded_command,
)
from zimage_fp8.errors import ModelError, UsageError
from zimage_fp8.model.source import find_model


def test_the_seed_cards_workload() -> None:
    parameters = choose_parameters(FULL_SIZE, Wishes())
    assert parameters.prompts[0].startswith("a cinematic photograph of an old fisherman")
    assert (parameters.seeds, parameters.size) == ([1235, 1236, 1237], "1024x512")
    assert (parameters.warmup, parameters.runs) == (1, 3)


def test_nano_has_prompts_of_its_own() -> None:
    parameters = choose_parameters(profile_of(find_model("nano")), Wishes())
    assert parameters.size == "256x256"
    assert len(parameters.prompts) == 3
    assert "background" in parameters.prompts[0]


def save_config(folder: Path, text: str) -> Path:
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(("dim", "is_small"), [(192, True), (3840, False)])
def test_the_width_makes_a_test_model_and_not_the_name(
    tmp_path: Path, dim: int, is_small: bool
) -> None:
    config = {"_class_name": "ZImageTransformer2DModel", "dim": dim, "n_heads": dim // 64}
    config |= {"n_kv_heads": dim // 64, "axes_dims": [16, 24, 24]}
    folder = save_config(tmp_path, json.dumps(config))
    assert is_test_model(folder) is is_small
    assert profile_of(folder) is (NANO if is_small else FULL_SIZE)


@pytest.mark.parametrize("garbage", ["{", "[]", '{"dim": "wide"}'])
def test_a_damaged_config_is_one_sentence(tmp_path: Path, garbage: str) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        profile_of(save_config(tmp_path, garbage))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompts": []}, "prompts"),
        ({"seeds": [1]}, "seeds"),
        ({"runs": 2}, "runs"),
        ({"warmup": -1}, "warmup"),
        ({"prompts": ["a", " ", "c"]}, "prompt"),
        ({"size": (100, 64)}, "size"),
        ({"size": (0, 64)}, "size"),
        ({"steps": 0}, "steps"),
        ({"steps": 1000}, "steps"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"seeds": [-1, 0, 1]}, "seeds"),
        ({"seeds": [0, 1, 2**53]}, "seeds"),
        ({"dtype": "int4"}, "dtype"),
    ],
)
def test_workloads_that_make_no_sense(changes: dict[str, object], param: str) -> None:
    with pytest.raises(UsageError) as refused:
        choose_parameters(NANO, Wishes(**changes))
    assert refused.value.param == param


def test_the_recorded_command_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    wishes = Wishes(prompts=["x"], seeds=[7], size=(64, 48), steps=4, dtype="float32")
    policies = ["full", str(tmp_path / "gentle.toml")]
    command = recorded_command(str(tmp_path / "my-model"), policies, wishes, tmp_path / "out")
    assert " ".join(command) == (
        "zimage-fp8 bench my-model --policies full --policies gentle.toml --out out "
        "--prompts prompts.txt --seeds 7 --size 64x48 --steps 4 --dtype float32"
    )


def test_defaults_are_not_spelled_out() -> None:
    command = recorded_command("nano", ["all"], Wishes(), Path("results"))
    assert " ".join(command) == "zimage-fp8 bench nano --policies all --out results"
