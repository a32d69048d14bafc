"""`zimage-fp8 doctor`: what this machine can run, and the reasons given for what it cannot."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from zimage_fp8 import doctor, provenance


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine()


def test_fp8_on_the_cpu_is_tried_and_exact(report: doctor.Report) -> None:
    on_cpu = report.arithmetic[1]
    assert on_cpu.is_available
    assert on_cpu.why == "tried: equals dequantize-and-multiply bit for bit"


def test_a_wrong_product_is_not_called_available(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(*operands: torch.Tensor) -> torch.Tensor:
        return 2 * doctor.scaled_mm_reference(*operands)

    monkeypatch.setattr(doctor, "scaled_mm", doubled)
    verdict = doctor.try_fp8("FP8", torch.device("cpu"))
    assert not verdict.is_available
    assert "1.0e+00 from dequantize-and-multiply" in verdict.why


def test_a_failing_product_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*operands: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this device\nand a long trace")

    monkeypatch.setattr(doctor, "scaled_mm", refuse)
    verdict = doctor.try_fp8("FP8", torch.device("cpu"))
    assert verdict == doctor.Verdict("FP8", False, "tried: no kernel for this device")


@pytest.mark.parametrize(
    ("capability", "fp8", "int8", "flash_3"),
    [
        ((7, 5), False, False, False),
        ((8, 6), False, True, False),
        ((8, 9), True, True, False),
        ((9, 0), True, True, True),
        ((12, 1), True, True, False),
    ],
)
def test_gates(capability: doctor.Capability, fp8: bool, int8: bool, flash_3: bool) -> None:
    needs = (doctor.FP8, doctor.INT8, doctor.FLASH_3)
    verdicts = [doctor.gate("name", need, capability) for need in needs]
    assert [verdict.is_available for verdict in verdicts] == [fp8, int8, flash_3]


def test_a_gate_says_what_is_needed_and_what_is_here() -> None:
    verdict = doctor.gate("FP8", doctor.FP8, (8, 6))
    assert verdict.why == "FP8 tensor cores: 8.9 (Ada, Hopper, Blackwell), here 8.6"


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "built without CUDA"), ("13.0", "CUDA 13.0, but no device answers")]
)
def test_no_gpu_has_a_reason(cuda: str | None, reason: str) -> None:
    assert reason in doctor.no_gpu_reason(cuda)


def test_math_attention_always_runs(report: doctor.Report) -> None:
    assert {verdict.name: verdict.is_available for verdict in report.attention}["SDPA math"]


def test_everything_unavailable_says_why(report: doctor.Report) -> None:
    assert all(verdict.why for verdict in report.arithmetic + report.attention)


def test_the_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 34)
    report = doctor.examine()
    assert report.hub.has_token
    assert "hf_s" not in doctor.render(report) + json.dumps(asdict(report))


def test_packages_that_nothing_uses_are_not_named() -> None:
    assert "ray" not in [name for name, *_ in doctor.OPTIONAL_PACKAGES]


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "src" / "provenance.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None


def test_the_text_names_every_ability_and_package(report: doctor.Report) -> None:
    text = doctor.render(report)
    for fact in report.arithmetic + report.attention + report.packages:
        assert fact.name in text


@pytest.mark.gpu
def test_fp8_on_the_gpu_matches_its_gate(report: doctor.Report) -> None:
    expected = doctor.FP8.is_met_by(torch.cuda.get_device_capability())
    assert report.arithmetic[2].is_available == expected
