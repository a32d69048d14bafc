"""A picture on its way from noise, between two of its steps.

A drawing only says what it needs next, forwards of the transformer, and takes the results; who runs
them (`model.pipeline`) may answer several drawings with one forward, each at its own step.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function

from zimage_fp8.model.inpainting import Kept
from zimage_fp8.model.request import ImageRequest
from zimage_fp8.model.sampling import euler, guide

STAGE_MARK = "end of stage: "  # what a profiler's timeline shows where a stage ends


@dataclass(frozen=True)
class Conditions:
    """What a picture is drawn by: a refined caption, [1, tokens, dim], and with guidance a second
    one to lead away from, perhaps of another length."""

    positive: Tensor
    negative: Tensor | None = None
    guidance: float = 0.0

    @property
    def captions(self) -> tuple[Tensor, ...]:
        """One forward each."""
        return (self.positive,) if self.negative is None else (self.positive, self.negative)

    def velocity(self, outputs: Sequence[Tensor]) -> Tensor:
        """d latent / d sigma, from the transformer's outputs for `captions`."""
        if self.negative is None:
            return -outputs[0]
        positive, negative = outputs
        return -guide(positive, negative, self.guidance)


class Clock:
    """Wall time per stage, summed over its laps, with the device's queue drained at every lap."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self._last = self._now()

    def lap(self, stage: str) -> None:
        now = self._now()
        self.laps[stage] = self.laps.get(stage, 0.0) + now - self._last
        with record_function(STAGE_MARK + stage):
            self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass
class Drawing:
    """latent: fp32 [1, channels, height/8, width/8], where it is after `done` steps.

    kept: what a mask leaves alone. nfe: forwards that ran for it. company: the most drawings that
    shared a forward with it, itself included. Its time for denoising is wall time from the first
    step to the last, whatever else its company had done in between.
    """

    request: ImageRequest
    sigmas: tuple[float, ...]
    conditions: Conditions
    latent: Tensor
    clock: Clock
    kept: Kept | None = None
    done: int = 0
    nfe: int = 0
    company: int = 1
    velocity: Tensor | None = field(default=None, repr=False)

    @property
    def total(self) -> int:
        return len(self.sigmas) - 1

    @property
    def is_done(self) -> bool:
        return self.done == self.total

    @property
    def sigma(self) -> float:
        return self.sigmas[self.done]

    @property
    def guess(self) -> Tensor:
        """The latent that the last step pointed to: where this would end if nothing changed."""
        if self.velocity is None:
            return self.latent
        return euler(self.latent, self.velocity, self.sigma, 0.0)

    def advance(self, outputs: Sequence[Tensor], company: int = 1) -> None:
        """One step, by the transformer's outputs for `conditions.captions` at `sigma`."""
        self.velocity = self.conditions.velocity(outputs)
        if self.kept:
            self.velocity = self.kept.inside(self.velocity)
        self.latent = euler(self.latent, self.velocity, self.sigma, self.sigmas[self.done + 1])
        self.nfe += len(outputs)
        self.company = max(self.company, company)
        self.done += 1
