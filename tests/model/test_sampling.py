"""The sampler against diffusers' scheduler, and the loop against counting."""

import pytest
import torch

from compare import same_bits
from zimage_fp8.model.sampling import (
    calibration_schedule,
    denoise,
    draw_latent,
    guide,
    schedule,
    transformer_time,
)


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 50])
def test_sigmas_and_times_are_those_of_diffusers(steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / steps, steps).tolist())
    sigmas = schedule(steps, shift=3.0)
    same_bits(torch.tensor(sigmas), scheduler.sigmas)
    times = torch.cat([transformer_time(sigma) for sigma in sigmas[:-1]])
    same_bits(times, (1000 - scheduler.timesteps) / 1000)


def test_the_known_eight_sigmas() -> None:
    known = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
    assert schedule(8, 3.0) == pytest.approx(known, abs=5e-5)


def test_calibration_is_what_is_served_and_one_forward_at_zero() -> None:
    assert calibration_schedule(9, 3.0) == (*schedule(8, 3.0), 0.0)


def test_one_call_per_step_and_every_step_is_reported() -> None:
    called, reported = [], []

    def velocity(latent: torch.Tensor, sigma: float) -> torch.Tensor:
        called.append(sigma)
        return torch.ones_like(latent)

    sigmas = schedule(8, 3.0)
    out = denoise(velocity, torch.zeros(1, 2), sigmas, lambda *step: reported.append(step))
    assert called == list(sigmas[:-1])
    assert reported == [(i, 8) for i in range(1, 9)]
    assert torch.allclose(out, torch.full((1, 2), -1.0))  # the integral of 1 from sigma 1 to 0


def test_a_straight_path_is_solved_exactly_in_any_number_of_steps() -> None:
    noise, picture = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    for steps in (1, 3, 8):
        out = denoise(lambda latent, sigma: noise - picture, noise, schedule(steps, 3.0))
        assert torch.allclose(out, picture, atol=1e-5)


def test_an_exception_in_on_step_ends_the_loop() -> None:
    calls = 0

    def velocity(latent: torch.Tensor, sigma: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return latent

    def cancel(done: int, total: int) -> None:
        if done == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        denoise(velocity, torch.zeros(1), schedule(8, 3.0), cancel)
    assert calls == 3


def test_one_seed_is_one_latent_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (draw_latent(seed, 16, 64, 32) for seed in (1, 1, 2))
    assert first.shape == (1, 16, 8, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    # The first values, so that a change of generator cannot pass unseen.
    assert draw_latent(0, 1, 8, 8).item() == pytest.approx(1.5409960746765137)


def test_guidance_zero_is_off_and_one_already_guides() -> None:
    positive, negative = torch.tensor([2.0]), torch.tensor([0.5])
    assert guide(positive, negative, 0).item() == 2.0
    assert guide(positive, negative, 1).item() == 3.5
