"""The test bed: outliers are in the inputs, and the model computes what it did."""

from pathlib import Path

import pytest
import torch

from compare import same_bits
from zimage_fp8.errors import UsageError
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.model.sampling import denoise, schedule
from zimage_fp8.outliers import plant_outliers, power_of_two
from zimage_fp8.quant.calibrate import observe
from zimage_fp8.quant.fold import FEEDS

REQUEST = ImageRequest("a red apple", 64, 64, steps=2)


def latent_and_maxima(folder: Path) -> tuple[torch.Tensor, dict[str, float]]:
    pipeline: Pipeline = load_pipeline(str(folder))
    modules = [
        name
        for name, _ in pipeline.transformer.named_modules()
        if name.endswith(tuple(FEEDS.values()))
    ]
    with observe(pipeline.transformer, modules) as observer, torch.inference_mode():
        sigmas = schedule(REQUEST.steps, pipeline.shift)
        latent = denoise(pipeline.velocity(REQUEST), pipeline.draw_latent(REQUEST), sigmas)
    return latent, {name: max(values) for name, values in observer.result().items()}


@pytest.mark.parametrize("ratio", [30, 1e5])
def test_outliers_change_inputs_and_nothing_else(
    tiny_model: Path, tmp_path: Path, ratio: float
) -> None:
    planted = plant_outliers(tiny_model, tmp_path / "model", ratio)
    latent, maxima = latent_and_maxima(tmp_path / "model")
    expected, before = latent_and_maxima(tiny_model)
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
    same_bits(latent_and_maxima(tmp_path / "model")[0], latent_and_maxima(tiny_model)[0])


@pytest.mark.parametrize(("asked", "planted"), [(1, 1), (30, 32), (1e3, 1024), (1e5, 131072)])
def test_ratios_are_powers_of_two(asked: float, planted: float) -> None:
    assert power_of_two(asked) == planted


@pytest.mark.parametrize("ratio", [0, 0.5, -3, 1e9, float("nan")])
def test_an_absurd_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(UsageError, match="expected 1"):
        power_of_two(ratio)
