"""The sampler, as pure functions on tensors: schedule, noise, guidance, the Euler loop."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # (latent, sigma) -> d latent / d sigma
OnStep = Callable[[int, int], None]  # (steps done, steps in all)


def schedule(steps: int, shift: float) -> tuple[float, ...]:
    """`steps + 1` sigmas from 1 to 0: uniform, then shifted towards 1 by `s·x / (1 + (s-1)·x)`.

    In fp32 throughout, so the values equal those of diffusers (0.39 and later) bit for bit.
    """
    uniform = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float32)
    shifted = shift * uniform / (1 + (shift - 1) * uniform)
    return (*shifted.tolist(), 0.0)


def calibration_schedule(forwards: int, shift: float) -> tuple[float, ...]:
    """`forwards` sigmas of which the last is 0, plus the closing 0.

    The schedule that is served, with one more forward at sigma 0 that moves nothing but shows the
    layers the end of the road: what "9 denoise steps" meant when the seven policies were made.
    """
    return (*schedule(forwards - 1, shift), 0.0)


def last_part(sigmas: Sequence[float], strength: float) -> tuple[float, ...]:
    """The end of a schedule, when only `strength` (above 0, to 1) of the way is walked.

    1 is the whole schedule.
    """
    return tuple(sigmas[-1 - steps_to_walk(len(sigmas) - 1, strength) :])


def steps_to_walk(steps: int, strength: float) -> int:
    """At least one of `steps`, rounded as diffusers does."""
    return max(1, steps - int(steps - steps * strength))


def add_noise(latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Where the straight road from `noise` to `latent` passes at `sigma`: 1 is noise alone."""
    return sigma * noise + (1 - sigma) * latent


def draw_latent(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Noise for one image of height x width pixels: fp32 [1, channels, height/8, width/8].

    Drawn by a CPU generator, so one seed is one latent on every machine.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, channels, height // 8, width // 8, generator=generator)


def transformer_time(sigma: float) -> Tensor:
    """`1 − sigma` as the transformer receives it: fp32 [1].

    Through diffusers' detour over timesteps of 0..1000: the sinusoid multiplies t by 1000, where
    another order of fp32 operations would already show.
    """
    timestep = torch.tensor([sigma], dtype=torch.float32) * 1000
    return (1000 - timestep) / 1000


def guide(positive: Tensor, negative: Tensor, guidance: float) -> Tensor:
    """Z-Image's guidance: `pos + g·(pos − neg)`, so 0 is off and 1 already guides."""
    return positive + guidance * (positive - negative)


def euler(latent: Tensor, velocity: Tensor, sigma: float, following: float) -> Tensor:
    """A straight step from one noise level to the following."""
    return latent + (following - sigma) * velocity


def denoise(
    velocity: Velocity, latent: Tensor, sigmas: Sequence[float], on_step: OnStep | None = None
) -> Tensor:
    """Euler's method from sigmas[0] to sigmas[-1]: `len(sigmas) − 1` calls of `velocity`.

    latent: fp32, unchanged; returns fp32 of the same shape. `on_step` is called after every step;
    an exception raised in it ends the loop.
    """
    total = len(sigmas) - 1
    for index, (sigma, following) in enumerate(pairwise(sigmas)):
        latent = euler(latent, velocity(latent, sigma), sigma, following)
        if on_step is not None:
            on_step(index + 1, total)
    return latent
