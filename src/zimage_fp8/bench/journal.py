"""What a run has measured so far, on disk as it happens, so that an interrupted run goes on.

    DIR/journal/plan.json        what the run is; another plan in the same folder is refused
    DIR/journal/servers.txt      the processes of its servers, should they outlive it
    DIR/journal/A/full.jsonl     one line per thing that happened to a variant of a pass

A line is written when its thing is over. One that was cut short by a kill is ignored.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from zimage_fp8.bench.record import (
    Flag,
    GpuActivity,
    GuidanceProbe,
    LoadRecord,
    RequestRecord,
)
from zimage_fp8.errors import ZImageError

FOLDER = "journal"


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Started(_Line):
    """The first start that drew a picture; load_s and cold_start_s None for a running server."""

    load_s: float | None
    cold_start_s: float | None
    server: dict[str, JsonValue]
    sigmas: list[float]


class MemorySeen(_Line):
    """Of one server process, when its memory was no longer watched."""

    load: dict[str, int]
    steady: dict[str, int]
    reported: dict[str, int]
    num_samples: int


class Timed(_Line):
    """A timed request: which of the variant's slots, in which group of servers."""

    group: int
    slot: int
    request: RequestRecord


class LoadDone(_Line):
    """A load test: its place in the profile's list."""

    place: int
    result: LoadRecord


class Entry(_Line):
    """One line: exactly one of these."""

    started: Started | None = None
    warmup: list[float] | None = None
    picture: RequestRecord | None = None
    timed: Timed | None = None
    load: LoadDone | None = None
    probe: GuidanceProbe | None = None
    memory: MemorySeen | None = None
    gpu: GpuActivity | None = None
    flag: Flag | None = None
    other_seed: str | None = None  # digest of the first prompt's picture with the next seed


@dataclass
class Progress:
    """Everything the journal knows of one variant. Every change is on disk before it is here."""

    path: Path
    started: Started | None = None
    warmup: list[float] = field(default_factory=list)
    pictures: list[RequestRecord] = field(default_factory=list)
    timed: dict[tuple[int, int], RequestRecord] = field(default_factory=dict)
    loads: dict[int, LoadRecord] = field(default_factory=dict)
    probe: GuidanceProbe | None = None
    memory: list[MemorySeen] = field(default_factory=list)
    gpu: list[GpuActivity] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    other_seed: str | None = None

    @property
    def requests(self) -> list[RequestRecord]:
        """Untimed and timed, in the order they were sent."""
        rows = [*self.pictures, *self.timed.values()]
        return sorted(rows, key=lambda row: row.position)

    def write(self, entry: Entry) -> None:
        """Append and flush to the disk: a kill right after loses nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(entry.model_dump_json(exclude_unset=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(entry)

    def flag(self, kind: str, text: str) -> None:
        """Once: the same words are not repeated."""
        flag = Flag(kind=kind, text=text)
        if flag not in self.flags:
            self.write(Entry(flag=flag))

    def _take(self, entry: Entry) -> None:
        self.started = self.started or entry.started
        self.warmup += entry.warmup or []
        self.probe = entry.probe or self.probe
        self.other_seed = entry.other_seed or self.other_seed
        self.pictures += [entry.picture] if entry.picture else []
        self.memory += [entry.memory] if entry.memory else []
        self.gpu += [entry.gpu] if entry.gpu else []
        self.flags += [entry.flag] if entry.flag else []
        if entry.timed:
            self.timed[entry.timed.group, entry.timed.slot] = entry.timed.request
        if entry.load:
            self.loads[entry.load.place] = entry.load.result


def read_progress(path: Path) -> Progress:
    """The variant's progress; a fresh one when there is none. Raises ZImageError when damaged."""
    progress = Progress(path)
    if not path.exists():
        return progress
    text = path.read_text(encoding="utf-8")
    whole, cut, rest = text.rpartition("\n")
    if rest:  # a kill cut this line short: what it was about is done again
        path.write_text(whole + cut, encoding="utf-8")
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            progress._take(Entry.model_validate_json(line))
        except ValidationError as error:
            raise ZImageError(
                f"{path}, line {number} is damaged: {error.errors()[0]['msg']}",
                hint="remove the file to measure this variant again",
            ) from None
    return progress


class Journal:
    """The journal of one run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def server_notes(self) -> Path:
        """Where the servers that this run has started are written down."""
        return self.folder / "servers.txt"

    def open(self, plan: dict[str, JsonValue]) -> bool:
        """Begin, or go on with the same plan (True). Raises ZImageError for another plan."""
        path = self.folder / "plan.json"
        if path.exists():
            differing = list(_differences(_read(path), plan))
            if differing:
                raise ZImageError(
                    f"{self.folder.parent} holds another run: it differs in "
                    + ", ".join(differing),
                    hint="choose another --out, or remove that folder to measure again",
                )
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
        return False

    def progress(self, pass_name: str, variant: str) -> Progress:
        return read_progress(self.folder / plain(pass_name) / f"{plain(variant)}.jsonl")


def plain(name: str) -> str:
    """A policy as a file name: `full[0-14]` has brackets."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def _read(path: Path) -> dict[str, JsonValue]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ZImageError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ZImageError(f"{path} holds no plan of a benchmark")
    return raw


def _differences(old: dict[str, JsonValue], new: dict[str, JsonValue]) -> Iterator[str]:
    # Through JSON, so that a tuple equals the list that it is read back as.
    fresh = json.loads(json.dumps(new))
    for key in dict.fromkeys([*old, *fresh]):
        if old.get(key) != fresh.get(key):
            yield key
