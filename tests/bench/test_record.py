"""record.json: what is written can be read back, and nothing else is accepted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_record import make_record
from zimage_fp8.bench.record import Quality, Record, RequestRecord, read_record, write_record
from zimage_fp8.bench.tidy import tidy_json
from zimage_fp8.errors import ZImageError


def test_round_trip(tmp_path: Path) -> None:
    record = make_record()
    write_record(record, tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == record
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_an_identical_picture_stays_valid_json(tmp_path: Path) -> None:
    record = with_infinite_psnr(make_record())
    write_record(record, tmp_path / "record.json")
    json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)
    assert read_record(tmp_path / "record.json") == record


def with_infinite_psnr(record: Record) -> Record:
    raw = record.model_dump()
    raw["passes"][0]["variants"][1]["requests"][0]["quality"] = Quality(
        psnr_db=float("inf"), ssim=1.0
    )
    return Record.model_validate(raw)


def test_a_request_is_a_line(tmp_path: Path) -> None:
    """So that a record of a thousand requests may lie in a repository."""
    record = make_record()
    write_record(record, tmp_path / "record.json")
    lines = (tmp_path / "record.json").read_text().splitlines()
    requests = [line.strip(" ,") for line in lines if line.strip().startswith('{"prompt": ')]
    rows = [row for variant in record.variants for row in variant.requests]
    assert [RequestRecord.model_validate_json(line) for line in requests] == rows


@pytest.mark.parametrize(
    "value",
    [{}, [], "x" * 900, {"a": ["b" * 700, [], {"c": 1}], "d": None}, [[1.5, -2] * 300], {"é": {}}],
)
def test_tidy_json_is_json(value: Any) -> None:
    assert json.loads(tidy_json(value)) == value


def test_a_missing_record_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ZImageError, match="cannot read the record"):
        read_record(tmp_path / "record.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "schema version 3, this program reads 1 and 2"),
        ({"schema_version": None}, "schema version None"),
        ({"machine": "mine"}, "damaged: machine"),
        ({"surprise": 1}, "damaged: surprise"),
    ],
)
def test_other_records_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**make_record().model_dump(mode="json"), **change}))
    with pytest.raises(ZImageError, match=message):
        read_record(path)


Raw = dict[str, Any]


def variants(raw: Raw) -> list[Raw]:
    return raw["passes"][0]["variants"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: variants(raw).clear(), "holds no variant that was measured"),
        (lambda raw: variants(raw).pop(0), "the reference bf16_base is missing"),
        (lambda raw: variants(raw)[1]["requests"].clear(), r"variants\.1\.requests"),
        (lambda raw: variants(raw)[1]["requests"].pop(), "online_fp8 did not draw every prompt"),
        (
            lambda raw: variants(raw)[1]["requests"][0].pop("quality"),
            "online_fp8 is not compared",
        ),
        (lambda raw: variants(raw)[1].update(name="full"), "two are named full"),
        (lambda raw: raw["parameters"]["seeds"].pop(), "one seed and one stratum per prompt"),
        (lambda raw: raw["parameters"]["strata"].pop(), "one seed and one stratum per prompt"),
        (lambda raw: raw["parameters"]["sizes"].clear(), "sizes is empty"),
        (lambda raw: raw["passes"].clear(), "passes"),
    ],
)
def test_a_record_without_what_tables_need_is_damaged(
    tmp_path: Path, damage: Callable[[Raw], object], message: str
) -> None:
    raw = make_record().model_dump(mode="json")
    damage(raw)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ZImageError, match=f"damaged: .*{message}"):
        read_record(path)


def test_memory_is_compared_by_a_method_that_every_variant_has() -> None:
    raw = make_record().model_dump()
    for variant in raw["passes"][0]["variants"]:
        variant["peak_memory_bytes"]["torch_reserved"] = 1
    del raw["passes"][0]["variants"][3]["peak_memory_bytes"]["nvml_process"]
    assert Record.model_validate(raw).memory_method == "torch_reserved"


def as_version_1(record: Record) -> Raw:
    """What the first version of the benchmark would have written."""
    raw = record.model_dump(mode="json")
    (one,) = raw.pop("passes")
    parameters = raw["parameters"]
    parameters["width"], parameters["height"] = map(int, parameters.pop("sizes")[0].split("x"))
    for key in ("strata", "warm_tolerance", "max_warmup"):
        del parameters[key]
    for key in ("profile", "no_quality", "flags"):
        del raw[key]
    old = ("policy", "summary", "command", "server", "load_s", "warmup_latencies_s", "requests")
    old += ("peak_memory_bytes", "memory_sampling_hz", "num_memory_samples")
    new = ("size", "is_timed", "position", "sent_s", "energy_j")
    raw["variants"] = [{key: variant[key] for key in old} for variant in one["variants"]]
    for variant, full in zip(raw["variants"], one["variants"], strict=True):
        for request in variant["requests"]:
            request["sigmas"] = full["sigmas"]
            for key in new:
                del request[key]
            if request["quality"]:
                request["quality"] = {key: request["quality"][key] for key in ("psnr_db", "ssim")}
    return {**raw, "schema_version": 1}


def test_version_1_is_read_as_version_2(tmp_path: Path) -> None:
    record = make_record()
    path = tmp_path / "record.json"
    path.write_text(json.dumps(as_version_1(record)))
    old = read_record(path)
    assert (old.schema_version, old.profile.name) == (2, "version 1")
    assert old.parameters.sizes == record.parameters.sizes
    for before, after in zip(record.variants, old.variants, strict=True):
        assert after.latencies_s(old.parameters.size) == [r.latency_s for r in before.requests]
        assert [r.quality for r in after.requests] == [r.quality for r in before.requests]
        assert (after.sigmas, after.attention) == (before.sigmas, before.attention)


@pytest.mark.parametrize("part", ["parameters", "variants"])
def test_a_damaged_version_1_is_one_sentence(tmp_path: Path, part: str) -> None:
    raw = as_version_1(make_record())
    del raw[part]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ZImageError, match=f"is damaged: KeyError '{part}'"):
        read_record(path)
