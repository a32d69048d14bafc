"""What a benchmark run leaves behind: `record.json`, from which every table and card is rendered.

Every number is kept raw: one entry per request, with its picture's file and hash. The schema is
versioned; a record of another version is refused, not guessed at.
"""

import json
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from zimage_fp8.errors import ZImageError

SCHEMA_VERSION: Literal[1] = 1
REFERENCE = "bf16_base"


class MemoryMethod(NamedTuple):
    """How a peak was measured: for a table's header, for a phrase, and as a sentence."""

    header: str
    short: str
    sentence: str


# In order of preference for the table: the first that every variant has.
MEMORY_METHODS: dict[str, MemoryMethod] = {
    "nvml_process": MemoryMethod(
        "Peak GPU, NVML (GiB)",
        "peak GPU",
        "peak GPU memory of the server process, sampled through NVML",
    ),
    "nvml_device_growth": MemoryMethod(
        "Peak GPU growth, NVML (GiB)",
        "peak GPU growth",
        "peak memory of all GPUs above what was used before the server started, sampled through "
        "NVML (the driver does not show this process by its id)",
    ),
    "torch_reserved": MemoryMethod(
        "Peak GPU, torch reserved (GiB)",
        "peak GPU reserved",
        "most memory torch's allocator held from the driver",
    ),
    "torch_allocated": MemoryMethod(
        "Peak GPU, torch allocated (GiB)", "peak GPU allocated", "largest sum of live CUDA tensors"
    ),
    "process_rss": MemoryMethod(
        "Peak RSS (GiB)",
        "peak RSS",
        "peak resident main memory of the server process since its start, loading included, as "
        "its kernel counts it",
    ),
    "sampled_rss": MemoryMethod(
        "Peak RSS, sampled (GiB)",
        "peak RSS",
        "peak resident main memory of the server process, sampled",
    ),
}


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


class Parameters(_Part):
    """The workload. `prompts` and `seeds` go in pairs; `runs` requests cycle through them."""

    prompts: list[str]
    seeds: list[int]
    width: int
    height: int
    steps: int
    guidance: float
    warmup: int
    runs: int
    dtype: str
    device: str | None

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


class Quality(_Part):
    """A picture against the BF16 picture of the same (prompt, seed)."""

    psnr_db: float
    ssim: float

    @property
    def is_identical(self) -> bool:
        return self.psnr_db == float("inf")


class RequestRecord(_Part):
    """One request. `prompt` indexes the prompts; `picture` is relative to the record's folder."""

    prompt: int
    seed: int
    latency_s: float = Field(gt=0)
    nfe: int
    sigmas: list[float]
    timings_s: dict[str, float]
    picture: str
    sha256: str
    quality: Quality | None = None


class VariantRecord(_Part):
    """One policy in one fresh server process. `load_s`: from its start to its first health."""

    policy: str
    summary: str
    command: list[str]
    server: dict[str, JsonValue]
    load_s: float
    warmup_latencies_s: list[float]
    requests: list[RequestRecord] = Field(min_length=1)
    peak_memory_bytes: dict[str, int]
    memory_sampling_hz: float
    num_memory_samples: int


class Record(_Part):
    """One run. `is_test_model`: a small model of Z-Image's structure, such as nano.

    Commands and names mean the same on every machine: no path of the one it ran on is in here.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    command: list[str]
    model: str
    is_test_model: bool
    machine: Machine
    versions: dict[str, str]
    commit: str | None
    parameters: Parameters
    variants: list[VariantRecord]

    @property
    def reference(self) -> VariantRecord:
        return next(variant for variant in self.variants if variant.policy == REFERENCE)

    @property
    def memory_method(self) -> str:
        """The key of MEMORY_METHODS that tables use: the first that every variant has."""
        return self._common_methods[0]

    @model_validator(mode="after")
    def _can_be_compared(self) -> "Record":
        """Everything that a table, a picture grid or a card takes for granted."""
        prompts = set(range(len(self.parameters.prompts)))
        if len(self.parameters.seeds) != len(prompts) or not prompts:
            raise ValueError("parameters: there must be one seed per prompt, and one prompt")
        if REFERENCE not in [variant.policy for variant in self.variants]:
            raise ValueError(f"variants: the reference {REFERENCE} is missing")
        for variant in self.variants:
            if {request.prompt for request in variant.requests} != prompts:
                raise ValueError(f"variants: {variant.policy} did not draw every prompt, or others")
            is_reference = variant.policy == REFERENCE
            if any((request.quality is None) != is_reference for request in variant.requests):
                raise ValueError(f"variants: {variant.policy} is not compared with the reference")
        if not self._common_methods:
            raise ValueError("variants: no memory was measured in the same way for all of them")
        return self

    @property
    def _common_methods(self) -> list[str]:
        return [
            method
            for method in MEMORY_METHODS
            if all(variant.peak_memory_bytes.get(method) for variant in self.variants)
        ]


def write_record(record: Record, path: Path) -> None:
    """Write atomically: a record is there completely or not at all."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(record.model_dump_json(indent=2) + "\n")
    temporary.replace(path)


def read_record(path: Path) -> Record:
    """Raises ZImageError when the file is missing, damaged, or of another schema version."""
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise ZImageError(f"cannot read the record {path}: {error.strerror}") from None
    except ValueError as error:
        raise ZImageError(f"{path} is not valid JSON: {error}") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ZImageError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}",
            hint="run zimage-fp8 bench again",
        )
    try:
        return Record.model_validate(raw)
    except ValidationError as error:
        raise ZImageError(f"{path} is damaged: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """`machine.cpu: Field required`; only the sentence when it is about the whole."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
