"""Pictures that start from another picture: schedules, strength, masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageImg2ImgPipeline

from zimage_fp8.errors import UsageError
from zimage_fp8.model.inpainting import blend
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.model.sampling import add_noise, draw_latent, last_part, schedule

WIDTH, HEIGHT = 64, 48


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Pipeline:
    return load_pipeline(str(tiny_model), device="cpu", dtype="float32")


def gradient() -> np.ndarray:
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([rows * 5, columns * 4, 255 - rows * 2], axis=-1).astype(np.uint8)


def request(**changes: object) -> ImageRequest:
    first = ImageRequest("an apple", WIDTH, HEIGHT, seed=3, source=gradient(), strength=0.6)
    return replace(first, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "strength"),
    [(8, 0.6), (8, 1.0), (8, 0.01), (10, 0.3), (10, 0.7), (1, 0.5), (4, 0.25), (7, 0.999)],
)
def test_the_last_part_is_diffusers(tiny_model: Path, steps: int, strength: float) -> None:
    theirs = ZImageImg2ImgPipeline.from_pretrained(tiny_model)
    theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.scheduler.set_timesteps(sigmas=list(schedule(steps, 1.0)[:-1]))
    timesteps, run = theirs.get_timesteps(steps, strength, "cpu")
    ours = last_part(schedule(steps, 3.0), strength)
    asked = ImageRequest("x", 16, 16, steps=steps, strength=strength)
    assert len(ours) - 1 == run == asked.steps_to_run
    assert [sigma * 1000 for sigma in ours[:-1]] == pytest.approx(timesteps.tolist(), rel=1e-6)


def test_however_little_is_asked_for_one_step_is_walked() -> None:
    assert last_part(schedule(8, 3.0), 1e-300) == schedule(8, 3.0)[-2:]
    assert ImageRequest("x", 16, 16, steps=8, strength=1e-300).steps_to_run == 1


def test_noise_is_added_as_diffusers_adds_it() -> None:
    latent, noise = draw_latent(1, 16, 32, 32), draw_latent(2, 16, 32, 32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    theirs = scheduler.scale_noise(latent, scheduler.timesteps[3:4], noise)
    ours = add_noise(latent, noise, float(scheduler.sigmas[3]))
    assert torch.equal(ours, theirs)


def test_full_strength_is_a_picture_without_source(pipeline: Pipeline) -> None:
    free = pipeline.generate(ImageRequest("an apple", WIDTH, HEIGHT, seed=3))
    whole = pipeline.generate(request(strength=1.0))
    assert np.array_equal(free.pixels, whole.pixels)
    assert whole.nfe == 8


def test_the_encoder_is_diffusers_mean(pipeline: Pipeline, tiny_model: Path) -> None:
    vae = ZImageImg2ImgPipeline.from_pretrained(tiny_model).vae.float()
    picture = torch.from_numpy(gradient()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        expected = vae.encode(picture).latent_dist.mean
        expected = (expected - vae.config.shift_factor) * vae.config.scaling_factor
        found = pipeline.decoder.encode(gradient())
    assert found.shape == (1, 16, HEIGHT // 8, WIDTH // 8)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_less_strength_keeps_more(pipeline: Pipeline) -> None:
    with torch.inference_mode():
        kept = pipeline.decoder.decode(pipeline.decoder.encode(gradient()))
    distances = []
    for strength in (0.1, 0.4, 0.7, 1.0):
        image = pipeline.generate(request(strength=strength))
        assert image.nfe == len(image.sigmas) - 1 == image.request.steps_to_run
        distances.append(np.abs(image.pixels.astype(float) - kept).mean())
    assert distances == sorted(distances)
    assert len(set(distances)) == 4


def test_outside_the_mask_every_pixel_stays(pipeline: Pipeline) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[16:40, 20:50] = True
    image = pipeline.generate(request(mask=mask, strength=1.0))
    assert np.array_equal(image.pixels[~mask], gradient()[~mask])
    changed = (image.pixels != gradient()).any(axis=-1)
    assert changed[20:36, 24:46].mean() > 0.9


def test_a_full_mask_is_no_mask(pipeline: Pipeline) -> None:
    mask = np.ones((HEIGHT, WIDTH), bool)
    masked = pipeline.generate(request(mask=mask))
    assert np.array_equal(masked.pixels, pipeline.generate(request()).pixels)


def test_a_blend_fades_inside_the_mask_only() -> None:
    source, drawn = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 200, np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[:, 16:] = True
    row = blend(source, drawn, mask)[16, :, 0]
    assert not row[:16].any()
    assert 0 < row[16] < row[18] < 200
    assert (row[20:] == 200).all()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"strength": 0.0}, "strength"),
        ({"strength": 1.01}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"source": None}, "strength"),
        ({"source": None, "strength": 1.0, "mask": np.ones((HEIGHT, WIDTH), bool)}, "mask"),
        ({"width": 80}, "image"),
        ({"mask": np.ones((HEIGHT, 32), bool)}, "mask"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    pipeline: Pipeline, change: dict[str, object], param: str
) -> None:
    with pytest.raises(UsageError) as refused:
        pipeline.validate(request(**change))
    assert refused.value.param == param
