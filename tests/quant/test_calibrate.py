"""Calibration against hooks of another kind on another implementation: diffusers' pipeline."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zimage_fp8.errors import ZImageError
from zimage_fp8.layout import linear_shapes, read_config
from zimage_fp8.model.calibration import CalibrationSettings, read_prompts, run_calibration
from zimage_fp8.model.loading import load_pipeline
from zimage_fp8.numerics import E4M3_STATIC
from zimage_fp8.quant.calibrate import Calibration, read_calibration, write_calibration
from zimage_fp8.quant.policy import PRESETS, resolve

SETTINGS = CalibrationSettings(("a house", "three birds " * 4), 64, 48, forwards=4, seed=5)


@pytest.fixture(scope="module")
def calibration(tiny_model: Path) -> Calibration:
    pipeline = load_pipeline(str(tiny_model), dtype="float32", device="cpu")
    return run_calibration(pipeline, tiny_model, SETTINGS)


def diffusers_amax(folder: Path, sigmas: list[float]) -> dict[str, float]:
    """max |input| of every linear over the same prompts, measured on diffusers' own pipeline."""
    from diffusers import ZImagePipeline

    pipeline = ZImagePipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    found: dict[str, float] = {}

    def watch(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: object, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
            found[name] = max(found.get(name, 0.0), inputs[0].abs().max().item())

        return hook

    for name, module in pipeline.transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(watch(name))
    pipeline.scheduler.register_to_config(shift=1.0)  # the sigmas below are already shifted
    pipeline.scheduler.set_shift(1.0)
    for index, prompt in enumerate(SETTINGS.prompts):
        pipeline(
            prompt=prompt,
            width=SETTINGS.width,
            height=SETTINGS.height,
            sigmas=sigmas,
            guidance_scale=0.0,
            generator=torch.Generator("cpu").manual_seed(SETTINGS.seed + index),
            output_type="latent",
        )
    return found


def test_static_scales_are_amax_over_448_of_an_independent_measurement(
    tiny_model: Path, calibration: Calibration
) -> None:
    config, _ = read_config(tiny_model / "transformer")
    plan = resolve(PRESETS["full"], linear_shapes(config))
    theirs = diffusers_amax(tiny_model, list(calibration.sigmas[:-1]))
    assert set(calibration.amax) == set(plan.quantized)
    for layer in plan.quantized:
        scale = calibration.input_scale(layer, E4M3_STATIC).item()
        # fp32 noise between two implementations of the same sums: measured 6.4e-7 at most.
        assert scale == pytest.approx(theirs[layer] / 448, rel=2e-6), layer


def test_the_schedule_is_recorded_and_ends_with_a_forward_at_zero(
    calibration: Calibration,
) -> None:
    assert len(calibration.sigmas) == SETTINGS.forwards + 1
    assert calibration.sigmas[-2:] == (0.0, 0.0)
    assert len(calibration.amax["layers.0.attention.to_q"]) == SETTINGS.forwards
    # The caption is refined once per prompt, whatever the number of steps.
    assert len(calibration.amax["context_refiner.0.attention.to_q"]) == 1


def test_members_of_a_fused_group_share_their_amax(calibration: Calibration) -> None:
    amax = calibration.amax
    assert amax["layers.1.attention.to_q"] == amax["layers.1.attention.to_v"]
    assert amax["layers.1.feed_forward.w1"] == amax["layers.1.feed_forward.w3"]


def test_calibration_repeats_to_the_bit(tiny_model: Path, calibration: Calibration) -> None:
    pipeline = load_pipeline(str(tiny_model), dtype="float32", device="cpu")
    assert run_calibration(pipeline, tiny_model, SETTINGS).to_json() == calibration.to_json()


def test_progress_counts_every_forward(tiny_model: Path) -> None:
    pipeline = load_pipeline(str(tiny_model), device="cpu")
    seen: list[tuple[int, int]] = []
    run_calibration(pipeline, tiny_model, SETTINGS, lambda *step: seen.append(step))
    assert seen == [(i, 8) for i in range(1, 9)]


def test_a_calibration_survives_its_file(tmp_path: Path, calibration: Calibration) -> None:
    write_calibration(calibration, tmp_path / "c.json")
    again = read_calibration(tmp_path / "c.json")
    assert again == replace(calibration, amax=dict(calibration.amax))
    assert again.digest == calibration.digest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "schema"),
        ('{"schema": 1}', "schema 2"),
        ('{"schema": 2}', "lacks"),
    ],
)
def test_a_bad_calibration_file_says_so(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ZImageError, match=said):
        read_calibration(tmp_path / "c.json")
    with pytest.raises(ZImageError, match="does not exist"):
        read_calibration(tmp_path / "none.json")


def test_a_calibration_of_other_weights_is_refused(
    tiny_model: Path, tmp_path: Path, calibration: Calibration
) -> None:
    from tiny import save_tiny_model

    save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(ZImageError, match="another model"):
        load_pipeline(str(tmp_path / "other"), policy="full", calibration=calibration)
    load_pipeline(str(tiny_model), policy="full", calibration=calibration)


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  两只猫 \n", encoding="utf-8")
    assert read_prompts(path) == ("one", "两只猫")
    path.write_text("\n")
    with pytest.raises(ZImageError, match="holds no prompt"):
        read_prompts(path)


@pytest.mark.parametrize(("asked", "reaches"), [(1.0, 4.0), (2.0, 4.0), (8.0, 8.0)])
def test_balanced_channels_get_headroom(
    calibration: Calibration, asked: float, reaches: float
) -> None:
    layer = "layers.0.feed_forward.w2"
    (amax, channels) = max(calibration.amax[layer]), calibration.channel_amax[layer]
    plain = calibration.input_scale(layer, E4M3_STATIC, headroom=asked)
    assert plain.item() == pytest.approx(asked * amax / 448)
    none = {layer: torch.ones(len(channels))}
    folded = calibration.input_scale(layer, E4M3_STATIC, none, asked)
    assert folded.item() == pytest.approx(reaches * amax / 448)


def test_a_pipeline_can_be_calibrated_again(tiny_model: Path) -> None:
    """Refined captions are remembered by prompt; calibration has to see them refined."""
    pipeline = load_pipeline(str(tiny_model))
    first, second = (run_calibration(pipeline, tiny_model, SETTINGS) for _ in range(2))
    assert first.to_json() == second.to_json()
