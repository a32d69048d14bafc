"""What a benchmark run leaves behind: `record.json`, from which every table and card is rendered.

Every number is kept raw: one row per request, in the order they were sent, with its picture's file
and hash. Means, percentiles and intervals are not stored; `bench.statistics` computes them. The
schema is versioned: version 1 is read as version 2, any other is refused, not guessed at.

    Record ─ parameters, profile, machine, flags
      └─ passes: one table each (the card's pass A and pass B); pass 0 is the main one
           ├─ variants: complete rows, the reference bf16_base first
           ├─ floors: BF16 again, with another attention backend, with the next seed
           └─ failures: variants that broke, each with its error
"""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from zimage_fp8.bench.record_v1 import from_version_1
from zimage_fp8.bench.tidy import tidy_json
from zimage_fp8.bench.vocabulary import FLAG_KINDS, MEMORY_METHODS
from zimage_fp8.errors import ZImageError

__all__ = ["FLAG_KINDS", "MEMORY_METHODS"]

SCHEMA_VERSION: Literal[2] = 2
REFERENCE = "bf16_base"


class _Part(BaseModel):
    # A picture identical to its reference has infinite PSNR, which JSON can only say as a string.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Gpu(_Part):
    name: str
    memory_bytes: int | None
    driver: str


class Machine(_Part):
    cpu: str
    cores: int
    memory_bytes: int
    system: str
    gpus: list[Gpu]


class ProfileFacts(_Part):
    """Which workload ran. `digest`: the first 16 hex digits of its canonical form's SHA-256."""

    name: str
    digest: str


class Parameters(_Part):
    """The workload. `prompts`, `strata` and `seeds` have one entry per prompt.

    Every variant draws every prompt at every size once; of these requests, and of repetitions if
    they do not suffice, `runs` per size are timed. `warmup`: requests per size before timing, at
    least; they go on until two medians agree within `warm_tolerance` (None: do not look) or
    `max_warmup` are spent.
    """

    prompts: list[str]
    strata: list[str]
    seeds: list[int]
    sizes: list[str]
    steps: int
    guidance: float
    warmup: int
    warm_tolerance: float | None = None
    max_warmup: int = 0
    runs: int
    dtype: str
    device: str | None

    @property
    def size(self) -> str:
        """The first size, the one of the main table."""
        return self.sizes[0]

    @property
    def width(self) -> int:
        return int(self.size.partition("x")[0])

    @property
    def height(self) -> int:
        return int(self.size.partition("x")[2])


class Quality(_Part):
    """A picture against the reference's picture of the same prompt, size and seed.

    lpips: perceptual distance, 0 is equal. clip_image: cosine of the two pictures' CLIP embeddings.
    clip_text: how much better the picture fits its prompt than the reference's does, as the
    difference of the two CLIP scores. None where the user has no weights for it.
    """

    psnr_db: float
    ssim: float
    lpips: float | None = None
    clip_image: float | None = None
    clip_text: float | None = None

    @property
    def is_identical(self) -> bool:
        return self.psnr_db == float("inf")


class RequestRecord(_Part):
    """One request after warm-up.

    prompt indexes the prompts. is_timed: its latency counts; others were sent for their picture.
    position: how many requests the pass had sent before, over all its variants, warm-up included.
    sent_s: seconds since the pass began (None in version 1). nfe: forwards that the server counted.
    timings_s: the server's stages. Other programs may tell neither. energy_j: of the GPU, from
    sending to the answer. picture is relative to the record's folder; sha256 is of its pixels, and
    a repetition with the same pixels names the same file.
    """

    prompt: int
    size: str
    seed: int
    is_timed: bool
    position: int
    sent_s: float | None
    latency_s: float = Field(gt=0)
    nfe: int | None
    timings_s: dict[str, float]
    energy_j: float | None = None
    picture: str
    sha256: str
    quality: Quality | None = None


class Flag(_Part):
    """Something a reader must know before believing a number. `text` is a whole sentence.

    kind is one of FLAG_KINDS.
    """

    kind: str
    text: str


class Spread(_Part):
    """Least, mean and greatest of the samples."""

    least: float
    mean: float
    greatest: float


class GpuActivity(_Part):
    """What NVML saw of the first GPU while requests were timed. throttled: reason -> share of
    samples in which the driver gave it."""

    num_samples: int
    sm_clock_mhz: Spread | None
    power_w: Spread | None
    temperature_c: Spread | None
    throttled: dict[str, float]


class GuidanceProbe(_Part):
    """Does the server run guidance only when told to? Latencies of short requests, in seconds.

    off and on: `steps` steps without and with guidance; twice: 2 * `steps` steps without. One step
    takes (twice - off) / steps, and guidance should add one forward per step.
    """

    size: str
    steps: int
    guidance: float
    off_s: list[float]
    on_s: list[float]
    twice_s: list[float]
    is_same_picture: bool


class LoadRecord(_Part):
    """One load test. Exactly one of concurrency (closed loop) and rate_per_s (Poisson) is set.

    latencies_s: of the answered requests. failures: error -> how many. duration_s: from the first
    request to the last answer.
    """

    size: str
    concurrency: int | None = None
    rate_per_s: float | None = None
    slo_s: float | None = None
    duration_s: float
    latencies_s: list[float]
    failures: dict[str, int]
    energy_j: float | None = None


class VariantRecord(_Part):
    """One server process that was measured to the end.

    name is unique in its pass: the policy, or what the user called a server. engine: zimage-fp8,
    vllm-omni, or other. floor: None for a variant, else which noise floor this is. attention: the
    backend that ran, as the server says. load_s: from the process's start to its first health;
    cold_start_s: to its first picture; None for a server that was running. peak_memory_bytes:
    method -> bytes over its whole life (the card's metric); load_ and steady_ split the sampled
    methods at the first health.
    """

    name: str
    policy: str
    engine: str = "zimage-fp8"
    floor: Literal["rerun", "attention", "next_seed"] | None = None
    summary: str
    command: list[str]
    server: dict[str, JsonValue]
    attention: str | None
    load_s: float | None
    cold_start_s: float | None
    warmup_latencies_s: list[float]
    sigmas: list[float]
    requests: list[RequestRecord] = Field(min_length=1)
    peak_memory_bytes: dict[str, int]
    load_memory_bytes: dict[str, int] = {}
    steady_memory_bytes: dict[str, int] = {}
    memory_sampling_hz: float
    num_memory_samples: int
    gpu: GpuActivity | None = None
    probe: GuidanceProbe | None = None
    load: list[LoadRecord] = []
    flags: list[Flag] = []

    @property
    def timed(self) -> list[RequestRecord]:
        return [request for request in self.requests if request.is_timed]

    def latencies_s(self, size: str) -> list[float]:
        """Of the timed requests of one size, in the order they were sent."""
        return [request.latency_s for request in self.timed if request.size == size]


class FailedVariant(_Part):
    """A variant that broke: a row with its error. `error` is one or more lines."""

    name: str
    policy: str
    floor: Literal["rerun", "attention", "next_seed"] | None = None
    error: str


class Pass(_Part):
    """One table: every variant under the same settings.

    attention: the backend asked for, None for each server's own choice. order: interleaved when all
    servers (or groups of them, each with the reference) were alive and asked in turns, forwards and
    backwards; sequential when one was measured after the other. order_reason: why, in a sentence.
    """

    name: str
    attention: str | None
    order: Literal["interleaved", "sequential"]
    order_reason: str
    variants: list[VariantRecord]
    floors: list[VariantRecord] = []
    failures: list[FailedVariant] = []

    @property
    def reference(self) -> VariantRecord | None:
        """None in a pass whose reference failed, or that measured servers without one."""
        return next((variant for variant in self.variants if variant.policy == REFERENCE), None)

    @property
    def memory_method(self) -> str | None:
        """The key of MEMORY_METHODS that tables use: the first that every variant has."""
        return next(
            (
                method
                for method in MEMORY_METHODS
                if all(variant.peak_memory_bytes.get(method) for variant in self.variants)
            ),
            None,
        )


class Record(_Part):
    """One run. `is_test_model`: a small model of Z-Image's structure, such as nano.

    Commands and names mean the same on every machine: no path of the one it ran on is in here.
    no_quality: why pictures were not compared (random weights, no reference); None when they were.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    created: str
    command: list[str]
    model: str
    is_test_model: bool
    machine: Machine
    versions: dict[str, str]
    commit: str | None
    profile: ProfileFacts
    parameters: Parameters
    passes: list[Pass] = Field(min_length=1)
    no_quality: str | None = None
    flags: list[Flag] = []

    @property
    def variants(self) -> list[VariantRecord]:
        """Those of the main pass."""
        return self.passes[0].variants

    @property
    def reference(self) -> VariantRecord:
        """BF16 in the main pass. A record of servers without a reference has none: the first."""
        return self.passes[0].reference or self.variants[0]

    @property
    def memory_method(self) -> str:
        """Of the main pass. Raises ZImageError when its variants share no way of measuring."""
        if (method := self.passes[0].memory_method) is None:
            raise ZImageError("the record has no memory figure that all its variants share")
        return method

    @model_validator(mode="after")
    def _can_be_compared(self) -> "Record":
        """Everything that a table, a picture grid or a card takes for granted."""
        parameters = self.parameters
        counts = {len(parameters.seeds), len(parameters.strata), len(parameters.prompts)}
        if len(counts) != 1 or not parameters.prompts:
            raise ValueError(
                "parameters: there must be one seed and one stratum per prompt, and one prompt"
            )
        if not parameters.sizes:
            raise ValueError("parameters: sizes is empty")
        if not self.variants:
            raise ValueError("passes: the main pass holds no variant that was measured")
        for one in self.passes:
            self._check_pass(one)
        return self

    def _check_pass(self, one: Pass) -> None:
        if self.no_quality is None and one.variants and one.reference is None:
            raise ValueError(f"variants: the reference {REFERENCE} is missing")
        measured = [*one.variants, *one.floors]
        names = [variant.name for variant in measured]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"variants: two are named {twice[0]}")
        cases = {
            (prompt, size)
            for prompt in range(len(self.parameters.prompts))
            for size in self.parameters.sizes
        }
        for variant in measured:
            if {(request.prompt, request.size) for request in variant.requests} != cases:
                raise ValueError(f"variants: {variant.name} did not draw every prompt, or others")
            has_none = variant is one.reference or self.no_quality is not None
            if any((request.quality is None) != has_none for request in variant.requests):
                raise ValueError(f"variants: {variant.name} is not compared with the reference")


def write_record(record: Record, path: Path) -> None:
    """Write atomically: a record is there completely or not at all."""
    temporary = path.with_suffix(".partial")
    plain = json.loads(record.model_dump_json())  # infinity as a string, which JSON lacks
    temporary.write_text(f"{tidy_json(plain)}\n", encoding="utf-8")
    temporary.replace(path)


def read_record(path: Path) -> Record:
    """Raises ZImageError when the file is missing, damaged, or of an unknown schema version."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ZImageError(f"cannot read the record {path}: {error.strerror}") from None
    except ValueError as error:
        raise ZImageError(f"{path} is not valid JSON: {error}") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version not in (1, SCHEMA_VERSION):
        raise ZImageError(
            f"{path} has schema version {version}, this program reads 1 and {SCHEMA_VERSION}",
            hint="run zimage-fp8 bench again",
        )
    try:
        return Record.model_validate(from_version_1(raw) if version == 1 else raw)
    except ValidationError as error:
        raise ZImageError(f"{path} is damaged: {first_problem(error)}") from None
    except (KeyError, TypeError, AttributeError) as error:  # a version 1 that lacks its parts
        raise ZImageError(f"{path} is damaged: {type(error).__name__} {error}") from None


def first_problem(error: ValidationError) -> str:
    """`machine.cpu: Field required`; only the sentence when it is about the whole."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
