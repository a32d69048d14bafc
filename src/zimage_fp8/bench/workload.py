"""What every variant is put through: the defaults by kind of model, and what a user changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zimage_fp8.bench.record import Parameters
from zimage_fp8.bench.variants import travelling_name
from zimage_fp8.errors import UsageError
from zimage_fp8.layout import read_config
from zimage_fp8.model.loading import DTYPES
from zimage_fp8.model.pipeline import ImageRequest, check_values
from zimage_fp8.model.source import display_name
from zimage_fp8.protocol import MAX_SEED

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


def profile_of(folder: Path) -> Profile:
    """FULL_SIZE for a model of Z-Image-Turbo's width, NANO for smaller ones. Raises ModelError."""
    return NANO if is_test_model(folder) else FULL_SIZE


def is_test_model(folder: Path) -> bool:
    """True for any model narrower than the real one, wherever it comes from. Raises ModelError."""
    config, _ = read_config(folder / "transformer")
    return config.dim < FULL_SIZE_DIM


@dataclass(frozen=True)
class Wishes:
    """What the user asked for; None stands for the profile's default."""

    prompts: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    size: tuple[int, int] | None = None
    steps: int = 8
    guidance: float = 0.0
    warmup: int = 1
    runs: int | None = None
    dtype: str = "bfloat16"
    device: str | None = None


# field, what must hold, and the same in words
CHECKS: tuple[tuple[str, Callable[[Parameters], bool], str], ...] = (
    ("prompts", lambda p: bool(p.prompts), "there must be one"),
    ("seeds", lambda p: len(p.seeds) == len(p.prompts), "there must be one per prompt"),
    (
        "seeds",
        lambda p: all(0 <= seed <= MAX_SEED for seed in p.seeds),
        f"expected 0 to {MAX_SEED}, which JSON carries exactly",
    ),
    ("warmup", lambda p: p.warmup >= 0, "it cannot be negative"),
    ("runs", lambda p: p.runs >= len(p.prompts), "each prompt must be drawn at least once"),
    ("dtype", lambda p: p.dtype in DTYPES, f"expected {' or '.join(DTYPES)}"),
)


def choose_parameters(profile: Profile, wishes: Wishes) -> Parameters:
    """The workload, with defaults for what is None. Raises UsageError when it makes no sense."""
    prompts = list(profile.prompts if wishes.prompts is None else wishes.prompts)
    seeds = range(FIRST_SEED, FIRST_SEED + len(prompts)) if wishes.seeds is None else wishes.seeds
    width, height = wishes.size or profile.size
    parameters = Parameters(
        prompts=prompts,
        strata=["all"] * len(prompts),
        seeds=list(seeds),
        sizes=[f"{width}x{height}"],
        steps=wishes.steps,
        guidance=wishes.guidance,
        warmup=wishes.warmup,
        runs=len(prompts) if wishes.runs is None else wishes.runs,
        dtype=wishes.dtype,
        device=wishes.device,
    )
    for field, holds, rule in CHECKS:
        if not holds(parameters):
            raise UsageError(f"{field} {getattr(parameters, field)!r}: {rule}", param=field)
    for prompt in prompts:
        check_values(
            ImageRequest(prompt, width, height, steps=wishes.steps, guidance=wishes.guidance)
        )
    return parameters


def recorded_command(model: str, policies: Sequence[str], wishes: Wishes, out: Path) -> list[str]:
    """The command that repeats a run, in names that mean the same on every machine.

    Only what differs from the defaults is in it. A user's own prompts appear as a file name; the
    prompts themselves are in the record's parameters.
    """
    command = ["zimage-fp8", "bench", display_name(model)]
    command += [word for asked in policies for word in ("--policies", travelling_name(asked))]
    command += ["--out", out.resolve().name]
    command += ["--prompts", "prompts.txt"] if wishes.prompts is not None else []
    command += [word for seed in wishes.seeds or () for word in ("--seeds", str(seed))]
    command += ["--size", "x".join(map(str, wishes.size))] if wishes.size else []
    for field in ("steps", "guidance", "warmup", "runs", "dtype", "device"):
        value = getattr(wishes, field)
        if value != getattr(Wishes(), field):
            command += [f"--{field}", str(value)]
    return command
