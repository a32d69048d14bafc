"""One variant being measured: its server, its client, its progress on disk."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from pydantic import JsonValue

from zimage_fp8.bench.engines import Engine, Start
from zimage_fp8.bench.gpu import Activity, Driver
from zimage_fp8.bench.journal import Entry, Journal, MemorySeen, Started, Timed, plain
from zimage_fp8.bench.launch import Server, free_port, note_process, start_server, stop_server
from zimage_fp8.bench.load import Client, Drawn, Work
from zimage_fp8.bench.memory import GpuMonitor, Sampler, probes_for
from zimage_fp8.bench.quality import check_picture, pixel_digest
from zimage_fp8.bench.record import MEMORY_METHODS, Parameters, RequestRecord
from zimage_fp8.bench.workload import Slot
from zimage_fp8.errors import ZImageError

DIGITS = 6  # of seconds in a record: microseconds
OnStage = Callable[[str, str], None]  # (variant, what it does now), before each piece of work


@dataclass(frozen=True)
class Subject:
    """What is measured as one row. engine and start: how to start it; url: where it runs already.

    shown: the command in names that mean the same everywhere. extra: further fields of requests.
    """

    name: str
    policy: str
    summary: str
    engine_name: str
    shown: list[str]
    engine: Engine | None = None
    start: Start | None = None
    url: str | None = None
    floor: Literal["rerun", "attention", "next_seed"] | None = None
    extra: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def seed_offset(self) -> int:
        return 1 if self.floor == "next_seed" else 0


@dataclass
class Setting:
    """What all sessions of a pass share. num_sent and began: for the order of requests."""

    pass_name: str
    parameters: Parameters
    out: Path
    journal: Journal
    driver: Driver | None
    on_stage: OnStage
    num_sent: int = 0
    began: float = field(default_factory=time.perf_counter)

    def work(self, slot: Slot, seed_offset: int = 0) -> Work:
        parameters = self.parameters
        return Work(
            prompt=parameters.prompts[slot.prompt],
            seed=parameters.seeds[slot.prompt] + seed_offset,
            size=slot.size,
            steps=parameters.steps,
            guidance=parameters.guidance,
        )

    def warm_work(self, size: str) -> Work:
        """The first prompt with the seed before its own, and with a full stop.

        The length of its caption is the same as a rule, but its text is no timed request's: a
        server that remembers encoded prompts would skip a stage there.
        """
        parameters = self.parameters
        seed, prompt = max(0, parameters.seeds[0] - 1), f"{parameters.prompts[0]}."
        return Work(prompt, seed, size, parameters.steps, parameters.guidance)


class Session:
    """A started server, until `close`. Raises ZImageError when it fails, with its log's end."""

    def __init__(self, subject: Subject, setting: Setting) -> None:
        self.subject, self.setting = subject, setting
        self.progress = setting.journal.progress(setting.pass_name, subject.name)
        self.server: Server | None = None
        self.sampler: Sampler | None = None
        self.activity = Activity()
        self.last_nfe: int | None = None
        self._load_s: float | None = None
        self._last_energy_j: float | None = None
        self._reported: dict[str, int] = {}
        self._monitor = GpuMonitor(setting.driver) if setting.driver else None
        try:
            self.client = Client(self._start(), subject.extra)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> str:
        """Have a server at hand; where it is."""
        self.setting.on_stage(self.subject.name, "starting")
        if self.subject.url is not None:
            return self.subject.url
        assert self.subject.engine
        assert self.subject.start
        port, driver = free_port(), self.setting.driver
        command = self.subject.engine.command(replace(self.subject.start, port=port))
        log = self.setting.out / "logs" / plain(self.setting.pass_name)
        self.server = start_server(command, port, log / f"{plain(self.subject.name)}.log", driver)
        note_process(self.server.pid, self.setting.journal.server_notes)
        self.sampler = Sampler(probes_for(self.server.pid, driver))
        self._load_s = self.server.wait_until_healthy()
        self.sampler.phase = "steady"
        return self.server.url

    def ask(self, work: Work) -> Drawn:
        """One picture. The first one of a start tells how long a cold start takes."""
        self.setting.num_sent += 1
        before_j = self.energy_j()
        try:
            drawn = self.client.draw(work)
            after_j = self.energy_j()
            flaws = check_picture(drawn.png, work.size)
        except ZImageError as error:
            raise self.failure(error) from None
        for kind, text in flaws:
            self.progress.flag(kind, f"{text} (prompt: {work.prompt[:60]!r}, {work.size}).")
        self._last_energy_j = None
        if before_j is not None and after_j is not None:
            self._last_energy_j = after_j - before_j
        self.last_nfe = drawn.facts.nfe
        for method, peak in drawn.facts.peak_memory_bytes.items():
            # Some count since their start, others (vLLM-Omni) anew for every request.
            self._reported[method] = max(peak, self._reported.get(method, 0))
        if self.progress.started is None:
            self.progress.write(Entry(started=self._started(drawn)))
        return drawn

    def energy_j(self) -> float | None:
        """Of the GPU since it was switched on; None where nobody counts."""
        return self.setting.driver.energy_j() if self.setting.driver else None

    def _started(self, drawn: Drawn) -> Started:
        server, facts = self.server, drawn.facts
        cold_s = time.perf_counter() - server.started if server else None
        return Started(
            load_s=self._load_s, cold_start_s=cold_s, server=facts.server, sigmas=facts.sigmas
        )

    def failure(self, error: ZImageError) -> ZImageError:
        """The error, with the end of the server's log where there is one."""
        name = self.subject.name
        if self.server:
            return self.server.failure(f"{name}: {error}")
        return ZImageError(f"{name} at {self.subject.url}: {error}")

    def draw(self, slot: Slot) -> None:
        """One untimed picture into the journal."""
        self.progress.write(Entry(picture=self._row(slot, is_timed=False)))

    def draw_timed(self, group: int, place: int, slot: Slot) -> None:
        """One timed picture into the journal; clocks are watched meanwhile."""
        if self._monitor:
            self._monitor.activity = self.activity
        try:
            request = self._row(slot, is_timed=True)
        finally:
            if self._monitor:
                self._monitor.activity = None
        self.progress.write(Entry(timed=Timed(group=group, slot=place, request=request)))

    def _row(self, slot: Slot, *, is_timed: bool) -> RequestRecord:
        work = self.setting.work(slot, self.subject.seed_offset)
        position, sent_s = self.setting.num_sent, time.perf_counter() - self.setting.began
        drawn = self.ask(work)
        sha256 = pixel_digest(drawn.png)
        return RequestRecord(
            prompt=slot.prompt,
            size=slot.size,
            seed=work.seed,
            is_timed=is_timed,
            position=position,
            sent_s=round(sent_s, DIGITS),
            latency_s=round(drawn.latency_s, DIGITS),
            nfe=drawn.facts.nfe,
            timings_s={name: round(s, DIGITS) for name, s in drawn.facts.timings_s.items()},
            energy_j=self._last_energy_j,
            picture=self._save(slot, drawn.png, sha256),
            sha256=sha256,
        )

    def check_seed(self) -> None:
        """Draw the first prompt with the next seed, once: another picture must come of it."""
        if self.progress.other_seed is not None:
            return
        self.setting.on_stage(self.subject.name, "checking the seed")
        work = self.setting.work(Slot(0, self.setting.parameters.size), 1)
        self.progress.write(Entry(other_seed=pixel_digest(self.ask(work).png)))

    def _save(self, slot: Slot, png: bytes, sha256: str) -> str:
        """Write the picture unless its pixels are there; its path from the record's folder."""
        same_slot = [row for row in self.progress.requests if (row.prompt, row.size) == tuple(slot)]
        for row in same_slot:
            if row.sha256 == sha256:
                return row.picture
        if same_slot:
            self.progress.flag(
                "not_repeatable",
                f"Prompt {slot.prompt} at {slot.size} gave different pictures when asked again.",
            )
        again = f"-again{len(same_slot)}" if same_slot else ""
        folder = Path("pictures", plain(self.setting.pass_name), plain(self.subject.name))
        picture = folder / f"prompt{slot.prompt}-{slot.size}{again}.png"
        path = self.setting.out / picture
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(png)
        partial.replace(path)
        return picture.as_posix()

    def warm_up(self) -> None:
        """At every size, until latency has settled or the profile's patience is spent."""
        parameters = self.setting.parameters
        for size in parameters.sizes:
            latencies: list[float] = []
            while not _is_warm(latencies, parameters):
                self.setting.on_stage(self.subject.name, f"warm-up {len(latencies) + 1}, {size}")
                latencies.append(self.ask(self.setting.warm_work(size)).latency_s)
            tolerance = parameters.warm_tolerance
            if tolerance and not is_settled(latencies, parameters.warmup, tolerance):
                self.progress.flag(
                    "unsettled",
                    f"At {size} the medians of the last warm-up requests still differed by more "
                    f"than {tolerance:.0%} after {len(latencies)} requests.",
                )
            if latencies:
                self.progress.write(Entry(warmup=latencies))

    def peak_bytes(self) -> int:
        """The most memory seen so far, by the best method that sees any; 0 for none."""
        if self.sampler is None:
            return 0
        load, steady = self.sampler.peaks("load"), self.sampler.peaks("steady")
        known = [method for method in MEMORY_METHODS if load.get(method) or steady.get(method)]
        return max((one.get(known[0], 0) for one in (load, steady)), default=0) if known else 0

    def require_alive(self) -> None:
        """Raise ZImageError when the server has ended, as one that ran out of memory has."""
        if self.server and (code := self.server.process.poll()) is not None:
            raise self.server.failure(f"the server ended with exit code {code} under load")

    def end_sampling(self) -> None:
        """Write down the memory seen so far; later readings would count other servers' work."""
        if self.sampler:
            self.sampler.stop()
            seen = MemorySeen(
                load=self.sampler.peaks("load"),
                steady=self.sampler.peaks("steady"),
                reported=self._reported,
                num_samples=self.sampler.num_samples,
            )
            self.sampler = None
        elif self._reported and not self.progress.memory:
            seen = MemorySeen(load={}, steady={}, reported=self._reported, num_samples=0)
        else:
            return
        self.progress.write(Entry(memory=seen))

    def close(self) -> None:
        """Note the clocks, end the server and see that it leaves nothing behind."""
        if (gpu := self.activity.summary()) is not None:
            self.progress.write(Entry(gpu=gpu))
        for sentence in self._end():
            self.progress.flag("memory_not_returned", sentence)

    def _end(self) -> list[str]:
        if self._monitor:
            self._monitor.stop()
        if self.sampler:
            self.sampler.stop()
        if hasattr(self, "client"):
            self.client.close()
        return stop_server(self.server, self.setting.driver) if self.server else []


def _is_warm(latencies: list[float], parameters: Parameters) -> bool:
    tolerance = parameters.warm_tolerance
    if tolerance is None:
        return len(latencies) >= parameters.warmup
    if len(latencies) >= parameters.max_warmup:
        return True
    return is_settled(latencies, parameters.warmup, tolerance)


def is_settled(latencies: list[float], group: int, tolerance: float) -> bool:
    """Whether the medians of the last two groups of `group` latencies agree within a share."""
    if len(latencies) < 2 * group:
        return False
    before = statistics.median(latencies[-2 * group : -group])
    after = statistics.median(latencies[-group:])
    return abs(after - before) <= tolerance * before
