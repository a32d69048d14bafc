"""The test bed: outliers are in the inputs, and the model computes what it did."""

from pathlib import Path

import pytest
import torch

from compare import same_bits
from zimage_fp8.errors import UsageError
from zimage_fp8.evaluate import difference, draw, exchanged, load_subject
from zimage_fp8.layout import read_config
from zimage_fp8.model.calibration import CalibrationSettings, run_calibration
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import ImageRequest, Pipeline
from zimage_fp8.outliers import (
    CHANNELS,
    channel_factors,
    loud_tokens,
    multiplied,
    plant_outliers,
    power_of_two,
)
from zimage_fp8.quant.calibrate import observe
from zimage_fp8.quant.fold import FEEDS
from zimage_fp8.quant.policy import find_policy

REQUEST = ImageRequest("a red apple", 64, 64, steps=2)


def latent_and_maxima(pipeline: Pipeline) -> tuple[torch.Tensor, dict[str, float]]:
    """Of one picture; maxima of inputs by module."""
    modules = modules_of(pipeline)
    with observe(pipeline.transformer, modules) as observer:
        latent = draw(pipeline, REQUEST).latent
    return latent, {name: max(values) for name, values in observer.channels().items()}


def modules_of(pipeline: Pipeline) -> list[str]:
    names = [name for name, _ in pipeline.transformer.named_modules()]
    return [name for name in names if name.endswith(tuple(FEEDS.values()))]


@pytest.mark.parametrize("ratio", [30, 1e5])
def test_outliers_change_inputs_and_nothing_else(
    tiny_model: Path, tmp_path: Path, ratio: float
) -> None:
    planted = plant_outliers(tiny_model, tmp_path / "model", ratio)
    latent, maxima = latent_and_maxima(load_pipeline(str(tmp_path / "model")))
    expected, before = latent_and_maxima(load_pipeline(str(tiny_model)))
    same_bits(latent, expected)
    # A channel's own largest input is at least a hundredth of its layer's, here.
    grown = {name: maxima[name] / before[name] for name in before}
    assert min(grown.values()) > planted / 100, min(grown.items(), key=lambda item: item[1])
    assert max(grown.values()) <= planted


def test_ratio_one_is_a_copy(tiny_model: Path, tmp_path: Path) -> None:
    assert plant_outliers(tiny_model, tmp_path / "model", 1) == 1
    for path in (tiny_model / "transformer").iterdir():
        if path.suffix == ".json":
            assert (tmp_path / "model" / "transformer" / path.name).exists()
    same_bits(
        latent_and_maxima(load_pipeline(str(tmp_path / "model")))[0],
        latent_and_maxima(load_pipeline(str(tiny_model)))[0],
    )


@pytest.mark.parametrize(("asked", "planted"), [(1, 1), (30, 32), (1e3, 1024), (1e5, 131072)])
def test_ratios_are_powers_of_two(asked: float, planted: float) -> None:
    assert power_of_two(asked) == planted


@pytest.mark.parametrize("ratio", [0, 0.5, -3, 1e9, float("nan")])
def test_an_absurd_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="expected 1"):
        power_of_two(ratio)


@pytest.mark.parametrize("ratio", [30, 1e5])
def test_loud_tokens_change_inputs_and_nothing_else(tiny_model: Path, ratio: float) -> None:
    pipeline = load_pipeline(str(tiny_model), dtype="float32")
    expected, before = latent_and_maxima(pipeline)
    with loud_tokens(pipeline.transformer, modules_of(pipeline), ratio) as planted:
        latent, maxima = latent_and_maxima(pipeline)
    same_bits(latent, expected)
    # A token's own largest input is at least a hundredth of its layer's, here.
    grown = {name: maxima[name] / before[name] for name in before}
    assert min(grown.values()) > planted / 100, min(grown.items(), key=lambda item: item[1])
    assert max(grown.values()) <= planted
    assert latent_and_maxima(pipeline)[1] == before


def test_loud_tokens_reach_the_layer_that_takes_a_place(tiny_model: Path) -> None:
    """One scale for all tokens: at 2^20 the quiet ones are flushed to zero."""
    subject = load_subject(str(tiny_model), tiny_model, find_policy("full"), [REQUEST])
    transformer, errors = subject.pipeline.transformer, []
    reference = draw(subject.pipeline, REQUEST)
    for ratio in (1, 2**20):
        with exchanged(transformer, subject.quantized):
            with loud_tokens(transformer, list(subject.quantized), ratio):
                errors.append(difference(draw(subject.pipeline, REQUEST), reference).latent_error)
    assert errors[1] > 2 * errors[0]


def test_calibration_of_louder_channels_is_what_calibrating_them_finds(
    tiny_model: Path, tmp_path: Path
) -> None:
    settings = CalibrationSettings(("a red apple",), 64, 64, forwards=2)
    plant_outliers(tiny_model, tmp_path / "model", 1e3)
    measured, quiet = (
        run_calibration(load_pipeline(str(folder), dtype="float32"), folder, settings)
        for folder in (tmp_path / "model", tiny_model)
    )
    config, _ = read_config(tiny_model / "transformer")
    known = multiplied(quiet, channel_factors(config, 1024, CHANNELS, 0))
    assert known.channel_amax == measured.channel_amax
    assert {n: max(v) for n, v in known.amax.items()} == {
        n: max(v) for n, v in measured.amax.items()
    }
