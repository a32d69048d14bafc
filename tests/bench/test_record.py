"""record.json: what is written can be read back, and nothing else is accepted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_record import make_record
from zimage_fp8.bench.record import Quality, Record, read_record, write_record
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
    raw["passes"][0]["variants"][1]["requests"][0]["quality"] = Quality(psnr_db=float("inf"), ssim=1.0)
    return Record.model_validate(raw)


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
