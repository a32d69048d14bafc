"""`zimage-fp8 doctor`: what this machine can run, and the reasons given for what it cannot."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from zimage_fp8 import doctor, provenance
from zimage_fp8.kernels import hopper, nvrtc
from zimage_fp8.numerics import E4M3_STATIC


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine()


CPU = torch.device("cpu")


def named(verdicts: tuple[doctor.Verdict, ...]) -> dict[str, doctor.Verdict]:
    return {verdict.name: verdict for verdict in verdicts}


@pytest.mark.parametrize("format", ["FP8", "INT8"])
def test_products_on_the_cpu_are_tried_and_exact(report: doctor.Report, format: str) -> None:
    on_cpu = named(report.arithmetic)[f"{format} on the CPU"]
    assert on_cpu.is_available
    assert on_cpu.why == "tried (reference): equals dequantize-and-multiply bit for bit"


def test_a_wrong_product_is_not_called_available(monkeypatch: pytest.MonkeyPatch) -> None:
    right = doctor.matmul
    monkeypatch.setattr(doctor, "matmul", lambda *operands: 2 * right(*operands))
    verdict = doctor.try_product("FP8", E4M3_STATIC, CPU)
    assert not verdict.is_available
    assert "1.0e+00 from dequantize-and-multiply" in verdict.why


def test_a_failing_product_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*operands: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this device\nand a long trace")

    monkeypatch.setattr(doctor, "matmul", refuse)
    verdict = doctor.try_product("FP8", E4M3_STATIC, CPU)
    assert verdict == doctor.Verdict("FP8", False, "tried: no kernel for this device")


EVERYWHERE = {"sdpa", "math"}
FROM_AMPERE = EVERYWHERE | {"cudnn", "flash2", "sage"}
HOPPERS_OWN = {"hopper", "fa3", "fa3-fp8"}


@pytest.mark.parametrize(
    ("capability", "formats", "backends"),
    [
        ((7, 5), set(), EVERYWHERE),  # Turing
        ((8, 0), {"BF16", "INT8", "fused"}, FROM_AMPERE),
        ((8, 6), {"BF16", "INT8", "fused"}, FROM_AMPERE),
        ((8, 9), {"BF16", "INT8", "fused", "FP8"}, FROM_AMPERE),  # Ada
        ((9, 0), {"BF16", "INT8", "fused", "FP8"}, FROM_AMPERE | HOPPERS_OWN),
        ((10, 0), {"BF16", "INT8", "fused", "FP8"}, FROM_AMPERE),  # Blackwell
        ((12, 1), {"BF16", "INT8", "fused", "FP8"}, FROM_AMPERE),  # GB10
    ],
)
def test_what_runs_on_a_gpu_follows_its_capability(
    monkeypatch: pytest.MonkeyPatch,
    capability: doctor.Capability,
    formats: set[str],
    backends: set[str],
) -> None:
    """As on a machine with every package, where all that is tried succeeds."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(nvrtc, "find_library", lambda: object())
    monkeypatch.setattr(hopper, "HAS_TRITON", True)
    monkeypatch.setattr(doctor, "HAS_TRITON", True)
    monkeypatch.setattr(doctor, "try_product", lambda name, *_: doctor.Verdict(name, True, "tried"))
    monkeypatch.setattr(doctor, "try_attention", lambda *_: None)
    arithmetic = [v for v in doctor.arithmetic(capability) if "CPU" not in v.name]
    assert {v.name.split()[0] for v in arithmetic if v.is_available} == formats
    fp8 = [v.is_available for v in arithmetic if v.name.startswith("FP8")]
    assert len(fp8) == 2
    assert len(set(fp8)) == 1
    attention = doctor.attention(capability)
    assert {v.name for v in attention if v.is_available} == backends
    assert sum("auto takes it" in v.why for v in attention) == 1
    here = ".".join(map(str, capability))
    for refused in (v for v in (*arithmetic, *attention) if not v.is_available):
        assert here in refused.why, refused


@pytest.mark.parametrize(
    ("capability", "available"),
    [
        (None, {"reference"}),
        ((7, 5), {"reference"}),
        ((8, 0), {"reference", "cublas", "triton"}),
        ((8, 9), {"reference", "cublas", "cublas-slow", "cublas-row", "triton"}),
        (
            (9, 0),
            {"reference", "cublas", "cublas-slow", "cublas-row", "triton-tma", "triton", "wgmma"},
        ),
        ((12, 1), {"reference", "cublas", "cublas-slow", "cublas-row", "triton-tma", "triton"}),
    ],
)
def test_every_product_says_what_it_takes_or_why_not(
    monkeypatch: pytest.MonkeyPatch, capability: doctor.Capability | None, available: set[str]
) -> None:
    monkeypatch.setattr(doctor, "HAS_TRITON", True)
    monkeypatch.setattr(hopper, "HAS_TRITON", True)
    monkeypatch.setattr(nvrtc, "find_library", lambda: object())
    found = named(doctor.products(capability))
    assert set(found) == set(doctor.IMPLEMENTATIONS)
    assert {name for name, verdict in found.items() if verdict.is_available} == available
    assert all(verdict.why for verdict in found.values())
    assert found["reference"].why == "takes E4M3 under two scalars, E4M3 by row, INT8 by row"
    if capability == (8, 0):
        assert found["cublas"].why.startswith("takes BF16, no E4M3: FP8 tensor cores: 8.9")
        assert found["triton"].why.startswith("takes INT8 by row, no E4M3")
        assert "8.9" in found["cublas-row"].why
    if capability == (12, 1):
        assert found["triton"].why == "takes E4M3 under two scalars, E4M3 by row, INT8 by row"


def test_without_triton_its_products_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HAS_TRITON", False)
    monkeypatch.setattr(hopper, "HAS_TRITON", False)
    found = named(doctor.products((9, 0)))
    assert not found["wgmma"].is_available
    assert "pip install triton" in found["triton"].why
    assert "pip install triton" in found["triton-tma"].why
    assert found["cublas"].is_available


def test_without_nvrtc_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "find_library", lambda: None)
    assert "pip install nvidia-cuda-nvrtc" in named(doctor.products((9, 0)))["wgmma"].why


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(nvrtc, "find_library", lambda: None)
    monkeypatch.setattr(doctor, "try_attention", lambda *_: None)
    attention = named(doctor.attention((9, 0)))
    assert "pip install nvidia-cuda-nvrtc" in attention["hopper"].why
    assert attention["fa3"].why == "the package fa3-fwd is missing"
    assert attention["cudnn"].why.endswith("auto takes it")


def test_without_triton_the_fused_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HAS_TRITON", False)
    monkeypatch.setattr(doctor, "try_product", lambda name, *_: doctor.Verdict(name, True, "tried"))
    assert "pip install triton" in named(doctor.arithmetic((9, 0)))["fused kernels"].why


def test_an_attention_that_is_wrong_or_fails_is_not_called_available(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = doctor.Target(CPU, torch.bfloat16, 128)
    with pytest.raises(RuntimeError, match="wrong"):
        doctor.try_attention(lambda q, k, v: 2 * v.flatten(2), target)

    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(doctor, "try_attention", fail)
    assert named(doctor.attention(None))["math"].why == "tried: no such kernel"


def test_a_gate_says_what_is_needed_what_is_here_and_what_runs_instead() -> None:
    verdict = doctor.gate("FP8", doctor.FP8, (8, 6))
    assert verdict.why == (
        "FP8 tensor cores: 8.9 (Ada, Hopper, Blackwell), here 8.6; policy int8-rot runs from 8.0"
    )


@pytest.mark.parametrize(
    ("cuda", "reason"), [(None, "built without CUDA"), ("13.0", "CUDA 13.0, but no device answers")]
)
def test_no_gpu_has_a_reason(cuda: str | None, reason: str) -> None:
    assert reason in doctor.no_gpu_reason(cuda)


def test_math_attention_always_runs(report: doctor.Report) -> None:
    assert named(report.attention)["math"].is_available


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
    assert f"triton {report.versions['triton']}" in text
    for fact in report.arithmetic + report.products + report.attention + report.packages:
        assert fact.name in text


@pytest.mark.gpu
def test_what_the_gates_let_through_works(report: doctor.Report) -> None:
    capability = torch.cuda.get_device_capability()
    found = named(report.arithmetic)
    for name, need in (
        ("BF16 on the GPU", doctor.BF16),
        ("FP8 on the GPU", doctor.FP8),
        ("FP8 by row on the GPU", doctor.FP8),
        ("INT8 on the GPU", doctor.INT8),
    ):
        assert found[name].is_available == need.is_met_by(capability), found[name]
    for verdict in report.attention:
        assert not verdict.why.startswith("tried:") or verdict.is_available, verdict
