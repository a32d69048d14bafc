"""Workloads: from a profile and a user's wishes; what makes no sense is refused."""

import json
from pathlib import Path

import pytest

from zimage_fp8.bench.profile import Profile, find_profile
from zimage_fp8.bench.record import Parameters
from zimage_fp8.bench.workload import (
    Slot,
    Wishes,
    check_sizes,
    choose_parameters,
    default_profile,
    effective_profile,
    is_test_model,
    picture_slots,
    profile_of,
    recorded_command,
    timed_slots,
)
from zimage_fp8.errors import ModelError, UsageError
from zimage_fp8.model.source import find_model


def parameters_of(name: str, wishes: Wishes | None = None) -> Parameters:
    wishes = wishes or Wishes()
    return choose_parameters(effective_profile(find_profile(name), wishes), wishes)


def test_the_seed_cards_workload() -> None:
    parameters = parameters_of("card")
    assert parameters.prompts[0].startswith("a cinematic photograph of an old fisherman")
    assert (parameters.seeds, parameters.size) == ([1235, 1236, 1237], "1024x512")
    assert (parameters.warmup, parameters.runs) == (1, 3)


def test_nano_has_prompts_of_its_own() -> None:
    sample = profile_of(find_model("nano"))
    assert sample.size == (256, 256)
    assert len(sample.prompts) == 3
    assert "background" in sample.prompts[0]


def save_config(folder: Path, text: str) -> Path:
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(text)
    return folder


def config(dim: int) -> str:
    shape = {"_class_name": "ZImageTransformer2DModel", "dim": dim, "n_heads": dim // 64}
    return json.dumps(shape | {"n_kv_heads": dim // 64, "axes_dims": [16, 24, 24]})


@pytest.mark.parametrize(("dim", "is_small"), [(192, True), (3840, False)])
def test_the_width_makes_a_test_model_and_not_the_name(
    tmp_path: Path, dim: int, is_small: bool
) -> None:
    folder = save_config(tmp_path, config(dim))
    assert is_test_model(folder) is is_small
    assert default_profile(folder) == ("nano" if is_small else "quick")
    assert profile_of(folder).size == ((256, 256) if is_small else (1024, 512))


@pytest.mark.parametrize("garbage", ["{", "[]", '{"dim": "wide"}'])
def test_a_damaged_config_is_one_sentence(tmp_path: Path, garbage: str) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        default_profile(save_config(tmp_path, garbage))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompts": []}, "prompts"),
        ({"seeds": [1]}, "seeds"),
        ({"runs": 0}, "runs"),
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
        ({"device": "gpu"}, "device"),
        ({"device": "cuda:99"}, "device"),
    ],
)
def test_workloads_that_make_no_sense(changes: dict[str, object], param: str) -> None:
    with pytest.raises(UsageError) as refused:
        parameters_of("nano", Wishes(**changes))
    assert refused.value.param == param


def test_a_size_beyond_the_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = save_config(tmp_path, config(192))
    check_sizes(parameters_of("nano", Wishes(size=(8192, 16))), folder)
    with pytest.raises(UsageError, match="size 8208x16: this model draws at most 8192 a side"):
        check_sizes(parameters_of("nano", Wishes(size=(8208, 16))), folder)


def test_wishes_change_the_profile() -> None:
    wishes = Wishes(prompts=["x", "y"], seeds=[7, 8], size=(64, 48), steps=4, warmup=2)
    parameters = parameters_of("standard", wishes)
    assert (parameters.prompts, parameters.strata) == (["x", "y"], ["own", "own"])
    assert (parameters.seeds, parameters.sizes, parameters.runs) == ([7, 8], ["64x48"], 2)
    assert (parameters.warmup, parameters.warm_tolerance) == (2, None)
    assert wishes.change_the_profile
    assert not Wishes(profile="card", device="cpu", dtype="float32").change_the_profile


def small(**changes: object) -> Profile:
    profile = find_profile("nano")
    prompts = {"all": list("abcdef")}
    return profile.model_copy(update={"prompts": prompts, "timed": 3, **changes})


def test_timed_requests_are_spread_over_the_prompts() -> None:
    parameters = choose_parameters(small(sizes=["16x16", "32x32"]), Wishes())
    assert timed_slots(parameters) == [
        Slot(0, "16x16"), Slot(2, "16x16"), Slot(4, "16x16"),
        Slot(0, "32x32"), Slot(2, "32x32"), Slot(4, "32x32"),
    ]  # fmt: skip
    more = choose_parameters(small(timed=8, sizes=["16x16"]), Wishes())
    assert [slot.prompt for slot in timed_slots(more)] == [0, 1, 2, 3, 4, 5, 0, 1]


def test_every_prompt_is_drawn_whether_timed_or_not() -> None:
    parameters = choose_parameters(small(sizes=["16x16"]), Wishes())
    rest = picture_slots(parameters, is_repeated=False)
    assert [slot.prompt for slot in rest] == [1, 3, 5]
    assert len(picture_slots(parameters, is_repeated=True)) == 6


def test_the_recorded_command_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    wishes = Wishes(
        profile=str(tmp_path / "mine.toml"), prompts=["x"], seeds=[7], size=(64, 48), steps=4,
        dtype="float32",
    )  # fmt: skip
    policies = ["full", str(tmp_path / "gentle.toml")]
    command = recorded_command(str(tmp_path / "my-model"), policies, wishes, tmp_path / "out")
    assert " ".join(command) == (
        "zimage-fp8 bench my-model --profile mine.toml --policies full --policies gentle.toml "
        "--out out --prompts prompts.txt --seeds 7 --size 64x48 --steps 4 --dtype float32"
    )


def test_defaults_are_not_spelled_out() -> None:
    command = recorded_command("nano", ["all"], Wishes(), Path("results"))
    assert " ".join(command) == "zimage-fp8 bench nano --policies all --out results"
