"""The GPU campaign: its schedule with steps of a second, its measuring code at a tiny size here."""

import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

import baselines
import campaign
import engine
import fake_model
import gpu
from campaign import Step


def step(name: str, code: str, minutes: float = 1) -> Step:
    return Step(name, minutes, [sys.executable, "-c", code])


def test_a_failure_costs_nothing_but_itself_and_the_budget_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaign, "LEAST_S", 0)
    interrupted = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('ended')"
    todo = [
        step("bad", "raise SystemExit('no model')"),
        step("good", "print(1)"),
        step("too long", interrupted, minutes=10 / 60),
    ]
    done = campaign.run_all(todo, tmp_path, 60)
    assert [one.outcome for one in done] == ["failed", "done", "stopped"]
    assert (tmp_path / "bad.log").read_text() == "no model\n"
    assert (tmp_path / "too-long.log").read_text() == "ended\n"
    left = tmp_path / "elsewhere.json"
    leaves = step("leaves a record", f"open({str(left)!r}, 'w').write('1')")
    campaign.run_all([replace(leaves, record=left)], tmp_path, 60)
    assert (tmp_path / "leaves-a-record.json").read_text() == "1"
    monkeypatch.undo()
    (late,) = campaign.run_all([step("late", "print(1)")], tmp_path, 5)
    assert late.outcome == "not started"
    assert json.loads((tmp_path / "campaign.json").read_text())[0]["name"] == "late"


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_step_is_a_script_with_a_file_of_its_own(tmp_path: Path, scale: str) -> None:
    todo = campaign.steps(tmp_path, tmp_path, scale)
    assert len({one.name for one in todo}) == len(todo)
    results = [word for one in todo for word in one.command if word.endswith(".json")]
    records = [one.record for one in todo if one.record is not None]
    assert len({*results, *records}) == len(todo) - 2  # model and checkpoint write none
    for one in todo:
        assert one.record is None or str(one.record.parent) == one.command[-1]
    for one in todo:
        assert one.command[1] == "-m" or Path(one.command[1]).is_file()


def test_rows_are_kept_when_the_next_one_fails(tmp_path: Path) -> None:
    def rows():
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.write_rows(tmp_path / "r.json", {"commit": "abc"}, "rows", rows())
    assert json.loads((tmp_path / "r.json").read_text()) == {"commit": "abc", "rows": [1]}


@pytest.mark.slow
def test_loops_ladder_and_profile_of_a_tiny_model() -> None:
    model = engine.RandomModel("tiny")
    loops = list(engine.measure(model, ["full", "int8-rot"], 0, ["sdpa", "math"]))
    assert [(row["policy"], row["attention"], row["size"]) for row in loops] == list(
        product(("full", "int8-rot"), ("sdpa", "math"), engine.SIZES["tiny"])
    )
    rungs = [row["name"] for row in engine.ladder(model, 0)]
    assert rungs[:5] == ["diffusers, eager", "packed, eager", "fused kernels", "CUDA graph", "FP8"]
    tables = list(engine.profile(model, ["bf16_base"], ["auto"]))
    assert [table["attention"] for table in tables] == ["sdpa"] * len(engine.SIZES["tiny"])
    assert all(table["kernels"] and table["ms"] > 0 for table in tables)


@pytest.mark.slow
def test_diffusers_runs_eight_forwards_for_eight_steps(tmp_path: Path) -> None:
    folder = tmp_path / "random"
    fake_model.write_fake_model(folder, "tiny")
    rows = list(baselines.baselines(folder, ["eager"], "tiny", 0))
    assert [row["size"] for row in rows] == list(engine.SIZES["tiny"])
    for row in rows:
        assert row["nfe"] == engine.STEPS
        assert all(row[part]["ms"] > 0 for part in baselines.PARTS)
