"""A quantized checkpoint in diffusers' pipeline draws the picture that ours draws."""

from pathlib import Path

import pytest
import torch

from compare import sqnr_db
from zimage_fp8.errors import UsageError
from zimage_fp8.model.diffusers_bridge import load_diffusers_transformer
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.model.sampling import denoise, schedule
from zimage_fp8.quantize import CalibrationOptions, quantize


@pytest.mark.parametrize("policy", ["full", "fp8-row"])
def test_the_same_latent_from_both_pipelines(tiny_model: Path, tmp_path: Path, policy: str) -> None:
    from diffusers import ZImagePipeline

    options = CalibrationOptions(forwards=3, size=(64, 64), dtype="float32", device="cpu")
    needed = options if policy == "full" else None
    (folder,) = quantize(str(tiny_model), [policy], tmp_path / "out", calibration=needed)
    theirs = ZImagePipeline.from_pretrained(
        folder, transformer=load_diffusers_transformer(folder, torch.float32), dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompt="a house",
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=0.0,
        generator=torch.Generator("cpu").manual_seed(1),
        output_type="latent",
    ).images
    ours = load_pipeline(str(folder), dtype="float32", device="cpu")
    request = ImageRequest("a house", 64, 64, steps=2, seed=1)
    with torch.inference_mode():
        latent = denoise(ours.velocity(request), ours.draw_latent(request), schedule(2, ours.shift))
    # Not to the bit: fp32 noise of 2e-7 moves a few inputs across a code's border.
    assert sqnr_db(latent, expected) > 40


def test_an_unquantized_folder_needs_no_bridge(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="not quantized"):
        load_diffusers_transformer(tiny_model)
