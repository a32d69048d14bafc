"""Which mix of formats: the arithmetic on its own, then the whole road on a tiny model."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zimage_fp8.cli import app
from zimage_fp8.cli.options import parse_bytes
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.evaluate import Workload, psnr_db
from zimage_fp8.layout import ZImageConfig, linear_shapes, read_config
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.quant.policy import PRESETS, find_policy, resolve
from zimage_fp8.search import Goal, search
from zimage_fp8.search.front import KEEP, Option, front
from zimage_fp8.search.policy_file import policy_toml
from zimage_fp8.search.stretches import stretches

WORKLOAD = Workload(limit=1, size=(64, 64), steps=2)


def option(spec: str, cost: float, *errors: float) -> Option:
    return Option(spec, cost, errors)


def test_the_front_spends_where_most_error_is_saved() -> None:
    parts = [
        [option(KEEP, 10, 0.0), option("a", 5, 8.0)],
        [option(KEEP, 10, 0.0), option("a", 5, 1.0)],
    ]
    points = front(parts, rest=100)
    assert [point.specs for point in points] == [("a", "a"), (KEEP, "a"), (KEEP, KEEP)]
    assert [point.cost for point in points] == [110, 115, 120]
    assert points[0].predicted_psnr == pytest.approx(psnr_db(9.0))
    assert points[-1].predicted_psnr == math.inf


def test_formats_off_the_front_are_never_chosen() -> None:
    """b costs more than a and errs more; c lies above the line from a to full precision."""
    parts = [[option(KEEP, 10, 0.0), option("a", 5, 4.0), option("b", 6, 5.0), option("c", 9, 2.0)]]
    assert [point.specs[0] for point in front(parts, 0)] == ["a", KEEP]


def test_predictions_add_errors_prompt_by_prompt() -> None:
    parts = [[option("a", 1, 1.0, 4.0)], [option("a", 1, 3.0, 12.0)]]
    (point,) = front(parts, 0)
    assert point.predicted_psnr == pytest.approx((psnr_db(4.0) + psnr_db(16.0)) / 2)


def test_stretches_cover_every_quantizable_layer_once() -> None:
    config = ZImageConfig()
    parts = stretches(config)
    covered = [module for part in parts for module in part.modules]
    assert len(covered) == len(set(covered)) == 34 * 4
    assert len(parts) == 5 * 4


@pytest.mark.parametrize("seed", range(4))
def test_a_written_policy_resolves_to_what_was_chosen(tmp_path: Path, seed: int) -> None:
    config = ZImageConfig(n_layers=7)
    parts = stretches(config)
    specs = tuple(
        (KEEP, "e4m3-static", "int8-rot")[(i * 7 + seed * i + seed) % 3]
        for i, _ in enumerate(parts)
    )
    file = tmp_path / "mix.toml"
    file.write_text(policy_toml("mix", "a mix", parts, specs))
    plan = resolve(find_policy(str(file)), linear_shapes(config))
    names = {spec: name for name, spec in SPEC_NAMES}
    for part, wanted in zip(parts, specs, strict=True):
        for block in part.blocks:
            for layer in plan.entries:
                if layer.startswith(f"{block}.") and part.kind in KIND_LEAVES.get(leaf(layer), ()):
                    assert names[plan.spec(layer)] == wanted, layer


SPEC_NAMES = [
    (KEEP, None),
    ("e4m3-static", next(iter(PRESETS["full"].specs))),
    ("int8-rot", next(iter(PRESETS["int8-rot"].specs))),
]
KIND_LEAVES = {
    **dict.fromkeys(("to_q", "to_k", "to_v"), ("qkv",)),
    "0": ("out",),
    "w1": ("w13",),
    "w3": ("w13",),
    "w2": ("w2",),
}


def leaf(layer: str) -> str:
    return "" if "adaLN" in layer else layer.rpartition(".")[2]


@pytest.mark.parametrize(
    ("text", "value"), [("12G", 12e9), ("1.5gb", 1.5e9), ("30M", 30e6), ("1000", 1000)]
)
def test_sizes(text: str, value: float) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    "goal", [Goal(), Goal(30, 0.2), Goal(-1.0), Goal(None, 1.0, None, "memory")]
)
def test_a_goal_without_sense_is_refused(goal: Goal) -> None:
    with pytest.raises(UsageError):
        goal.check()


@pytest.mark.slow
def test_a_quality_is_reached_by_the_cheapest_plan(tiny_model: Path, tmp_path: Path) -> None:
    """All plans drawn that fall short are cheaper than the chosen one, and it does not."""
    bounds = search(str(tiny_model), Goal(1.0), tmp_path / "least.toml", workload=WORKLOAD)
    target = bounds.chosen.quality.mean + 3  # what the cheapest plan of all does not reach
    found = search(str(tiny_model), Goal(target), tmp_path / "mix.toml", workload=WORKLOAD)
    assert found.chosen.quality.mean >= target
    for tried in found.verified:
        assert (tried.quality.mean >= target) == (tried.point.cost >= found.chosen.point.cost)
    config, _ = read_config(tiny_model / "transformer")
    plan = resolve(find_policy(str(found.policy_file)), linear_shapes(config))
    assert 0 < len(plan.quantized)
    evidence = json.loads(found.evidence_file.read_text())
    assert evidence["chosen"]["quality"]["mean"] == pytest.approx(found.chosen.quality.mean)
    assert len(evidence["front"]) > len(found.verified)
    load_pipeline(str(tiny_model), policy=str(found.policy_file))


@pytest.mark.slow
def test_memory_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "mix.toml"
    with pytest.raises(ZImageError, match="no plan fits"):
        search(str(tiny_model), Goal(max_memory_bytes=1000), file, workload=WORKLOAD)
    assert not file.exists()


@pytest.mark.slow
def test_the_command_says_what_came_out(tiny_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n")
    out = tmp_path / "mix"
    arguments = ["quantize", str(tiny_model), "--policy", "auto", "--out", str(out)]
    others = tmp_path / "others.txt"
    others.write_text("a penguin\na blue boat\n")
    goal = ["--min-psnr", "1", "--search-prompts", str(prompts), "--verify-prompts", str(others)]
    done = CliRunner().invoke(app, [*arguments, *goal], catch_exceptions=False)
    assert "dB measured" in done.stdout
    assert "with 2 prompts that the search did not see" in done.stdout
    evidence = json.loads(out.with_suffix(".json").read_text())
    assert evidence["held_out"]["quality"]["pictures"] == 2
    assert not set(evidence["held_out"]["seeds"]) & set(evidence["settings"]["seeds"])
    assert str(out.with_suffix(".json")) in done.stdout
    assert load_pipeline(str(out)).policy == "mix"


def test_prompts_to_verify_with_must_be_new(tiny_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n")
    file = tmp_path / "mix.toml"
    with pytest.raises(UsageError, match="the search itself draws 1 of its prompts"):
        search(str(tiny_model), Goal(30.0), file, workload=Workload(prompts), held_out=prompts)


@pytest.mark.slow
def test_a_budget_that_needs_no_quantization_says_so(tiny_model: Path, tmp_path: Path) -> None:
    goal = Goal(max_memory_bytes=10**12)
    with pytest.raises(ZImageError, match="unquantized"):
        search(str(tiny_model), goal, tmp_path / "mix.toml", workload=WORKLOAD)


def test_goals_need_auto(tiny_model: Path) -> None:
    done = CliRunner().invoke(app, ["quantize", str(tiny_model), "--min-psnr", "30"])
    assert "--policy auto" in str(done.exception)
