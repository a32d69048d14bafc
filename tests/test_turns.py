"""One product of the running loop exchanged for another that was timed: which, what is kept."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import turns
from zimage_fp8.engine import gemm
from zimage_fp8.engine.gemm import GATED, HEADS, SEPARATE, Choice
from zimage_fp8.kernels.tile import Tile

TALL, WIDE = Tile(m=192, n=192, cluster=2), Tile(m=128, n=256)


def choice(kind: str, implementation: str = "wgmma", us: float = 100.0, **of: Any) -> Choice:
    shape = {"rows": 2112, "columns": 3840, "depth": 10240, "tile": TALL} | of
    return Choice("A GPU", (9, 0), kind, implementation=implementation, us=us, **shape)


TABLE = (
    choice("int8-vector"),
    choice("int8-vector", us=120.0, tile=WIDE),
    choice("int8-vector", rows=4160),
    choice("int8-vector" + HEADS, "wgmma-heads", columns=11520, depth=3840),
    choice("int8-vector", columns=11520, depth=3840),
    choice("int8-vector" + GATED, SEPARATE, columns=20480, depth=3840, tile=None),
    choice("int8-vector", columns=20480, depth=3840),
    choice("bf16"),
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "measured", lambda: TABLE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A GPU")


def timed(what: Choice) -> dict[str, Any]:
    row = {part: value for part, value in asdict(what).items() if part != "gpu"}
    return row | {"us": 1.0, "sustained_us": what.us}


@pytest.mark.usefixtures("table")
def test_a_loop_runs_no_product_alone_where_one_with_more_won() -> None:
    found = [(it.kind, it.columns, it.tile) for it in turns.winners("int8-vector", 2112)]
    assert found == [
        ("int8-vector", 3840, TALL),
        ("int8-vector-heads", 11520, TALL),
        ("int8-vector-gated", 20480, None),
        ("int8-vector", 20480, TALL),
    ]


def test_rivals_are_those_nearly_as_fast_alone() -> None:
    near, far = (choice("bf16", us=us, tile=Tile(group=us)) for us in (105, 107))
    other = choice("bf16", us=1.0, rows=4160)
    brief = timed(choice("bf16", tile=Tile(group=3)))
    del brief["sustained_us"]
    same_walk = choice("bf16", tile=replace(TALL, group=22))  # of eleven rows of tiles
    taken = choice("bf16", tile=replace(TALL, group=11))
    rows = [timed(it) for it in (taken, same_walk, near, far, other)] + [brief]
    assert turns.rivals(rows, taken, 1.06) == [near]
    assert turns.rivals([], taken, 1.06) == []


@pytest.mark.usefixtures("table")
def test_a_choice_is_exchanged_while_its_loop_is_captured() -> None:
    rival = choice("int8-vector", tile=WIDE, us=1e9)
    with turns.exchanged([rival]):
        of_shape = [it for it in gemm.measured() if turns.shape_of(it) == turns.shape_of(rival)]
        assert of_shape == [rival], "slower alone, and yet the only one"
        assert len(gemm.measured()) == len(TABLE) - 1
    assert gemm.measured() == TABLE


def test_turns_go_forth_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def sustained(run: Callable[[], str], seconds: float) -> dict[str, float]:
        ran.append(run())
        return {"ms": seconds + len(ran)}

    monkeypatch.setattr(turns, "sustained", sustained)
    loops = {name: lambda name=name: name for name in "abc"}
    times = turns.in_turns(loops, 10.0, 2)  # type: ignore[arg-type]
    assert ran == [*"abc", *"cba"]
    assert times == {"a": [11.0, 16.0], "b": [12.0, 15.0], "c": [13.0, 14.0]}


def test_a_rival_has_to_be_faster_in_every_turn_and_by_enough() -> None:
    assert turns.is_faster([99.0, 99.5], [100.0, 100.0])
    assert not turns.is_faster([99.0, 100.1], [100.0, 100.0])
    assert not turns.is_faster([99.9, 99.9], [100.0, 100.0])


def test_what_was_taken_together_stands_in_front_of_its_shape() -> None:
    other_walk = replace(WIDE, group=WIDE.group + 1)
    rival = asdict(replace(TABLE[1], tile=other_walk)) | {"us": 90.0}
    new = asdict(choice("bf16", rows=1))
    rows = [
        {"what": "wide", "taken": True, "choices": [asdict(TABLE[2])]},
        {"what": "together", "taken": True, "choices": [rival, new]},
        {"what": "together", "taken": False, "choices": [asdict(TABLE[-1]) | {"us": 0.0}]},
    ]
    table = [asdict(it) for it in TABLE]
    found = turns.with_winners(table, rows)
    assert found == [rival, table[0], *table[2:], new]


def test_a_dry_run_says_what_it_would_have_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels, out, choices = (tmp_path / f"{name}.json" for name in ("kernels", "turns", "gemm"))
    kernels.write_text(json.dumps({"gemm": []}))
    choices.write_text(json.dumps({"choices": [asdict(TABLE[0])]}))
    arguments = ["--scale", "tiny", "--kernels", str(kernels), "--out", str(out)]
    arguments += ["--seconds", "0", "--turns", "1", "--kinds", "e4m3-scalar"]
    monkeypatch.setattr("sys.argv", ["turns.py", *arguments, "--choices", str(choices)])
    turns.main()
    rows = json.loads(out.read_text())["turns"]
    assert [(row["policy"], row["size"], row["what"]) for row in rows] == [
        ("full", "64x32", "table"),
        ("full", "64x64", "table"),
    ]
    assert "full       64x32      table" in capsys.readouterr().out
    assert json.loads(choices.read_text())["choices"] == [json.loads(json.dumps(asdict(TABLE[0])))]
