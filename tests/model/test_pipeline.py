"""The whole way from prompt to latent against diffusers' pipeline, and what is refused."""

import gc
import logging
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from compare import relative_error, same_bits
from zimage_fp8.errors import UsageError
from zimage_fp8.model import loading
from zimage_fp8.model.calibration import run_calibration
from zimage_fp8.model.loading import Parts, load_pipeline
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.model.sampling import denoise, schedule
from zimage_fp8.model.source import NANO_FOLDER
from zimage_fp8.model.text import TextEncoder
from zimage_fp8.model.vae import Decoder
from zimage_fp8.model.weights import LoadedTransformer, load_transformer
from zimage_fp8.model.z_image import ZImageTransformer
from zimage_fp8.quant.calibrate import Calibration

SHORT = "a 3d icon of a red apple on a teal background"
LONG = (
    "a 3d icon of a brown teddy bear, a soft rounded toy with smooth shading and gentle light, "
    "shown alone in the middle, seen from the front, on a plain yellow background, nothing else"
)


@pytest.fixture(scope="module")
def nano() -> Pipeline:
    return load_pipeline("nano", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reference() -> object:
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(NANO_FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("prompt", "negative", "guidance", "width", "height"),
    [
        (SHORT, "", 0.0, 256, 256),
        (LONG, "", 0.0, 128, 192),
        (SHORT, LONG, 1.5, 128, 128),  # two buckets, so two forwards per step
    ],
)
def test_latents_equal_diffusers_from_prompt_to_end(
    nano: Pipeline,
    reference: object,
    prompt: str,
    negative: str,
    guidance: float,
    width: int,
    height: int,
) -> None:
    request = ImageRequest(prompt, width, height, negative, 8, guidance, seed=7)
    calls = []
    handle = nano.transformer.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        noise = nano.draw_latent(request)
        latent = denoise(nano.velocity(request), noise, schedule(8, nano.shift))
    handle.remove()
    expected = reference(  # type: ignore[operator]
        prompt=prompt,
        negative_prompt=negative or None,
        height=height,
        width=width,
        num_inference_steps=8,
        guidance_scale=guidance,
        generator=torch.Generator("cpu").manual_seed(7),
        output_type="latent",
    ).images
    assert len(calls) == (16 if guidance else 8)
    same_bits(torch.tensor(schedule(8, nano.shift)), reference.scheduler.sigmas)  # type: ignore[attr-defined]
    # Measured 2.8e-7, 3.0e-7 and, with guidance, 5.3e-7.
    assert relative_error(latent, expected) <= 1e-5


def test_both_buckets_are_really_tested(nano: Pipeline) -> None:
    assert len(nano.text.tokens(SHORT)) <= 32 < len(nano.text.tokens(LONG)) <= 64


def test_captions_equal_the_padded_encoder_of_diffusers(nano: Pipeline, reference: object) -> None:
    (expected,), _ = reference.encode_prompt([LONG], do_classifier_free_guidance=False)  # type: ignore[attr-defined]
    with torch.inference_mode():
        assert relative_error(nano.text.encode(LONG), expected) < 1e-6


def test_guidance_counts_twice(nano: Pipeline) -> None:
    guided = ImageRequest(SHORT, 32, 32, "blurry", steps=3, guidance=1.0)
    assert nano.generate(guided).nfe == 6
    assert nano.generate(ImageRequest(SHORT, 32, 32, steps=3)).nfe == 3


def test_one_seed_is_one_picture(nano: Pipeline) -> None:
    request = ImageRequest(SHORT, 64, 64, steps=2, seed=3)
    first, again = nano.generate(request), nano.generate(request)
    assert (first.pixels == again.pixels).all()
    assert first.pixels.shape == (64, 64, 3)
    assert first.nfe == 2
    assert set(first.timings_s) == {"encode", "denoise", "decode"}


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "  \n"}, "prompt", "empty"),
        ({"prompt": "word " * 600}, "prompt", "at most 512"),
        ({"width": 100}, "size", "nearest is 96x64"),
        ({"height": 0}, "size", "positive"),
        ({"width": 16 * 600}, "size", "at most"),
        ({"steps": 0}, "steps", "1 to 200"),
        ({"steps": -3}, "steps", "-3"),
        ({"guidance": -1.0}, "guidance", "0 \\(off\\)"),
        ({"guidance": float("nan")}, "guidance", "nan"),
        ({"seed": -1}, "seed", "-1"),
    ],
)
def test_bad_requests_name_the_field(
    nano: Pipeline, change: dict[str, object], param: str, said: str
) -> None:
    values = {"prompt": SHORT, "width": 64, "height": 64} | change
    with pytest.raises(UsageError, match=said) as raised:
        nano.generate(ImageRequest(**values))  # type: ignore[arg-type]
    assert raised.value.param == param


def test_the_embedded_model_is_complete_and_small() -> None:
    size = sum(path.stat().st_size for path in NANO_FOLDER.rglob("*") if path.is_file())
    assert size <= 40e6


def test_bf16_is_close_to_fp32_in_the_picture(nano: Pipeline) -> None:
    """The noise floor under every 8-bit comparison on nano."""
    request = ImageRequest(SHORT, 256, 256, seed=1)
    wide = nano.generate(request).pixels.astype(float)
    narrow = load_pipeline("nano", dtype="bfloat16", device="cpu").generate(request).pixels
    mse = ((wide - narrow) ** 2).mean()
    assert mse < 255**2 / 10 ** (40 / 10)  # 40 dB; measured 51, and 47 to 53 on seeds 1-4


def test_an_unknown_model_says_what_to_give(tmp_path: Path) -> None:
    from zimage_fp8.errors import ModelError

    with pytest.raises(ModelError, match="does not exist"):
        load_pipeline(str(tmp_path / "none"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ModelError, match="FluxPipeline"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ModelError, match="nobody/nothing"):
        load_pipeline("nobody/nothing")


def test_a_calibration_while_loading_leaves_nothing_behind(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text encoder and VAE go on; a second one would stay in memory beside them, since graphs
    hold the first. Its transformer is gone before the quantized one is read."""
    opened: list[str] = []
    observed: list[weakref.ref[ZImageTransformer]] = []

    def text(*where: Any) -> TextEncoder:
        opened.append("text encoder")
        return TextEncoder(*where)

    def decoder(*where: Any) -> Decoder:
        opened.append("VAE")
        return Decoder(*where)

    def calibrated(pipeline: Pipeline, *rest: Any) -> Calibration:
        observed.append(weakref.ref(pipeline.transformer))
        return run_calibration(pipeline, *rest)

    def load(*where: Any, **how: Any) -> LoadedTransformer:
        gc.collect()
        assert all(transformer() is None for transformer in observed)
        return load_transformer(*where, **how)

    monkeypatch.setattr(loading, "run_calibration", calibrated)
    monkeypatch.setattr(loading, "load_transformer", load)
    pipeline = load_pipeline(
        str(tiny_model), policy="full", device="cpu", parts=Parts(text, decoder)
    )
    assert len(observed) == 1
    assert sorted(opened) == ["VAE", "text encoder"]
    assert pipeline.generate(ImageRequest(SHORT, 64, 64, steps=1)).pixels.shape == (64, 64, 3)


def test_loading_says_what_each_model_took(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="zimage_fp8.model.loading"):
        load_pipeline(str(tiny_model), device="cpu")
    said = sorted(record.getMessage() for record in caplog.records)
    patterns = (r"VAE loaded in \d+\.\d s", r"text encoder loaded in .* s", "transformer loaded in")
    assert len(said) == len(patterns)
    for line, pattern in zip(said, patterns, strict=True):
        assert re.match(pattern, line)
