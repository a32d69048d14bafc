"""What is said of a layer is what its quantized twin does on its inputs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from compare import sqnr_db
from zimage_fp8.cli import app
from zimage_fp8.diagnose import (
    DIAGNOSTICS_FILE,
    Diagnosis,
    LayerDiagnosis,
    _Watched,
    diagnose,
    diagnosis_text,
)
from zimage_fp8.evaluate import Workload, draw, load_requests, load_subject
from zimage_fp8.numerics import E4M3_STATIC, amax, scale_of
from zimage_fp8.outliers import plant_outliers
from zimage_fp8.quant.linear import QuantLinear, quantize_weight
from zimage_fp8.quant.policy import find_policy
from zimage_fp8.quantize import quantize

WORKLOAD = Workload(limit=1, size=(64, 64), steps=2)


def watch(inputs: torch.Tensor, scale_amax: float) -> tuple[LayerDiagnosis, nn.Linear, QuantLinear]:
    """A layer that saw `inputs` under a static scale made for `scale_amax`."""
    torch.manual_seed(0)
    original = nn.Linear(inputs.shape[-1], 16, bias=False)
    weight_scale = scale_of(amax(original.weight.detach()), "e4m3")
    twin = QuantLinear(
        E4M3_STATIC,
        quantize_weight(original.weight.detach(), weight_scale, E4M3_STATIC),
        weight_scale,
        scale_of(torch.tensor(scale_amax), "e4m3"),
    )
    watched = _Watched(original, twin)
    with torch.inference_mode():
        watched(inputs)
    return watched.result("layers.0.feed_forward.w2"), original, twin


def test_shares_are_counted() -> None:
    inputs = torch.ones(4, 16)
    inputs[0, :8] = 1e-6  # 448 / 448 · 2^-10 is the smallest code above zero
    inputs[1, :2] = 0.0  # no loss: it was zero before
    inputs[2, :4] = 500.0
    found, *_ = watch(inputs, scale_amax=448.0)
    assert found.flushed == 8 / 64
    assert found.saturated == 4 / 64
    assert found.amax == 500
    assert found.max_to_median == 500


def test_errors_are_those_of_the_layer() -> None:
    torch.manual_seed(1)
    inputs = torch.randn(64, 32)
    found, original, twin = watch(inputs, scale_amax=inputs.abs().max().item())
    with torch.inference_mode():
        expected, actual = original(inputs), twin(inputs)
    assert found.sqnr_db == pytest.approx(sqnr_db(actual, expected), abs=1e-6)
    channel = found.worst_channel
    worst = -sqnr_db(actual[:, channel], expected[:, channel]) / 20
    assert found.worst_channel_error == pytest.approx(10**worst)
    assert found.saturated == 0


def test_watching_changes_no_picture_and_sees_every_step(tiny_model: Path) -> None:
    requests = load_requests(tiny_model, WORKLOAD)
    subject = load_subject(str(tiny_model), tiny_model, find_policy("full"), requests)
    before = draw(subject.pipeline, requests[0]).latent
    found = diagnose(subject)
    assert torch.equal(draw(subject.pipeline, requests[0]).latent, before)
    assert [layer.layer for layer in found.layers] == list(subject.quantized)
    steps = {layer.layer.partition(".")[0]: len(layer.amax_by_step) for layer in found.layers}
    assert steps == {"noise_refiner": 2, "context_refiner": 1, "layers": 2}
    assert not found.collapsing


def test_planted_outliers_are_found(tiny_model: Path, tmp_path: Path) -> None:
    """1e5 in every input: one static scale per tensor collapses, and the advice says so."""
    folder = tmp_path / "planted"
    plant_outliers(tiny_model, folder, 1e5)
    requests = load_requests(folder, WORKLOAD)
    subject = load_subject(str(folder), folder, find_policy("full"), requests)
    found = diagnose(subject)
    assert len(found.collapsing) > len(found.layers) / 2
    assert max(layer.flushed for layer in found.layers) > 0.5
    assert "fp8-row or int8-rot" in diagnosis_text(found)


def test_dynamic_scales_do_not_collapse() -> None:
    wide, *_ = watch(torch.ones(2, 16), 1.0)
    wide = replace(wide, max_to_median=1e6)
    assert Diagnosis({}, (wide,)).collapsing
    assert not Diagnosis({}, (replace(wide, format="e4m3-row"),)).collapsing


@pytest.mark.parametrize("policy", ["fp8-row", "int8-rot"])
def test_quantize_and_verify_show_it(tiny_model: Path, tmp_path: Path, policy: str) -> None:
    """int8-rot folds channel scales: its layers are watched on inputs that are folded, too."""
    folder = tmp_path / "checkpoint"
    runner = CliRunner()
    arguments = ["quantize", str(tiny_model), "--policy", policy, "--out", str(folder)]
    done = runner.invoke(app, [*arguments, "--diagnose"], catch_exceptions=False)
    assert "SQNR" in done.stdout
    written = json.loads((folder / DIAGNOSTICS_FILE).read_text())
    least = {"fp8-row": 26, "int8-rot": 37}[policy]  # measured 28.3 and 39.9 at 256x256
    assert all(least < layer["sqnr_db"] < math.inf for layer in written["layers"])
    assert (folder / DIAGNOSTICS_FILE).with_suffix(".svg").is_file()

    arguments = ["verify", str(folder), "--against", str(tiny_model), "--diagnose", "--json"]
    shown = json.loads(runner.invoke(app, arguments, catch_exceptions=False).stdout)
    assert shown["findings"] == []
    assert shown["layers"] == written["layers"]


def test_diagnosing_needs_the_original(tiny_model: Path, tmp_path: Path) -> None:
    quantize(str(tiny_model), ["fp8-row"], tmp_path / "checkpoint")
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "checkpoint"), "--diagnose"])
    assert "--against" in str(done.exception)
