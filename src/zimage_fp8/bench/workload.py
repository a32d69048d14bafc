"""What every variant is put through: the defaults by kind of model, and what a user changed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_fp8.bench.record import Parameters
from zimage_fp8.errors import UsageError

FIRST_SEED = 1235  # as the seed card; the warm-up takes the seed before
FULL_SIZE_DIM = 3840


@dataclass(frozen=True)
class Profile:
    """The default workload of a kind of model: one seed per prompt, (width, height) in pixels."""

    prompts: tuple[str, ...]
    size: tuple[int, int]


FULL_SIZE = Profile(
    prompts=(
        "a cinematic photograph of an old fisherman standing on a foggy pier at sunrise",
        "a detailed watercolor painting of a mountain village beside a clear blue lake",
        "a futuristic city street at night with neon reflections on wet pavement",
    ),
    size=(1024, 512),
)

# nano knows objects on plain backgrounds and nothing else.
NANO = Profile(
    prompts=(
        "a 3d icon of a hamburger on a teal background",
        "a penguin on a yellow background",
        "a lion and a red apple on a pink background",
    ),
    size=(256, 256),
)


def profile_of(model: str) -> Profile:
    """NANO for `nano` and for local folders of its kind, FULL_SIZE for everything else."""
    return NANO if is_test_model(model) else FULL_SIZE


def is_test_model(model: str) -> bool:
    """True for the embedded model and for any local model narrower than the real one."""
    if model == "nano":
        return True
    config = Path(model) / "transformer" / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("dim", 0) < FULL_SIZE_DIM


# field, what must hold, and the same in words
CHECKS: tuple[tuple[str, Callable[[Parameters], bool], str], ...] = (
    ("prompts", lambda p: all(map(str.strip, p.prompts)) and bool(p.prompts), "none may be empty"),
    ("seeds", lambda p: len(p.seeds) == len(p.prompts), "there must be one per prompt"),
    (
        "size",
        lambda p: min(p.width, p.height) > 0 and p.width % 16 == p.height % 16 == 0,
        "both sides must be positive multiples of 16",
    ),
    ("steps", lambda p: p.steps >= 1, "at least 1 is needed"),
    ("guidance", lambda p: p.guidance >= 0, "it cannot be negative"),
    ("warmup", lambda p: p.warmup >= 0, "it cannot be negative"),
    ("runs", lambda p: p.runs >= len(p.prompts), "each prompt must be drawn at least once"),
)


def choose_parameters(
    model: str,
    *,
    prompts: Sequence[str] | None,
    seeds: Sequence[int] | None,
    size: tuple[int, int] | None,
    steps: int,
    guidance: float,
    warmup: int,
    runs: int | None,
    dtype: str,
    device: str | None,
) -> Parameters:
    """The workload, with defaults for what is None. Raises UsageError when it makes no sense."""
    profile = profile_of(model)
    prompts = list(profile.prompts if prompts is None else prompts)
    width, height = size or profile.size
    parameters = Parameters(
        prompts=prompts,
        seeds=list(range(FIRST_SEED, FIRST_SEED + len(prompts)) if seeds is None else seeds),
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        warmup=warmup,
        runs=len(prompts) if runs is None else runs,
        dtype=dtype,
        device=device,
    )
    for field, holds, rule in CHECKS:
        if not holds(parameters):
            raise UsageError(f"{field} {getattr(parameters, field)!r}: {rule}", param=field)
    return parameters
