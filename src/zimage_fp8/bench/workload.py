"""What every variant is put through: a profile, and what a user changed of it."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from zimage_fp8.bench.profile import Profile, find_profile
from zimage_fp8.bench.record import Parameters
from zimage_fp8.bench.variants import travelling_name
from zimage_fp8.errors import UsageError
from zimage_fp8.layout import PATCH, read_config
from zimage_fp8.model.loading import DTYPES
from zimage_fp8.model.request import ImageRequest, check_values
from zimage_fp8.model.source import display_name
from zimage_fp8.protocol import MAX_SEED, parse_size

FIRST_SEED = 1235  # as the seed card; the warm-up takes the seed before
FULL_SIZE_DIM = 3840
VAE_FACTOR = 8


class Sample(NamedTuple):
    """A few prompts that suit a model, and its usual (width, height)."""

    prompts: tuple[str, ...]
    size: tuple[int, int]


def profile_of(folder: Path) -> Sample:
    """The seed card's prompts and size, or nano's own for smaller models. Raises ModelError."""
    profile = find_profile("nano" if is_test_model(folder) else "card")
    prompts = tuple(prompt for group in profile.prompts.values() for prompt in group)
    return Sample(prompts, parse_size(profile.sizes[0]))


def default_profile(folder: Path) -> str:
    """The name of the profile for who names none. Raises ModelError."""
    return "nano" if is_test_model(folder) else "quick"


def is_test_model(folder: Path) -> bool:
    """True for any model narrower than the real one, wherever it comes from. Raises ModelError."""
    config, _ = read_config(folder / "transformer")
    return config.dim < FULL_SIZE_DIM


@dataclass(frozen=True)
class Wishes:
    """What the user asked for; None stands for what the profile says."""

    profile: str | None = None
    prompts: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    warmup: int | None = None
    runs: int | None = None
    dtype: str = "bfloat16"
    device: str | None = None

    @property
    def change_the_profile(self) -> bool:
        """Whether what runs is still the profile of that name."""
        kept = ("profile", "dtype", "device")
        return any(getattr(self, f.name) is not None for f in fields(self) if f.name not in kept)


# field, what must hold, and the same in words
CHECKS: tuple[tuple[str, Callable[[Parameters], bool], str], ...] = (
    ("prompts", lambda p: bool(p.prompts), "there must be one"),
    ("seeds", lambda p: len(p.seeds) == len(p.prompts), "there must be one per prompt"),
    (
        "seeds",
        lambda p: all(0 <= seed < MAX_SEED for seed in p.seeds),
        f"expected 0 to {MAX_SEED - 1}, which JSON carries exactly",
    ),
    ("warmup", lambda p: p.warmup >= 0, "it cannot be negative"),
    ("runs", lambda p: p.runs >= 1, "there must be one"),
    ("dtype", lambda p: p.dtype in DTYPES, f"expected {' or '.join(DTYPES)}"),
)


def effective_profile(profile: Profile, wishes: Wishes) -> Profile:
    """The profile with the user's wishes in it; fewer timed requests than own prompts draw all.

    Seeds stay apart: they are in the parameters.
    """
    changes: dict[str, object] = {}
    if wishes.prompts is not None:
        changes["prompts"] = {"own": list(wishes.prompts)}
        changes["timed"] = max(len(wishes.prompts), 1)
    if wishes.size is not None:
        changes["sizes"] = ["x".join(map(str, wishes.size))]
    for wish, key in (("steps", "steps"), ("guidance", "guidance"), ("runs", "timed")):
        if (value := getattr(wishes, wish)) is not None:
            changes[key] = value
    if wishes.warmup is not None:
        # A number means that number: no looking whether latency has settled.
        changes |= {"warmup": wishes.warmup, "warm_tolerance": None, "max_warmup": 0}
    return profile.model_copy(update=changes)


def choose_parameters(profile: Profile, wishes: Wishes) -> Parameters:
    """The workload of an effective profile. Raises UsageError when it makes no sense."""
    prompts = [prompt for group in profile.prompts.values() for prompt in group]
    first = profile.first_seed
    seeds = range(first, first + len(prompts)) if wishes.seeds is None else wishes.seeds
    parameters = Parameters(
        prompts=prompts,
        strata=[stratum for stratum, group in profile.prompts.items() for _ in group],
        seeds=list(seeds),
        sizes=profile.sizes,
        steps=profile.steps,
        guidance=profile.guidance,
        warmup=profile.warmup,
        warm_tolerance=profile.warm_tolerance,
        max_warmup=profile.max_warmup,
        runs=profile.timed,
        dtype=wishes.dtype,
        device=wishes.device,
    )
    for field, holds, rule in CHECKS:
        if not holds(parameters):
            raise UsageError(f"{field} {getattr(parameters, field)!r}: {rule}", param=field)
    for size in parameters.sizes:
        for prompt in prompts:
            check_values(
                ImageRequest(
                    prompt, *parse_size(size), steps=profile.steps, guidance=profile.guidance
                )
            )
    _check_device(wishes.device)
    return parameters


def _check_device(device: str | None) -> None:
    """Raise UsageError for a device that no server could start on."""
    if device is None:
        return
    if not (match := re.fullmatch(r"cpu|cuda(?::(\d+))?", device)):
        raise UsageError(f"device {device!r}: expected cpu, cuda or cuda:N", param="device")
    if device == "cpu":
        return
    count = torch.cuda.device_count()
    if int(match[1] or 0) >= count:
        raise UsageError(
            f"device {device}: PyTorch sees {count} CUDA devices here",
            param="device",
            hint="zimage-fp8 doctor says why",
        )


def check_sizes(parameters: Parameters, folder: Path) -> None:
    """Raise UsageError for a size that the model in `folder` cannot draw."""
    config, _ = read_config(folder / "transformer")
    limit = min(config.axes_lens[1:]) * VAE_FACTOR * PATCH
    for size in parameters.sizes:
        if max(parse_size(size)) > limit:
            raise UsageError(f"size {size}: this model draws at most {limit} a side", param="size")


class Slot(NamedTuple):
    """One timed request: the prompt's index and the size."""

    prompt: int
    size: str


def timed_slots(parameters: Parameters) -> list[Slot]:
    """`runs` per size, spread evenly over the prompts, one size after the other."""
    return [Slot(prompt, size) for size in parameters.sizes for prompt in _spread(parameters)]


def _spread(parameters: Parameters) -> Iterator[int]:
    count, runs = len(parameters.prompts), parameters.runs
    for run in range(runs):
        yield run % count if runs >= count else run * count // runs


def picture_slots(parameters: Parameters, *, is_repeated: bool) -> list[Slot]:
    """What is drawn once without being timed: everything, or what no timed request draws."""
    every = [
        Slot(prompt, size) for size in parameters.sizes for prompt in range(len(parameters.prompts))
    ]
    timed = set() if is_repeated else set(timed_slots(parameters))
    return [slot for slot in every if slot not in timed]


def recorded_command(
    model: str, policies: Sequence[str], wishes: Wishes, out: Path, others: Sequence[str] = ()
) -> list[str]:
    """The command that repeats a run, in names that mean the same on every machine.

    Only what differs from the defaults is in it. A user's own prompts appear as a file name; the
    prompts themselves are in the record's parameters. others: options that are no wishes.
    """
    command = ["zimage-fp8", "bench", display_name(model)]
    command += ["--profile", travelling_name(wishes.profile)] if wishes.profile else []
    command += [word for asked in policies for word in ("--policies", travelling_name(asked))]
    command += ["--out", out.resolve().name]
    command += ["--prompts", "prompts.txt"] if wishes.prompts is not None else []
    command += [word for seed in wishes.seeds or () for word in ("--seeds", str(seed))]
    command += ["--size", "x".join(map(str, wishes.size))] if wishes.size else []
    for field in ("steps", "guidance", "warmup", "runs", "dtype", "device"):
        value = getattr(wishes, field)
        if value != getattr(Wishes(), field):
            command += [f"--{field}", str(value)]
    return [*command, *others]
