"""Profiles: what a benchmark sends, as a TOML file that a user can copy and change.

    zimage-fp8 bench MODEL --profile standard --out DIR
    zimage-fp8 bench MODEL --profile my-profile.toml --out DIR

The shipped ones lie in `bench/profiles/`. Every key is a field below; unknown keys are refused.
"""

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from zimage_fp8.bench.record import ProfileFacts, first_problem
from zimage_fp8.errors import UsageError
from zimage_fp8.protocol import parse_size

FOLDER = Path(__file__).resolve().parent / "profiles"
NAMES = ("card", "standard", "quick", "nano", "nano-standard")
DIGEST_LENGTH = 16

Floor = Literal["rerun", "attention", "next_seed"]
Order = Literal["interleaved", "sequential"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class PassPlan(_Table):
    """One table. attention: backend for every server, None for its own choice. policies: only
    these of the chosen ones; bf16_base is always among them."""

    name: str = "A"
    attention: str | None = None
    policies: list[str] | None = None


class LoadPlan(_Table):
    """Load tests of every variant at the first size, `requests` pictures each.

    concurrency: closed loops, each client sending its next request when it has its answer. rates:
    Poisson arrivals, as shares of the images/s that the reference draws for one client. slo: an
    answer is good within this many times the reference's median latency.
    """

    requests: int = Field(ge=1)
    concurrency: list[int] = []
    rates: list[float] = []
    slo: float = Field(default=3.0, gt=0)

    @model_validator(mode="after")
    def _positive(self) -> "LoadPlan":
        if any(number <= 0 for number in (*self.concurrency, *self.rates)):
            raise ValueError("concurrency and rates must be above 0")
        return self


class Profile(_Table):
    """A workload. prompts: stratum -> prompts; prompt i of all takes the seed first_seed + i.

    Every variant draws every prompt at every size. timed: timed requests per variant and size,
    spread evenly over the prompts. warmup: untimed requests per size before; with warm_tolerance
    they go on until the medians of the last two groups of `warmup` agree that well, or max_warmup
    are spent. draw_before_timing: draw every picture once untimed, so that every timed request is a
    repetition and no first sight of a caption's length is timed. floors: BF16 again (rerun), with
    floor_attention (attention), with the next seed. probe_guidance: check by timing that guidance
    runs only when asked; servers that do not count their forwards are always checked.
    """

    name: str
    summary: str
    sizes: list[str] = Field(min_length=1)
    steps: int = 8
    guidance: float = 0.0
    first_seed: int = 1235
    timed: int = Field(ge=1)
    warmup: int = Field(default=1, ge=0)
    warm_tolerance: float | None = Field(default=None, gt=0)
    max_warmup: int = 0
    order: Order = "sequential"
    draw_before_timing: bool = True
    floors: list[Floor] = []
    floor_attention: str | None = None
    probe_guidance: bool = False
    passes: list[PassPlan] = Field(default=[PassPlan()], alias="pass", min_length=1)
    load: LoadPlan | None = None
    prompts: dict[str, list[str]] = Field(min_length=1)

    @field_validator("sizes")
    @classmethod
    def _plain_sizes(cls, sizes: list[str]) -> list[str]:
        """`1024×512` and `1024X512` are written 1024x512. Raises UsageError's words."""
        try:
            plain = ["x".join(map(str, parse_size(size))) for size in sizes]
        except UsageError as error:
            raise ValueError(str(error)) from None
        if len(set(plain)) < len(plain):
            raise ValueError("a size is listed twice")
        return plain

    @model_validator(mode="after")
    def _makes_sense(self) -> "Profile":
        if ("attention" in self.floors) != (self.floor_attention is not None):
            raise ValueError("the floor attention and floor_attention go together")
        if self.warm_tolerance is not None and self.warmup < 1:
            raise ValueError("warm_tolerance compares medians of groups of `warmup`: at least 1")
        if self.warm_tolerance is not None and self.max_warmup < 2 * self.warmup:
            raise ValueError("max_warmup must allow two groups of `warmup` requests")
        if self.load and not self.draw_before_timing:
            raise ValueError("load needs draw_before_timing: its rates come from those pictures")
        names = [one.name for one in self.passes]
        if len(set(names)) < len(names):
            raise ValueError("two passes have one name")
        if empty := [stratum for stratum, prompts in self.prompts.items() if not prompts]:
            raise ValueError(f"the stratum {empty[0]} holds no prompt")
        return self

    def facts(self, *, is_changed: bool = False) -> ProfileFacts:
        """Name and digest; `is_changed`: by options of the command line."""
        name = f"{self.name} (changed)" if is_changed else self.name
        return ProfileFacts(name=name, digest=self.digest)

    @property
    def digest(self) -> str:
        """Of the meaning, not of the file: comments and the summary do not change it."""
        canonical = json.dumps(self.model_dump(exclude={"name", "summary"}), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:DIGEST_LENGTH]


def find_profile(name: str) -> Profile:
    """A shipped profile, or the one in a .toml file. Raises UsageError."""
    if name in NAMES:
        return read_profile(FOLDER / f"{name}.toml")
    if name.endswith(".toml"):
        return read_profile(Path(name))
    raise UsageError(
        f"profile {name!r}: expected {', '.join(NAMES)}, or a .toml file", param="profile"
    )


def read_profile(path: Path) -> Profile:
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"profile {path} cannot be read: {error.strerror}", param="profile"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"profile {path} is not TOML: {error}", param="profile") from None
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"profile {path}: {first_problem(error)}", param="profile") from None
