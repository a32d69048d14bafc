"""One part quantized at a time: the right part, resumed where it stopped, shown."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.evaluate import Subject, Workload, load_requests, load_subject
from zimage_fp8.quant.policy import find_policy
from zimage_fp8.sensitivity import sensitivity
from zimage_fp8.sensitivity.report import report_text
from zimage_fp8.sensitivity.result import read
from zimage_fp8.sensitivity.units import ALL, SCANS, Unit, draw_with, measure, plan_units

WORKLOAD = Workload(limit=1, size=(64, 64), steps=2)


@pytest.fixture(scope="module")
def subject(tiny_model: Path) -> Subject:
    requests = load_requests(tiny_model, WORKLOAD)
    return load_subject(str(tiny_model), tiny_model, find_policy("fp8-row"), requests)


def test_units_cover_every_module_once_per_scan(subject: Subject) -> None:
    modules = list(subject.quantized)
    units = plan_units(modules, 2, SCANS)
    for scan in ("kinds", "blocks", "cells"):
        covered = [m for u in units if u.key.startswith(f"{scan}:") for m in u.modules]
        assert sorted(covered) == sorted(modules), scan
    steps = [u for u in units if u.key.startswith("steps:")]
    assert [u.step for u in steps] == [None, 0, 1]
    assert sorted({m for u in steps for m in u.modules}) == sorted(modules)
    assert units[0] == Unit(ALL, tuple(modules))


def test_an_unknown_scan_is_refused() -> None:
    with pytest.raises(UsageError, match="expected kinds"):
        plan_units(["layers.0.feed_forward.w2"], 8, ["layers"])


def test_every_step_is_quantized_by_itself(subject: Subject) -> None:
    """Caption, step 1, step 2, everything: four different errors."""
    (request,) = subject.requests
    units = {u.key: u for u in plan_units(list(subject.quantized), 2, ["steps"])}
    latents = [draw_with(subject, request, u).latent for u in units.values()]
    assert len({latent.sum().item() for latent in latents}) == len(units)


def test_results_are_streamed_and_resumed(subject: Subject, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    units = plan_units(list(subject.quantized), 2, ["kinds"])
    done: list[tuple[int, int]] = []

    def stop_after_three(*progress: int) -> None:
        done.append(progress)  # type: ignore[arg-type]
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(subject, units, file, stop_after_three)
    kept = read(file)
    assert list(kept.units) == [ALL]  # a reference, one whole unit, half of the next
    done.clear()
    found = measure(subject, units, file, lambda *progress: done.append(progress))
    assert done[-1] == (len(units), len(units))  # a reference, and every unit but the first
    assert found.units[ALL] == kept.units[ALL]
    assert list(found.units) == [unit.key for unit in units]


def test_results_of_other_settings_are_refused(subject: Subject, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    units = plan_units(list(subject.quantized), 2, [])
    measure(subject, units, file)
    other = replace(subject, policy="int8-rot")
    with pytest.raises(ZImageError, match="another policy"):
        measure(other, units, file)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 9}', '{"schema": 1, "units": 3}'])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "found.json").write_text(text)
    with pytest.raises(ZImageError, match=r"found\.json"):
        read(tmp_path / "found.json")


def test_the_verb_writes_numbers_and_a_heat_map(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    found, files = sensitivity(
        str(tiny_model), "fp8-row", out, scans=["blocks", "text"], workload=WORKLOAD
    )
    assert json.loads(out.read_text())["settings"]["policy"] == "fp8-row"
    assert files == [out, tmp_path / "found.svg"]
    drawn = "".join(ElementTree.parse(files[1]).getroot().itertext())
    for key in found.of("blocks"):
        assert key.partition(":")[2] in drawn
    text = report_text(found, files)
    assert "everything quantized" in text
    assert "e4m3-row" in text
    assert all(found.mse(key) > 0 for key in found.of("text"))
