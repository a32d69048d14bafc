"""Measuring: every variant in a fresh server process over HTTP, in turns where memory allows.

One pass is one table. Each server is first measured alone while the others are idle (loading,
warm-up, pictures, memory, load tests), then the timed requests go round: A B C C B A, so that a
GPU that grows warm or slow does so for all. Where not all servers fit, they come in groups, each
with the reference; where not even two fit, one is measured after the other.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import psutil

from zimage_fp8.bench.journal import Entry, LoadDone, Progress, plain
from zimage_fp8.bench.load import Work
from zimage_fp8.bench.probe import judge, probe
from zimage_fp8.bench.profile import Profile
from zimage_fp8.bench.record import FailedVariant, LoadRecord, Parameters
from zimage_fp8.bench.session import Session, Setting, Subject
from zimage_fp8.bench.throughput import closed_loop, open_loop
from zimage_fp8.bench.workload import Slot, picture_slots, timed_slots
from zimage_fp8.errors import ZImageError

ROOM = 0.9  # of the free memory; the rest is for what a server may need beyond the largest seen
GIB = 2**30

NO_REFERENCE = "not measured: the reference failed"
BY_PROFILE = "The profile asks for one variant after the other."


@dataclass
class Outcome:
    """What a pass came to: who failed, and the order that it took."""

    failures: list[FailedVariant] = field(default_factory=list)
    is_interleaved: bool = False
    order_reason: str = BY_PROFILE

    def fail(self, subject: Subject, error: str) -> None:
        failed = FailedVariant(
            name=subject.name, policy=subject.policy, floor=subject.floor, error=error
        )
        self.failures.append(failed)

    def has_failed(self, subject: Subject) -> bool:
        return any(failed.name == subject.name for failed in self.failures)


@dataclass(frozen=True)
class _Order:
    """How many servers fit beside the reference, and why, in a sentence."""

    room: int
    reason: str


class PassRun:
    """The measuring of one pass. The first subject is the reference of all others."""

    def __init__(self, profile: Profile, setting: Setting, subjects: Sequence[Subject]) -> None:
        self.profile, self.setting = profile, setting
        self.reference, *self.others = [one for one in subjects if one.floor is None]
        self.floors = [one for one in subjects if one.floor is not None]
        self.timed = timed_slots(setting.parameters)
        self.every = picture_slots(setting.parameters, is_repeated=True)
        self.pictures = picture_slots(setting.parameters, is_repeated=profile.draw_before_timing)
        self.outcome = Outcome()
        self._go_on_counting(subjects)

    def _go_on_counting(self, subjects: Sequence[Subject]) -> None:
        """After an interruption positions and seconds go on where they were."""
        rows = [row for subject in subjects for row in self.progress(subject).requests]
        if rows:
            self.setting.num_sent = 1 + max(row.position for row in rows)
            self.setting.began -= max(row.sent_s or 0.0 for row in rows)

    def run(self) -> Outcome:
        """Measure whatever the journal lacks. A variant that fails is noted, not raised."""
        if self.profile.order == "interleaved" and self.others:
            self._in_turns()
        else:
            self._one_by_one([self.reference, *self.others])
        for floor in self.floors:
            if self.outcome.has_failed(self.reference):
                self.outcome.fail(floor, NO_REFERENCE)
            else:
                self._pictures_only(floor)
        return self.outcome

    def is_done(self) -> bool:
        """Whether the journal has everything, so that `run` would start no server."""
        if not all(map(self._is_floor_done, self.floors)):
            return False
        if self.profile.order == "interleaved" and self.others:
            order = self._kept_order()
            return order is not None and not self._is_pending(order.room)
        return all(self._is_done(one, group=0) for one in (self.reference, *self.others))

    def progress(self, subject: Subject) -> Progress:
        """As it is on disk now."""
        return self.setting.journal.progress(self.setting.pass_name, subject.name)

    def _one_by_one(self, subjects: Sequence[Subject]) -> None:
        for subject in subjects:
            if self.outcome.has_failed(self.reference):
                self.outcome.fail(subject, NO_REFERENCE)
            elif not self._is_done(subject, group=0):
                with self._failing(subject), Session(subject, self.setting) as session:
                    self._alone(session)
                    for place in range(len(self.timed)):
                        self._draw_timed(session, 0, place)
                    self._check(session)
                    session.end_sampling()

    def _pictures_only(self, subject: Subject) -> None:
        """A noise floor: it is looked at, not timed."""
        if self._is_floor_done(subject):
            return
        with self._failing(subject), Session(subject, self.setting) as session:
            session.warm_up()
            self._draw(session, self.every)
            session.end_sampling()

    def _is_floor_done(self, subject: Subject) -> bool:
        progress = self.progress(subject)
        return _is_watched(subject, progress) and not _undrawn(progress, self.every)

    def _in_turns(self) -> None:
        """The reference alive throughout, the others in groups as large as memory allows."""
        order = self._kept_order()
        if order and not self._is_pending(order.room):
            self._note_order(order)
            return
        with self._failing(self.reference), Session(self.reference, self.setting) as base:
            self._alone(base)
            self._check(base)
            if order is None:
                order = self._choose_order(base)
                self._order_path.write_text(json.dumps(asdict(order)))
            base.end_sampling()
            self._note_order(order)
            for number, group in enumerate(_chunks(self.others, order.room)):
                self._group(number, base, group)
            if not order.room:
                for place in range(len(self.timed)):
                    self._draw_timed(base, 0, place)
        if self.outcome.has_failed(self.reference) or not (order and order.room):
            self._one_by_one(self._unfinished())

    @property
    def _order_path(self) -> Path:
        return self.setting.journal.folder / plain(self.setting.pass_name) / "order.json"

    def _kept_order(self) -> _Order | None:
        path = self._order_path
        return _Order(**json.loads(path.read_text())) if path.exists() else None

    def _unfinished(self) -> list[Subject]:
        return [one for one in self.others if not self.outcome.has_failed(one)]

    def _group(self, number: int, base: Session, group: Sequence[Subject]) -> None:
        """Start the group's servers, measure each alone, then all in turns with the reference."""
        with ExitStack() as stack:
            alive = [base]
            for subject in group:
                if self._is_done(subject, number):
                    continue
                with self._failing(subject):
                    session = stack.enter_context(Session(subject, self.setting))
                    self._alone(session)
                    self._check(session)
                    session.end_sampling()
                    alive.append(session)
            for place in range(len(self.timed)):
                in_turn = alive if place % 2 == 0 else alive[::-1]
                for session in list(in_turn):
                    if session is base:
                        self._draw_timed(session, number, place)
                        continue
                    with self._failing(session.subject):
                        self._draw_timed(session, number, place)
                alive = [one for one in alive if not self.outcome.has_failed(one.subject)]

    def _alone(self, session: Session) -> None:
        """What is measured while all other servers are idle."""
        session.warm_up()
        self._draw(session, self.pictures)
        if self.profile.load:
            self._load(session)

    def _draw(self, session: Session, slots: Sequence[Slot]) -> None:
        missing = _undrawn(session.progress, slots)
        for number, slot in enumerate(missing, 1):
            self._stage(session, f"picture {number} of {len(missing)}")
            session.draw(slot)

    def _draw_timed(self, session: Session, group: int, place: int) -> None:
        if (group, place) in session.progress.timed:
            return
        self._stage(session, f"run {place + 1} of {len(self.timed)}")
        session.draw_timed(group, place, self.timed[place])

    def _check(self, session: Session) -> None:
        """Does it obey the seed, and guidance? After the timed requests, where that is possible:
        their prompts would be remembered."""
        session.check_seed()
        self._probe(session)

    def _probe(self, session: Session) -> None:
        """Where the profile asks for it, and for every server that does not count forwards."""
        is_told = session.last_nfe is not None
        if session.progress.probe or (is_told and not self.profile.probe_guidance):
            return
        size = self.setting.parameters.sizes[0]
        try:
            found = probe(session, self.setting.warm_work(size))
        except ZImageError as error:  # such as a server that knows no guidance
            session.require_alive()
            reason = str(error).splitlines()[0]
            session.progress.flag(
                "unprobed", f"Whether guidance runs unasked could not be checked: {reason}"
            )
            return
        session.progress.write(Entry(probe=found))
        for flag in judge(found):
            session.progress.flag(flag.kind, flag.text)

    def _load(self, session: Session) -> None:
        """The profile's load tests, under the same rates and the same SLO for every variant."""
        plan = self.profile.load
        assert plan
        size = self.setting.parameters.sizes[0]
        base_s = median(
            row.latency_s for row in self.progress(self.reference).pictures if row.size == size
        )
        for place, number in enumerate((*plan.concurrency, *plan.rates)):
            if place in session.progress.loads:
                continue
            is_closed = place < len(plan.concurrency)
            self._stage(session, f"{number:g} clients" if is_closed else f"{number:g} of capacity")
            works = _load_works(self.setting, plan.requests, place)
            before_j = session.energy_j()
            slo_s = plan.slo * base_s
            result = (
                closed_loop(session.client, works, int(number), slo_s)
                if is_closed
                else open_loop(session.client, works, number / base_s, slo_s)
            )
            self.setting.num_sent += len(works)
            self._keep_load(session, place, result, before_j)

    def _keep_load(
        self, session: Session, place: int, result: LoadRecord, before_j: float | None
    ) -> None:
        after_j = session.energy_j()
        if before_j is not None and after_j is not None:
            result = result.model_copy(update={"energy_j": after_j - before_j})
        session.progress.write(Entry(load=LoadDone(place=place, result=result)))
        if result.failures:
            reason, count = next(iter(result.failures.items()))
            how = f"{result.concurrency} clients" if result.concurrency else "random arrivals"
            session.progress.flag(
                "failed_requests",
                f"With {how} {sum(result.failures.values())} requests failed, {count} of them: "
                f"{reason}.",
            )
        session.require_alive()

    def _choose_order(self, base: Session) -> _Order:
        """How many more servers fit beside the reference, and why, for the record."""
        if base.server is None:
            return _Order(len(self.others), "All servers were running already.")
        need, free = base.peak_bytes(), self._free_bytes()
        room = min(int(free * ROOM / need), len(self.others)) if need else 0
        numbers = f"one needs up to {need / GIB:.2f} GiB, {free / GIB:.2f} GiB are free beside it"
        if not room:
            return _Order(0, f"Not two servers fit at once: {numbers}.")
        if room == len(self.others):
            return _Order(room, f"All {room + 1} servers were alive: {numbers}.")
        return _Order(room, f"In groups of {room} with the reference: {numbers}.")

    def _free_bytes(self) -> int:
        driver = self.setting.driver
        used = driver.used_bytes() if driver else None
        total = driver.describe().memory_bytes if driver else None
        if used is None or total is None:  # a CPU, or a GPU that shares its memory with one
            return int(psutil.virtual_memory().available)
        return total - used

    def _note_order(self, order: _Order) -> None:
        self.outcome.is_interleaved = order.room > 0
        self.outcome.order_reason = order.reason

    def _is_pending(self, room: int) -> bool:
        groups = list(_chunks(self.others, room))
        pairs = [(one, number) for number, group in enumerate(groups) for one in group]
        pairs += [(self.reference, number) for number in range(max(1, len(groups)))]
        if not room:
            pairs += [(one, 0) for one in self.others]
        return not all(self._is_done(subject, number) for subject, number in pairs)

    def _is_done(self, subject: Subject, group: int) -> bool:
        """Whether the journal has everything of a variant, as far as one group goes."""
        progress = self.progress(subject)
        plan = self.profile.load
        num_loads = len(plan.concurrency) + len(plan.rates) if plan else 0
        return (
            progress.started is not None
            and _is_watched(subject, progress)
            and len(progress.loads) == num_loads
            and not _undrawn(progress, self.pictures)
            and all((group, place) in progress.timed for place in range(len(self.timed)))
        )

    @contextmanager
    def _failing(self, subject: Subject) -> Iterator[None]:
        """A ZImageError inside is this variant's failure, and ends nothing else."""
        try:
            yield
        except ZImageError as error:
            self.outcome.fail(subject, self._without_folders(str(error)))

    def _without_folders(self, text: str) -> str:
        """A server's log names folders of this machine, which mean nothing in a record."""
        places = {self.setting.out.resolve(): "OUT", self.setting.out: "OUT"}
        places |= {Path(sys.prefix): "PYTHON", Path.home(): "~"}
        for folder, name in places.items():
            if len(folder.parts) > 1:  # not `/`, which is everybody's
                text = text.replace(str(folder), name)
        return text

    def _stage(self, session: Session, what: str) -> None:
        self.setting.on_stage(session.subject.name, what)


def _is_watched(subject: Subject, progress: Progress) -> bool:
    """Whether its memory is known, as far as somebody else's running server lets us."""
    return bool(progress.memory) or subject.url is not None


def _undrawn(progress: Progress, slots: Sequence[Slot]) -> list[Slot]:
    drawn = {(row.prompt, row.size) for row in progress.pictures}
    return [slot for slot in slots if slot not in drawn]


def _load_works(setting: Setting, count: int, place: int) -> list[Work]:
    """The next `count` prompts for every test, so that few of them are remembered."""
    parameters: Parameters = setting.parameters
    prompts = len(parameters.prompts)
    size = parameters.sizes[0]
    first = place * count
    return [setting.work(Slot(index % prompts, size)) for index in range(first, first + count)]


def _chunks(subjects: Sequence[Subject], size: int) -> Iterator[Sequence[Subject]]:
    """Groups of `size`; none when that is 0."""
    for first in range(0, len(subjects), size) if size else ():
        yield subjects[first : first + size]
