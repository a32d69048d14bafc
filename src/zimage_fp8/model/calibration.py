"""Calibration on a pipeline: run the real denoise loop over some prompts and watch the inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from zimage_fp8.checkpoint.shards import ShardReader
from zimage_fp8.errors import UsageError, ZImageError
from zimage_fp8.layout import fused_name, linear_shapes
from zimage_fp8.model.pipeline import MAX_STEPS, ImageRequest, Pipeline
from zimage_fp8.model.sampling import calibration_schedule, denoise
from zimage_fp8.provenance import versions
from zimage_fp8.quant.calibrate import Calibration, check_amax, observe
from zimage_fp8.quant.policy import PRESETS, resolve

FORWARDS = 9  # the eight sigmas that are served, and one forward at sigma 0
PROMPTS_FILE = "calibration-prompts.txt"
DEFAULT_PROMPTS = Path(__file__).resolve().parent / PROMPTS_FILE

OnForward = Callable[[int, int], None]  # (forwards done, forwards in all)


@dataclass(frozen=True)
class CalibrationSettings:
    prompts: tuple[str, ...]
    width: int
    height: int
    forwards: int = FORWARDS
    seed: int = 0

    @classmethod
    def default(cls, folder: Path, size: tuple[int, int]) -> "CalibrationSettings":
        """The model's own prompts where its folder brings some, else the eight shipped ones."""
        own = folder / PROMPTS_FILE
        prompts = read_prompts(own if own.is_file() else DEFAULT_PROMPTS)
        return cls(prompts, *size)


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line; blank lines are skipped. Raises ZImageError when there are none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ZImageError(f"prompt file {path} cannot be read: {error}") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ZImageError(f"prompt file {path} holds no prompt; write one per line")
    return prompts


def check_forwards(forwards: int) -> None:
    if not 2 <= forwards <= MAX_STEPS:
        raise UsageError(
            f"steps is {forwards}, calibration takes 2 to {MAX_STEPS} (the last is at sigma 0)",
            param="steps",
        )


def run_calibration(
    pipeline: Pipeline,
    folder: Path,
    settings: CalibrationSettings,
    on_forward: OnForward | None = None,
) -> Calibration:
    """Observe max |input| of every quantizable linear while each prompt is denoised.

    Prompt i starts from the latent of seed `settings.seed + i`. Guidance is off, as served.
    `folder` is the pipeline's own, for the fingerprint. Raises UsageError for settings that cannot
    be drawn.
    """
    pipeline.captions.clear()  # a caption that is remembered would not be refined under our eyes
    with observe(pipeline.transformer, _observed(pipeline)) as observer:

        def follow(done: int, total: int) -> None:
            observer.step = done % settings.forwards
            if on_forward is not None:
                on_forward(done, total)

        run_prompts(pipeline, settings, follow)
    amax, channel_amax = observer.result(), observer.channels()
    check_amax(amax)
    with ShardReader(folder / "transformer") as reader:
        fingerprint = reader.fingerprint()
    return Calibration(
        model=pipeline.model,
        fingerprint=fingerprint,
        prompts=settings.prompts,
        seed=settings.seed,
        width=settings.width,
        height=settings.height,
        sigmas=calibration_schedule(settings.forwards, pipeline.shift),
        guidance=0.0,
        dtype=str(pipeline.dtype).removeprefix("torch."),
        versions=versions(),
        amax=amax,
        channel_amax=channel_amax,
    )


@torch.inference_mode()
def run_prompts(
    pipeline: Pipeline, settings: CalibrationSettings, on_forward: OnForward | None = None
) -> None:
    """Denoise every prompt, for those who watch the transformer. Raises UsageError for settings
    that cannot be drawn."""
    check_forwards(settings.forwards)
    sigmas = calibration_schedule(settings.forwards, pipeline.shift)
    requests = [
        ImageRequest(prompt, settings.width, settings.height, seed=settings.seed + index)
        for index, prompt in enumerate(settings.prompts)
    ]
    for request in requests:
        pipeline.validate(request)
    for index, request in enumerate(requests):

        def on_step(done: int, _total: int, before: int = index * settings.forwards) -> None:
            if on_forward is not None:
                on_forward(before + done, len(requests) * settings.forwards)

        denoise(pipeline.velocity(request), pipeline.draw_latent(request), sigmas, on_step)


def settings_of(calibration: Calibration) -> CalibrationSettings:
    """What repeats the run that a calibration was measured in."""
    return CalibrationSettings(
        prompts=calibration.prompts,
        width=calibration.width,
        height=calibration.height,
        forwards=len(calibration.sigmas) - 1,
        seed=calibration.seed,
    )


def _observed(pipeline: Pipeline) -> list[str]:
    """The modules that some policy quantizes: those `full` does."""
    plan = resolve(PRESETS["full"], linear_shapes(pipeline.transformer.config))
    return sorted({fused_name(layer) for layer in plan.quantized})
