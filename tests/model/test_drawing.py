"""Drawings that share forwards, each at its own step, against the same drawings alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compare import sqnr_db
from zimage_fp8.engine.loading import EngineOptions
from zimage_fp8.engine.loading import load_pipeline as load_with_engine
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.pipeline import Pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.model.z_image import TOKEN_MULTIPLE

REQUEST = ImageRequest("a red apple", 64, 48, steps=4, seed=1)
SHORT, LONG = "a fox", "a fox " * TOKEN_MULTIPLE


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Pipeline:
    return load_pipeline(str(tiny_model), dtype="float32", device="cpu")


@pytest.fixture
def pipeline(loaded: Pipeline) -> Iterator[Pipeline]:
    denoiser = loaded.denoiser
    yield loaded
    loaded.denoiser = denoiser


class Watched:
    """A denoiser that keeps the batch of every forward, and fails once when told to."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.inner = pipeline.denoiser
        self.batches: list[int] = []
        self.failure: Exception | None = None

    def forward(self, latent: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        assert len(latent) == len(t) == len(caption)
        self.batches.append(len(latent))
        if self.failure and len(latent) > 1:
            raise self.failure
        return self.inner.forward(latent, t, caption)

    def refine_caption(self, caption: Tensor, is_pad: Tensor) -> Tensor:
        return self.inner.refine_caption(caption, is_pad)

    def describe(self) -> dict[str, object]:
        return self.inner.describe()

    def release(self) -> None:
        self.inner.release()


@pytest.fixture
def denoiser(pipeline: Pipeline) -> Watched:
    pipeline.denoiser = watched = Watched(pipeline)
    return watched


def latent_of(pipeline: Pipeline, request: ImageRequest) -> Tensor:
    drawing = pipeline.begin(request)
    while not drawing.is_done:
        pipeline.step([drawing])
    return drawing.latent


def masked(request: ImageRequest) -> ImageRequest:
    shape = (request.height, request.width)
    mask = np.zeros(shape, bool)
    mask[:, 32:] = True
    return replace(request, source=np.full((*shape, 3), 90, np.uint8), mask=mask, strength=0.5)


@pytest.mark.parametrize(
    "others",
    [
        [replace(REQUEST, seed=2)],
        [replace(REQUEST, prompt=SHORT, steps=7), replace(REQUEST, seed=3)],
        [replace(REQUEST, guidance=2.0, negative_prompt=LONG)],
        [masked(REQUEST)],
    ],
    ids=["seeds", "prompts and steps", "guidance", "mask"],
)
def test_company_changes_no_picture(
    pipeline: Pipeline, denoiser: Watched, others: list[ImageRequest]
) -> None:
    """The newcomers join after a step of the first, and leave when they are done."""
    requests = [REQUEST, *others]
    alone = [latent_of(pipeline, request) for request in requests]
    denoiser.batches.clear()
    drawings = [pipeline.begin(REQUEST)]
    pipeline.step(drawings)
    drawings += map(pipeline.begin, others)
    while left := [drawing for drawing in drawings if not drawing.is_done]:
        pipeline.step(left)
    for drawing, expected in zip(drawings, alone, strict=True):
        assert drawing.company == len(requests)
        # fp32 sums in the order of another shape: 130 dB measured at the least
        assert sqnr_db(drawing.latent, expected) > 110
    assert sum(denoiser.batches) == sum(drawing.nfe for drawing in drawings)
    assert max(denoiser.batches) == len(requests)


def test_the_two_captions_of_one_picture_do_not_share_a_forward(
    pipeline: Pipeline, denoiser: Watched
) -> None:
    image = pipeline.generate(replace(REQUEST, guidance=1.0, negative_prompt=SHORT))
    assert denoiser.batches == [1] * 8
    assert (image.nfe, image.company) == (8, 1)


def test_captions_of_different_buckets_do_not_share_a_forward(
    pipeline: Pipeline, denoiser: Watched
) -> None:
    requests = [replace(REQUEST, prompt=SHORT), replace(REQUEST, prompt=LONG)]
    assert len({pipeline.shape(request) for request in requests}) == 2
    pipeline.step([pipeline.begin(request) for request in requests])
    assert denoiser.batches == [1, 1]


def test_a_shape_is_size_and_captions(pipeline: Pipeline) -> None:
    shape = pipeline.shape(REQUEST)
    assert pipeline.shape(replace(REQUEST, prompt="a green pear", seed=9, steps=2)) == shape
    assert pipeline.shape(replace(REQUEST, negative_prompt=LONG)) == shape  # it is not read
    for other in (
        {"width": 48, "height": 64},
        {"prompt": LONG},
        {"guidance": 1.0},
        {"guidance": 1.0, "negative_prompt": LONG},
    ):
        assert pipeline.shape(replace(REQUEST, **other)) != shape


def test_after_a_failed_step_no_drawing_has_moved(pipeline: Pipeline, denoiser: Watched) -> None:
    requests = [REQUEST, replace(REQUEST, seed=2)]
    expected = [latent_of(pipeline, request) for request in requests]
    drawings = list(map(pipeline.begin, requests))
    denoiser.failure = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        pipeline.step(drawings)
    assert [drawing.done for drawing in drawings] == [0, 0]
    for drawing, latent in zip(drawings, expected, strict=True):
        while not drawing.is_done:
            pipeline.step([drawing])
        assert torch.equal(drawing.latent, latent)


def test_the_guess_ends_at_the_latent(pipeline: Pipeline) -> None:
    drawing = pipeline.begin(REQUEST)
    assert drawing.guess is drawing.latent  # before the first step there is no other
    pipeline.step([drawing])
    start = pipeline.draw_latent(REQUEST)
    assert drawing.velocity is not None
    torch.testing.assert_close(drawing.guess, start - drawing.sigmas[0] * drawing.velocity)
    while not drawing.is_done:
        pipeline.step([drawing])
    assert torch.equal(drawing.guess, drawing.latent)


def test_previews_and_pictures_are_decoded_in_the_same_mode(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffers of a captured graph are inference tensors: written to in no other mode."""
    modes: list[bool] = []
    decode = pipeline.decoder.decode

    def watched(latent: Tensor) -> np.ndarray:
        modes.append(torch.is_inference_mode_enabled() and latent.is_inference())
        return decode(latent)

    monkeypatch.setattr(pipeline.decoder, "decode", watched)
    drawing = pipeline.begin(replace(REQUEST, steps=1))
    pipeline.step([drawing])
    assert np.array_equal(pipeline.preview(drawing), pipeline.finish(drawing).pixels)
    assert modes == [True, True]


def test_the_fused_engine_takes_every_picture_at_its_own_step(tiny_model: Path) -> None:
    options = EngineOptions(engine="fused")
    pipeline = load_with_engine(
        str(tiny_model), options=options, dtype="float32", device="cpu", policy="online_fp8"
    )
    requests = [REQUEST, replace(REQUEST, seed=2, steps=7)]
    alone = [latent_of(pipeline, request) for request in requests]
    drawings = list(map(pipeline.begin, requests))
    while left := [drawing for drawing in drawings if not drawing.is_done]:
        pipeline.step(left)
    for drawing, expected in zip(drawings, alone, strict=True):
        assert sqnr_db(drawing.latent, expected) > 110


def test_tokens_are_counted_once(pipeline: Pipeline) -> None:
    before = pipeline.text.tokens.cache_info()
    for _ in range(3):
        pipeline.validate(replace(REQUEST, prompt="an unseen prompt"))
    after = pipeline.text.tokens.cache_info()
    assert after.misses - before.misses <= 2  # the prompt, and the empty negative one
