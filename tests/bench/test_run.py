"""Whole runs against stub servers: order, resuming, failing, and what is found out."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from fake_gpu import FakeDriver
from stub_server import launch_command
from zimage_fp8.bench import conduct as conducting
from zimage_fp8.bench import gpu
from zimage_fp8.bench.conduct import Choices, conduct
from zimage_fp8.bench.gpu import Reading
from zimage_fp8.bench.launch import Server
from zimage_fp8.bench.record import Flag, Record, VariantRecord, read_record
from zimage_fp8.bench.run import PassRun
from zimage_fp8.bench.workload import Wishes
from zimage_fp8.errors import UsageError, ZImageError

PROFILE = """
name = "small"
summary = "x"
sizes = ["32x16", "16x32"]
steps = 2
timed = 4
warmup = 1
order = "interleaved"
floors = ["rerun", "attention", "next_seed"]
floor_attention = "other"

[load]
requests = 2
concurrency = [2]
rates = [0.5]

[prompts]
first = ["a", "b"]
second = ["c"]
"""
COUNTED = ("--counts-forwards", 1)


@pytest.fixture(autouse=True)
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """CI's machine is busy with these very tests."""
    monkeypatch.setattr(conducting, "LOOK_S", 0.01)


def run(
    tmp_path: Path,
    *options: object,
    profile: str = PROFILE,
    policies: tuple[str, ...] = ("online_fp8", "fp8-row"),
    launch: str | None = None,
    **choices: Any,
) -> Record:
    path = tmp_path / "small.toml"
    path.write_text(profile)
    command = launch or launch_command("--attention", "'{attention}'", *options)
    chosen = Choices(policies=policies, launch=command, **choices)
    return conduct("nano", tmp_path / "out", Wishes(profile=str(path), device="cpu"), chosen)


def kinds(variant: VariantRecord) -> list[str]:
    return [flag.kind for flag in variant.flags]


def test_an_interleaved_run_holds_everything(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    record = run(tmp_path, *COUNTED)
    assert read_record(tmp_path / "out" / "record.json") == record
    (one,) = record.passes
    assert [variant.name for variant in one.variants] == ["bf16_base", "online_fp8", "fp8-row"]
    assert [floor.name for floor in one.floors] == [
        "bf16_base (rerun)", "bf16_base (attention)", "bf16_base (next_seed)",
    ]  # fmt: skip
    assert one.failures == []
    assert one.order == "interleaved"
    assert one.order_reason.startswith("All 3 servers were alive")
    for variant in one.variants:
        assert len(variant.requests) == 3 * 2 + 4 * 2
        assert len(variant.latencies_s("16x32")) == 4
        assert len(variant.warmup_latencies_s) == 2
        assert [(load.concurrency, len(load.latencies_s)) for load in variant.load] == [
            (2, 2), (None, 2),
        ]  # fmt: skip
        assert variant.peak_memory_bytes["torch_reserved"] == 2**30
        assert variant.peak_memory_bytes["sampled_rss"] == max(
            variant.load_memory_bytes["sampled_rss"], variant.steady_memory_bytes["sampled_rss"]
        )
        assert variant.load_s
        assert variant.cold_start_s
        assert variant.cold_start_s > variant.load_s
    rerun, attention, next_seed = one.floors
    assert all(row.quality and row.quality.is_identical for row in rerun.requests)
    assert attention.attention == "other"
    assert next_seed.requests[0].seed == record.parameters.seeds[0] + 1
    assert all(row.quality and row.quality.psnr_db < 15 for row in next_seed.requests)
    assert all(row.quality and 25 < row.quality.psnr_db < 60 for row in one.variants[1].requests)
    # multiprocessing keeps a helper of its own from earlier tests.
    assert set(psutil.Process().children(recursive=True)) <= before


def test_timed_requests_go_forwards_and_backwards(tmp_path: Path) -> None:
    """A B C C B A A B C …: each variant meets the same drift, and is asked the same things."""
    record = run(tmp_path, *COUNTED)
    timed = sorted(
        (row.position, variant.name, row.prompt, row.size)
        for variant in record.variants
        for row in variant.timed
    )
    names = [name for _, name, _, _ in timed]
    forth = ["bf16_base", "online_fp8", "fp8-row"]
    assert names == (forth + forth[::-1]) * 4
    cases = [(prompt, size) for _, _, prompt, size in timed]
    assert all(len(set(cases[first : first + 3])) == 1 for first in range(0, 24, 3))
    positions = [position for position, *_ in timed]
    assert positions == list(range(positions[0], positions[0] + 24))


@pytest.mark.parametrize(("free_servers", "order"), [(0.5, "sequential"), (1.5, "interleaved")])
def test_less_memory_means_smaller_groups(
    free_servers: float, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[int] = []
    choose = PassRun._choose_order

    def with_little_room(self: PassRun, base: Any) -> Any:
        peaks.append(base.peak_bytes())
        free = int(free_servers * peaks[0] / 0.9)
        monkeypatch.setattr(PassRun, "_free_bytes", lambda self: free)
        return choose(self, base)

    monkeypatch.setattr(PassRun, "_choose_order", with_little_room)
    profile = PROFILE.replace('floors = ["rerun", "attention", "next_seed"]', "floors = []")
    profile = profile.replace('floor_attention = "other"\n', "")
    (one,) = run(tmp_path, *COUNTED, profile=profile).passes
    assert one.order == order
    assert "GiB are free beside it" in one.order_reason
    base, *others = one.variants
    assert {len(variant.timed) for variant in others} == {8}
    # In groups of one the reference is timed once with each of the two others.
    assert len(base.timed) == (16 if order == "interleaved" else 8)


@pytest.mark.parametrize("is_unified", [False, True])
def test_energy_clocks_and_memory_of_a_gpu_are_in_the_record(
    is_unified: bool, driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pretended GPU: every look at its counter costs a joule, a request is two looks apart.

    It names no process, so that torch's own figure is the table's, with unified memory too.
    """
    if is_unified:
        driver.used = driver.total = driver.processes = None
    driver.reading = Reading(1500.0, 400.0, 50.0, 0.0, frozenset({"hw_thermal_slowdown"}))
    monkeypatch.setattr(conducting, "find_driver", lambda _device: driver)
    monkeypatch.setattr(gpu, "BUSY_PAUSE_S", 0)
    options = ("--overhead", 0.1)
    record = run(tmp_path, *COUNTED, *options, profile=SHORT, policies=("online_fp8",))
    assert record.machine.gpus[0].name == "NVIDIA Test 9000"
    assert record.memory_method == "torch_reserved"
    for variant in record.variants:
        assert {row.energy_j for row in variant.requests} == {1.0}
        assert variant.gpu
        assert variant.gpu.sm_clock_mhz
        assert variant.gpu.sm_clock_mhz.mean == 1500
        assert variant.gpu.throttled == {"hw_thermal_slowdown": 1.0}
        assert kinds(variant) == ["throttled"]
        assert "process_rss" not in variant.peak_memory_bytes


def test_a_variant_that_breaks_is_a_row_and_not_a_crash(tmp_path: Path) -> None:
    record = run(tmp_path, *COUNTED, "--only-policy", "fp8-row", "--dies-after", 12)
    (one,) = record.passes
    assert [variant.name for variant in one.variants] == ["bf16_base", "online_fp8"]
    (failed,) = one.failures
    assert failed.name == "fp8-row"
    assert "did not answer" in failed.error
    assert "out of memory" in failed.error
    for folder in (tmp_path / "out", Path(sys.prefix)):
        assert str(folder) not in (tmp_path / "out" / "record.json").read_text()


def test_a_broken_reference_is_no_record_but_loses_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZImageError, match=r"measured nothing; bf16_base failed first") as broken:
        run(tmp_path, *COUNTED, "--only-policy", "bf16_base", "--dies-after", 5)
    assert broken.value.hint
    assert "go on" in broken.value.hint
    assert not (tmp_path / "out" / "record.json").exists()
    assert (tmp_path / "out/journal/A/bf16_base.jsonl").exists()


SHORT = """
name = "short"
summary = "x"
sizes = ["32x16"]
steps = 2
timed = 2
draw_before_timing = false
[prompts]
all = ["a", "b"]
"""


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (["--flat"], "flat_picture"),
        (["--same"], "same_pictures"),
        (["--same", "--labelled"], "same_pictures"),
        (["--ignores", "seed"], "ignored_seed"),
    ],
)
def test_odd_pictures_are_flagged(options: list[str], kind: str, tmp_path: Path) -> None:
    record = run(
        tmp_path, *COUNTED, *options, "--only-policy", "online_fp8", profile=SHORT,
        policies=("online_fp8",),
    )  # fmt: skip
    base, odd = record.variants
    assert kind in kinds(odd)
    assert kinds(base) == []


def test_a_request_that_draws_another_picture_each_time_is_flagged(tmp_path: Path) -> None:
    profile = SHORT.replace("draw_before_timing = false\n", "")
    options = ("--unrepeatable", "--only-policy", "online_fp8")
    record = run(tmp_path, *COUNTED, *options, profile=profile, policies=("online_fp8",))
    base, odd = record.variants
    assert "not_repeatable" in kinds(odd)
    assert kinds(base) == []
    assert len({row.picture for row in odd.requests}) == len(odd.requests) == 4
    assert len({row.picture for row in base.requests}) == 2


def test_a_file_that_tells_when_it_was_made_is_no_other_picture(tmp_path: Path) -> None:
    profile = SHORT.replace("draw_before_timing = false\n", "")
    record = run(tmp_path, *COUNTED, "--labelled", profile=profile, policies=("online_fp8",))
    assert [kinds(variant) for variant in record.variants] == [[], []]


def test_a_server_that_refuses_guidance_is_measured_all_the_same(tmp_path: Path) -> None:
    record = run(tmp_path, "--refuses-guidance", profile=SHORT, policies=("online_fp8",))
    for variant in record.variants:
        assert kinds(variant) == ["unprobed"]
        assert "the server answered 400" in variant.flags[0].text
        assert variant.probe is None


def test_the_warm_up_is_no_first_sight_of_a_timed_prompt(tmp_path: Path) -> None:
    """A server that remembers encoded prompts would answer it faster."""
    log = tmp_path / "requests.jsonl"
    run(tmp_path, *COUNTED, "--requests", log, profile=SHORT, policies=("online_fp8",))
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    sent = [one["prompt"] for one in asked if one["policy"] == "bf16_base"]
    assert sent == ["a.", "a", "b", "a"]  # warm-up, timed, timed, and with the next seed
    assert [one["seed"] for one in asked[:4]] == [1234, 1235, 1236, 1236]


def test_a_flag_of_the_whole_run_outlives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that is finished is not busy, whatever the machine does now."""
    busy = Flag(kind="busy_machine", text="Other programs used 90% of the CPU.")
    idle: list[Flag] = []
    options = ("--only-policy", "fp8-row", "--dies-after", 2)
    monkeypatch.setattr(conducting, "refuse_busy", lambda *_: [busy])
    first = run(tmp_path, *COUNTED, *options, profile=SHORT)
    assert first.passes[0].failures
    monkeypatch.setattr(conducting, "refuse_busy", lambda *_: idle)
    assert run(tmp_path, *COUNTED, *options, profile=SHORT).flags == [busy]


def test_a_finished_run_does_not_look_whether_the_machine_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run(tmp_path, *COUNTED)
    monkeypatch.setattr(conducting, "refuse_busy", None)
    assert run(tmp_path, *COUNTED) == record


def test_pictures_of_another_size_fail_the_variant(tmp_path: Path) -> None:
    options = ("--size", "16x16", "--only-policy", "online_fp8")
    record = run(tmp_path, *COUNTED, *options, profile=SHORT, policies=("online_fp8", "fp8-row"))
    (failed,) = record.passes[0].failures
    assert failed.name == "online_fp8"
    assert "32x16 was asked for, the picture is 16x16" in failed.error


def test_a_server_that_counts_twice_the_forwards_is_not_compared(tmp_path: Path) -> None:
    options = ("--counts-forwards", 2, "--only-policy", "online_fp8")
    record = run(tmp_path, *options, profile=SHORT, policies=("online_fp8", "fp8-row"))
    (failed,) = record.passes[0].failures
    assert failed.name == "online_fp8"
    assert "it ran [4] forwards per picture, the reference [2]" in failed.error


def test_a_server_that_secretly_runs_guidance_is_flagged(tmp_path: Path) -> None:
    """It does not count its forwards, so its clock is asked."""
    options = ("--step", 0.02, "--always-guided", "--only-policy", "online_fp8")
    record = run(tmp_path, *options, profile=SHORT, policies=("online_fp8",))
    base, guided = record.variants
    assert kinds(base) == []
    assert kinds(guided) == ["unasked_guidance"]
    assert guided.probe
    assert base.probe


def test_known_latencies_are_recovered(tmp_path: Path) -> None:
    """40 ms beside 2 steps of 30 ms, plus HTTP: the median lies just above."""
    profile = SHORT.replace("timed = 2", "timed = 12")
    options = ("--overhead", 0.04, "--step", 0.03)
    record = run(tmp_path, *COUNTED, *options, profile=profile, policies=("online_fp8",))
    for variant in record.variants:
        latencies = sorted(variant.latencies_s("32x16"))
        assert len(latencies) == 12
        assert latencies[0] >= 0.1
        # Room for a busy machine; HTTP and drawing take 5 to 10 ms here.
        assert latencies[6] < 0.16


def test_a_finished_run_measures_nothing_again(tmp_path: Path) -> None:
    log = tmp_path / "requests.jsonl"
    first = run(tmp_path, *COUNTED, "--requests", log)
    asked = log.read_text()
    assert run(tmp_path, *COUNTED, "--requests", log) == first
    assert log.read_text() == asked


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path, *COUNTED, profile=SHORT, policies=("online_fp8",))
    with pytest.raises(ZImageError, match="another run: it differs in profile, parameters"):
        run(tmp_path, *COUNTED, profile=SHORT.replace('"b"', '"c"'), policies=("online_fp8",))


KILLED = """
import sys
from pathlib import Path
from zimage_fp8.bench.conduct import Choices, conduct
from zimage_fp8.bench.workload import Wishes
out, profile, command = sys.argv[1:]
conduct("nano", Path(out), Wishes(profile=profile, device="cpu"),
        Choices(policies=("online_fp8", "fp8-row"), launch=command))
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_before", [15, 45])  # while alone, and while in turns
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, num_before: int) -> None:
    """Killed without a chance to clean up: nothing is measured twice, nothing is lost."""
    log, profile, out = tmp_path / "requests.jsonl", tmp_path / "small.toml", tmp_path / "out"
    profile.write_text(PROFILE)
    command = launch_command(*COUNTED, "--attention", "'{attention}'", "--requests", log)
    arguments = [sys.executable, "-c", KILLED, str(out), str(profile), command]
    first = subprocess.Popen(arguments)
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < num_before:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = rows_on_disk(out)
    subprocess.run(arguments, check=True)
    assert not orphans(log)
    record = read_record(out / "record.json")
    (one,) = record.passes
    assert one.failures == []
    assert set(kept) <= set(rows_on_disk(out))
    for variant in one.variants:
        assert len(variant.requests) == 3 * 2 + 4 * 2
        assert len({row.position for row in variant.requests}) == len(variant.requests)


@pytest.mark.slow
def test_a_run_killed_while_quantizing_starts_again(tiny_model: Path, tmp_path: Path) -> None:
    """The process that quantizes outlives its parent; two of them must not write one folder."""
    profile, out = tmp_path / "short.toml", tmp_path / "out"
    profile.write_text(SHORT.replace("32x16", "64x64"))
    command = ["-m", "zimage_fp8", "bench", str(tiny_model), "--profile", str(profile)]
    command += ["--policies", "full", "--device", "cpu", "--out", str(out)]
    first = subprocess.Popen([sys.executable, *command])
    notes = out / "journal" / "servers.txt"
    deadline = time.monotonic() + 120
    while not notes.exists() or not notes.read_text().endswith("\n"):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    quantizing = int(notes.read_text().split()[0])
    assert not (out / "checkpoints" / "full").exists()
    subprocess.run([sys.executable, *command], check=True)
    assert not psutil.pid_exists(quantizing)
    record = read_record(out / "record.json")
    assert [variant.name for variant in record.variants] == ["bf16_base", "full"]


def rows_on_disk(out: Path) -> list[str]:
    """Every whole line of every journal."""
    return [
        line
        for path in sorted(out.glob("journal/*/*.jsonl"))
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


def orphans(log: Path) -> list[int]:
    """Stub servers of this test that still live."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(log) in (process.info["cmdline"] or []) and process.pid != os.getpid()
    ]


def test_a_journal_line_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    run(tmp_path, *COUNTED, profile=SHORT, policies=("online_fp8",))
    path = tmp_path / "out/journal/A/online_fp8.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert "timed" in lines[3]
    path.write_text("".join([*lines[:3], lines[3][:50]]))
    record = run(tmp_path, *COUNTED, profile=SHORT, policies=("online_fp8",))
    assert len(record.variants[1].requests) == 2


def test_a_damaged_journal_is_one_sentence(tmp_path: Path) -> None:
    run(tmp_path, *COUNTED, profile=SHORT, policies=("online_fp8",))
    path = tmp_path / "out/journal/A/online_fp8.jsonl"
    path.write_text(json.dumps({"surprise": 1}) + "\n" + path.read_text())
    with pytest.raises(ZImageError, match=r"online_fp8\.jsonl, line 1 is damaged"):
        run(tmp_path, *COUNTED, profile=SHORT, policies=("online_fp8",))


class TestTargets:
    """Servers that run already."""

    def measure(self, tmp_path: Path, *targets: str, **choices: Any) -> Record:
        path = tmp_path / "short.toml"
        path.write_text(SHORT.replace("[prompts]", 'floors = ["rerun"]\n[prompts]'))
        chosen = Choices(targets=targets, **choices)
        return conduct(
            "me/model", tmp_path / "out", Wishes(profile=str(path), device="cpu"), chosen
        )

    def test_two_are_compared(self, tmp_path: Path, start_stub: Callable[..., Server]) -> None:
        base = start_stub("--model", "me/model", *COUNTED)
        other = start_stub("--model", "/models/model", *COUNTED, "--policy", "mine")
        record = self.measure(tmp_path, f"mine={other.url}", f"bf16_base={base.url}/v1")
        assert [variant.name for variant in record.variants] == ["bf16_base", "mine"]
        assert record.variants[0].load_s is None
        assert record.variants[1].requests[0].quality
        assert [floor.name for floor in record.passes[0].floors] == ["bf16_base (rerun)"]
        assert base.process.poll() is None

    def test_one_alone_has_no_quality(
        self, tmp_path: Path, start_stub: Callable[..., Server]
    ) -> None:
        url = start_stub("--model", "me/model", *COUNTED).url
        record = self.measure(tmp_path, url)
        assert record.no_quality
        assert "nothing to compare with" in record.no_quality
        assert [variant.name for variant in record.variants] == ["target"]

    def test_another_model_is_named(
        self, tmp_path: Path, start_stub: Callable[..., Server]
    ) -> None:
        url = start_stub("--model", "you/another").url
        with pytest.raises(ZImageError, match="serves you/another, not me/model"):
            self.measure(tmp_path, url)
        assert not (tmp_path / "out").exists()

    def test_nobody_answers(self, tmp_path: Path) -> None:
        with pytest.raises(ZImageError, match=r"127\.0\.0\.1:9: no server answers"):
            self.measure(tmp_path, "http://127.0.0.1:9")

    @pytest.mark.parametrize("target", ["localhost:8000", "a=b"])
    def test_what_is_no_url(self, target: str, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"expected \[NAME=\]http"):
            self.measure(tmp_path, target)

    def test_policies_are_not_for_targets(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="neither --launch nor"):
            self.measure(tmp_path, "http://x", policies=("full",))
