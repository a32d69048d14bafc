"""Profiles: what is shipped is what is promised, and what is wrong is named."""

import re
from pathlib import Path

import pytest

from zimage_fp8.bench.profile import FOLDER, NAMES, find_profile, read_profile
from zimage_fp8.errors import UsageError

SMALL = 'name = "x"\nsummary = "x"\nsizes = ["64x48"]\ntimed = 2\n[prompts]\nall = ["a", "b"]\n'


def test_every_shipped_profile_is_listed() -> None:
    assert sorted(NAMES) == sorted(path.stem for path in FOLDER.glob("*.toml"))


def test_card_is_exactly_the_cards() -> None:
    card = find_profile("card")
    assert [prompt[:34] for group in card.prompts.values() for prompt in group] == [
        "a cinematic photograph of an old f",
        "a detailed watercolor painting of ",
        "a futuristic city street at night ",
    ]
    assert (card.sizes, card.steps, card.guidance) == (["1024x512"], 8, 0.0)
    assert (card.first_seed, card.warmup, card.timed) == (1235, 1, 3)
    assert not card.draw_before_timing
    assert [(one.attention, one.policies) for one in card.passes] == [
        ("SAGE_ATTN", None),
        ("TORCH_SDPA", ["bf16_base", "online_fp8", "full", "ffn-attn-qkv"]),
    ]


def test_standard_is_broad_enough_to_be_quoted() -> None:
    standard = find_profile("standard")
    prompts = [prompt for group in standard.prompts.values() for prompt in group]
    assert len(set(prompts)) == len(prompts) >= 200
    assert set(standard.prompts) == {
        "people", "scenes", "objects_and_counting", "english_text", "chinese_text",
        "long_captions", "abstract",
    }  # fmt: skip
    assert min(map(len, standard.prompts.values())) >= 30
    assert all(re.search(r"[\u4e00-\u9fff]", prompt) for prompt in standard.prompts["chinese_text"])
    assert all('"' in prompt for prompt in standard.prompts["english_text"])
    assert min(map(len, standard.prompts["long_captions"])) > 200
    assert len(standard.sizes) == 2
    assert standard.timed >= 30
    assert (standard.order, standard.warm_tolerance) == ("interleaved", 0.01)
    assert standard.floors == ["rerun", "attention", "next_seed"]


def test_quick_is_a_part_of_standard() -> None:
    quick, standard = find_profile("quick"), find_profile("standard")
    assert sum(map(len, quick.prompts.values())) == 24
    for stratum, prompts in quick.prompts.items():
        assert set(prompts) <= set(standard.prompts[stratum])


@pytest.mark.parametrize("name", NAMES)
def test_shipped_prompts_say_whose_they_are(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text()
    assert "CC0" in text or name == "card"


def save(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_the_digest_is_of_the_meaning(tmp_path: Path) -> None:
    first = read_profile(save(tmp_path, SMALL)).digest
    commented = SMALL.replace("timed", "# why\ntimed").replace('summary = "x"', 'summary = "y"')
    assert read_profile(save(tmp_path, commented)).digest == first
    assert read_profile(save(tmp_path, SMALL.replace('"b"', '"c"'))).digest != first


def test_a_changed_profile_is_not_called_by_its_name() -> None:
    card = find_profile("card")
    assert card.facts().name == "card"
    assert card.facts(is_changed=True).name == "card (changed)"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("timed = 2", "timed = 0", "timed"),
        ("timed = 2", "timed = 2\nspeed = 1", "speed"),
        ("64x48", "64*48", "not WIDTHxHEIGHT"),
        ('["64x48"]', '["64x48", "64X48"]', "listed twice"),
        ('["a", "b"]', "[]", "holds no prompt"),
        ("timed = 2", 'timed = 2\nfloors = ["attention"]', "floor_attention go together"),
        ("timed = 2", "timed = 2\nwarm_tolerance = 0.01", "max_warmup must allow"),
        ("timed = 2", "timed = 2\norder = 'random'", "order"),
        ("[prompts]", "[[pass]]\n[[pass]]\n[prompts]", "two passes have one name"),
        (
            "[prompts]",
            "draw_before_timing = false\n[load]\nrequests = 2\n[prompts]",
            "load needs draw_before_timing",
        ),
        ("[prompts]", "[load]\nrequests = 2\nrates = [0]\n[prompts]", "must be above 0"),
        ("timed = 2", "timed =", "is not TOML"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        find_profile(str(save(tmp_path, SMALL.replace(old, new))))
    assert refused.value.param == "profile"


@pytest.mark.parametrize("name", ["slow", "no/such/file.toml"])
def test_unknown_profiles(name: str) -> None:
    with pytest.raises(UsageError, match="profile"):
        find_profile(name)
