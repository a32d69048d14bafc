"""What changed between two records, and several records as one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fake_record import changed, make_record, make_rich_record, save_pictures
from zimage_fp8.bench.compare import Change, compare_records, comparison_text, merge_records
from zimage_fp8.bench.record import Pass, Record, RequestRecord, write_record
from zimage_fp8.bench.report import write_report
from zimage_fp8.bench.table import rows
from zimage_fp8.errors import UsageError, ZImageError

NAME = "full"


def with_rows(record: Record, change: Callable[[RequestRecord], dict[str, object]]) -> Record:
    """The record with the requests of one variant changed."""
    variant = next(v for v in record.variants if v.name == NAME)
    rows = [row.model_copy(update=change(row)) for row in variant.requests]
    return changed(record, NAME, requests=rows)


def times(factor: float) -> Callable[[RequestRecord], dict[str, object]]:
    return lambda row: {"latency_s": row.latency_s * factor}


def brighter(decibels: float) -> Callable[[RequestRecord], dict[str, object]]:
    def change(row: RequestRecord) -> dict[str, object]:
        assert row.quality
        psnr_db = row.quality.psnr_db + decibels
        return {"quality": row.quality.model_copy(update={"psnr_db": psnr_db})}

    return change


def verdicts(old: Record, new: Record) -> dict[tuple[str, str], str]:
    """(what, size) -> verdict of the changed variant in the main pass; the rest must be still."""
    found = compare_records(old, new)
    others = [c for c in found if (c.variant, c.pass_name) != (NAME, "A")]
    assert {change.verdict for change in others} == {"not distinguishable"}
    return {(c.what, c.size): c.verdict for c in found if c not in others}


@pytest.mark.parametrize(
    ("change", "latency", "psnr"),
    [
        (times(1.0), "not distinguishable", "not distinguishable"),
        (times(1.004), "not distinguishable", "not distinguishable"),
        (times(1.1), "worse", "not distinguishable"),
        (times(0.9), "better", "not distinguishable"),
        (brighter(-1.0), "not distinguishable", "worse"),
        (brighter(0.5), "not distinguishable", "better"),
    ],
)
def test_only_what_is_beyond_noise_counts(
    change: Callable[[RequestRecord], dict[str, object]], latency: str, psnr: str
) -> None:
    old = make_rich_record()
    found = verdicts(old, with_rows(old, change))
    assert found["latency", old.parameters.size] == latency
    assert found["psnr_db", ""] == psnr


def test_one_noisy_request_is_no_change() -> None:
    old = make_rich_record()
    new = with_rows(old, lambda row: {"latency_s": row.latency_s * (5 if row.position == 3 else 1)})
    assert verdicts(old, new)["latency", old.parameters.size] == "not distinguishable"


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.005, "not distinguishable"), (1.05, "worse"), (0.9, "better")]
)
def test_memory_counts_from_one_percent(factor: float, verdict: str) -> None:
    old = make_rich_record()
    variant = next(v for v in old.variants if v.name == NAME)
    peaks = {key: round(value * factor) for key, value in variant.peak_memory_bytes.items()}
    new = changed(old, NAME, peak_memory_bytes=peaks)
    assert verdicts(old, new)["memory", ""] == verdict


def without(record: Record, name: str) -> Record:
    main, *others = record.passes
    variants = [variant for variant in main.variants if variant.name != name]
    return record.model_copy(
        update={"passes": [main.model_copy(update={"variants": variants}), *others]}
    )


def test_what_is_gone_is_worse_and_what_is_new_is_not() -> None:
    record = make_rich_record()
    assert [(c.variant, c.what) for c in worse(record, without(record, NAME))] == [(NAME, "gone")]
    assert worse(without(record, NAME), record) == []


def worse(old: Record, new: Record) -> list[Change]:
    return [change for change in compare_records(old, new) if change.verdict == "worse"]


def test_the_text_says_how_much() -> None:
    old = make_rich_record()
    changes = compare_records(old, with_rows(old, times(1.1)))
    first, *_, last = comparison_text(changes).splitlines()
    assert first.startswith("worse   pass A full 64x32: latency +10.0 % (+")
    assert first.split(", median ")[1].endswith(" s")
    assert last == f"{len(changes) - 2} of {len(changes)} figures are not distinguishable"


def with_parameters(record: Record, **changes: object) -> Record:
    parameters = record.parameters.model_copy(update=changes)
    return record.model_copy(update={"parameters": parameters})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: with_parameters(r, steps=9), "parameters.steps: 8 and 9"),
        (lambda r: r.model_copy(update={"model": "other"}), "model: Tongyi-MAI/.* and other"),
        (
            lambda r: r.model_copy(update={"machine": r.machine.model_copy(update={"gpus": []})}),
            r"gpus: \['NVIDIA Test 9000'\] and \[\]",
        ),
    ],
)
def test_other_work_is_refused_by_name(change: Callable[[Record], Record], sentence: str) -> None:
    record = make_record()
    with pytest.raises(UsageError, match=f"cannot be compared: {sentence}"):
        compare_records(record, change(record))


def test_a_restart_is_still_the_same_machine() -> None:
    record = make_record()
    machine = record.machine.model_copy(update={"memory_bytes": 1, "system": "Linux 9"})
    assert worse(record, record.model_copy(update={"machine": machine})) == []


def saved(record: Record, folder: Path) -> Path:
    folder.mkdir()
    save_pictures(record, folder)
    write_record(record, folder / "record.json")
    return folder / "record.json"


def only(record: Record, *names: str) -> Record:
    main: Pass = record.passes[0]
    variants = [variant for variant in main.variants if variant.name in ("bf16_base", *names)]
    return record.model_copy(update={"passes": [main.model_copy(update={"variants": variants})]})


@pytest.fixture
def halves(tmp_path: Path) -> list[Path]:
    record = make_record()
    return [
        saved(only(record, "full"), tmp_path / "one"),
        saved(only(record, "online_fp8", "ffn-only"), tmp_path / "two"),
    ]


def test_two_runs_become_one_report(halves: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    merged = merge_records(halves, out)
    assert [v.name for v in merged.variants] == ["bf16_base", "full", "online_fp8", "ffn-only"]
    assert merged.passes[0].order == "sequential"
    whole = {row.name: row for row in rows(make_record())}
    for row in rows(merged):
        assert (row.latency_s, row.psnr_db) == (whole[row.name].latency_s, whole[row.name].psnr_db)
    write_report(merged, out)
    picture = merged.variants[2].requests[0].picture
    assert (out / picture).read_bytes() == (tmp_path / "two" / picture[5:]).read_bytes()


def test_one_variant_in_two_runs_is_refused(halves: list[Path], tmp_path: Path) -> None:
    again = saved(only(make_record(), "full"), tmp_path / "again")
    with pytest.raises(UsageError, match="cannot be merged: both measured full"):
        merge_records([*halves, again], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_reference_is_refused(halves: list[Path], tmp_path: Path) -> None:
    record = only(make_record(), "attn-only")
    rows = [r.model_copy(update={"sha256": "0" * 64}) for r in record.variants[0].requests]
    other = saved(changed(record, "bf16_base", requests=rows), tmp_path / "other")
    with pytest.raises(UsageError, match="their BF16 pictures differ"):
        merge_records([halves[0], other], tmp_path / "merged")


def test_other_versions_are_refused_by_name(halves: list[Path], tmp_path: Path) -> None:
    record = only(make_record(), "attn-only")
    newer = record.model_copy(update={"versions": {**record.versions, "torch": "3.0"}})
    other = saved(newer, tmp_path / "other")
    with pytest.raises(UsageError, match=r"versions\.torch: 2\.13\.0 and 3\.0"):
        merge_records([halves[0], other], tmp_path / "merged")


def test_a_picture_that_is_missing_is_one_sentence(halves: list[Path], tmp_path: Path) -> None:
    (tmp_path / "two/pictures/ffn-only/prompt0.png").unlink()
    with pytest.raises(ZImageError, match=r"cannot copy the picture pictures/ffn-only/\S+"):
        merge_records(halves, tmp_path / "merged")


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "zimage_fp8", "bench", *map(str, words)]
    return subprocess.run(arguments, capture_output=True, text=True)


def test_the_exit_code_is_for_ci(tmp_path: Path) -> None:
    record = make_rich_record()
    for name, one in (("old", record), ("new", with_rows(record, times(1.2)))):
        write_record(one, tmp_path / f"{name}.json")
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert command("compare", old, old).returncode == 0
    done = command("compare", old, new, "--json")
    assert done.returncode == 1
    changes = json.loads(done.stdout)
    assert {c["variant"] for c in changes if c["verdict"] == "worse"} == {NAME}
    write_record(with_parameters(record, steps=9), new)
    done = command("compare", old, new)
    assert (done.returncode, done.stdout) == (2, "")
    assert "parameters.steps: 8 and 9" in done.stderr


def test_the_command_renders_again_and_merges(halves: list[Path], tmp_path: Path) -> None:
    done = command("report", halves[0])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "one" / f"report.{k}") for k in ("md", "html")]
    done = command("report", *halves, "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"record.json", "report.html", "report.md", "plots", "run1", "run2"} <= names
    done = command("report", *halves)
    assert (done.returncode, "--out is missing" in done.stderr) == (2, True)
