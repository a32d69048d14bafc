"""A server that runs guidance it was told not to is found out by its clock."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zimage_fp8.bench.journal import Journal
from zimage_fp8.bench.launch import Server
from zimage_fp8.bench.load import Work
from zimage_fp8.bench.probe import judge, probe
from zimage_fp8.bench.record import GuidanceProbe, Parameters
from zimage_fp8.bench.session import Session, Setting, Subject
from zimage_fp8.bench.summary import guidance_cost

WORK = Work("x", seed=1, size="16x16", steps=8, guidance=0.0)
STEP_S = 0.02


def probed(off: float, on: float, twice: float, *, same: bool = False) -> GuidanceProbe:
    return GuidanceProbe(
        size="64x64", steps=4, guidance=3.0, off_s=[off, off, 9.0], on_s=[on, 0.0, on],
        twice_s=[twice] * 3, is_same_picture=same,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "kinds"),
    [
        (probed(0.3, 0.5, 0.5), []),  # 0.1 s beside 4 steps of 0.05 s, doubled by guidance
        (probed(0.5, 0.5, 0.9), ["unasked_guidance"]),
        (probed(0.5, 0.5, 0.9, same=True), ["ignored_guidance"]),
        (probed(0.5, 0.5, 0.5), ["ignored_steps"]),
        (probed(0.3, 0.55, 0.5), []),  # two text encoder passes cost a little more
    ],
)
def test_what_times_tell(found: GuidanceProbe, kinds: list[str]) -> None:
    assert [flag.kind for flag in judge(found)] == kinds


def test_the_cost_is_in_forwards_per_step() -> None:
    assert guidance_cost(probed(0.3, 0.5, 0.5)) == pytest.approx(1.0)
    assert guidance_cost(probed(0.5, 0.5, 0.9)) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ([], []),
        (["--always-guided"], ["unasked_guidance"]),
        (["--ignores", "guidance_scale"], ["ignored_guidance"]),
    ],
)
def test_a_running_server_is_found_out(
    options: list[str], kinds: list[str], start_stub: Callable[..., Server], tmp_path: Path
) -> None:
    server = start_stub("--step", STEP_S, *options)
    parameters = Parameters(
        prompts=["x"], strata=["all"], seeds=[1], sizes=["16x16"], steps=8, guidance=0.0,
        warmup=0, runs=1, dtype="bfloat16", device=None,
    )  # fmt: skip
    setting = Setting("A", parameters, tmp_path, Journal(tmp_path), None, lambda *_: None)
    subject = Subject("s", "bf16_base", "", "other", [], url=server.url)
    with Session(subject, setting) as session:
        found = probe(session, WORK)
    assert [flag.kind for flag in judge(found)] == kinds
