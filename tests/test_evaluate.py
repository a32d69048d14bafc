"""Paired pictures: the numbers, and exchanging modules without a trace."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from compare import same_bits
from zimage_fp8.errors import UsageError
from zimage_fp8.evaluate import (
    Difference,
    Drawn,
    Workload,
    difference,
    draw,
    exchanged,
    load_requests,
    load_subject,
    summarize,
)
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.quant.policy import find_policy


def picture(level: int, latent: float) -> Drawn:
    return Drawn(torch.full((1, 16, 2, 2), latent), np.full((16, 16, 3), level, np.uint8))


def test_difference_in_closed_form() -> None:
    found = difference(picture(110, 1.1), picture(100, 1.0))
    assert found.mse == 100
    assert found.psnr_db == pytest.approx(10 * math.log10(255**2 / 100))
    assert found.latent_error == pytest.approx(0.1, rel=1e-5)


def test_equal_pictures_differ_by_nothing() -> None:
    found = difference(picture(7, 1.0), picture(7, 1.0))
    assert (found.mse, found.psnr_db, found.latent_error) == (0, math.inf, 0)


def test_levels_do_not_wrap_around() -> None:
    assert difference(picture(0, 1.0), picture(255, 1.0)).psnr_db == 0


def test_summary_pools_errors_and_averages_decibels() -> None:
    found = summarize([Difference(1.0, 0.1), Difference(99.0, 0.3)])
    assert found.pooled == pytest.approx(10 * math.log10(255**2 / 50))
    assert found.mean == pytest.approx((10 * math.log10(255**2) * 2 - 10 * math.log10(99)) / 2)
    assert found.latent_error == pytest.approx(0.2)
    assert found.ci95 > 0


def test_one_picture_has_no_interval() -> None:
    assert math.isnan(summarize([Difference(1.0, 0.1)]).ci95)


def test_draw_is_what_generate_draws(tiny_model: Path) -> None:
    pipeline = load_pipeline(str(tiny_model))
    request = ImageRequest("a red apple", 64, 64, steps=2)
    assert np.array_equal(draw(pipeline, request).pixels, pipeline.generate(request).pixels)


@pytest.mark.parametrize("policy", ["full", "fp8-row", "int8-rot"])
def test_exchanged_modules_compute_what_the_policy_does_and_leave_no_trace(
    tiny_model: Path, policy: str
) -> None:
    """int8-rot folds channel scales, so each of its layers is fitted to a model without."""
    requests = [ImageRequest("a red apple", 64, 64, steps=2)]
    subject = load_subject(str(tiny_model), tiny_model, find_policy(policy), requests)
    before = draw(subject.pipeline, requests[0])
    with exchanged(subject.pipeline.transformer, subject.quantized):
        quantized = draw(subject.pipeline, requests[0])
    same_bits(draw(subject.pipeline, requests[0]).latent, before.latent)
    calibration = subject.calibration
    loaded = load_pipeline(str(tiny_model), policy=policy, dtype="float32", calibration=calibration)
    same_bits(quantized.latent, draw(loaded, requests[0]).latent)
    assert difference(quantized, before).latent_error > 0


def test_a_context_refiner_that_is_exchanged_refines_anew(tiny_model: Path) -> None:
    """Refined captions are kept by prompt; another refiner must not meet them."""
    requests = [ImageRequest("a red apple", 64, 64, steps=2)]
    subject = load_subject(str(tiny_model), tiny_model, find_policy("fp8-row"), requests)
    before = draw(subject.pipeline, requests[0])
    refiner = {n: m for n, m in subject.quantized.items() if n.startswith("context_refiner.")}
    with exchanged(subject.pipeline.transformer, refiner):
        assert difference(draw(subject.pipeline, requests[0]), before).latent_error > 0


def test_a_policy_that_quantizes_nothing_is_refused(tiny_model: Path) -> None:
    requests = [ImageRequest("a red apple", 64, 64, steps=2)]
    with pytest.raises(UsageError, match="quantizes nothing"):
        load_subject(str(tiny_model), tiny_model, find_policy("bf16_base"), requests)


def test_requests_take_prompts_limit_and_seeds_that_calibration_does_not_use(
    tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\n\nc\n")
    requests = load_requests(tiny_model, Workload(file, 2, (64, 32), 3))
    assert [r.prompt for r in requests] == ["a", "b"]
    assert [(r.width, r.height, r.steps) for r in requests] == [(64, 32, 3)] * 2
    assert min(r.seed for r in requests) > 1000
    with pytest.raises(UsageError, match="at least 1"):
        load_requests(tiny_model, Workload(file, 0))
