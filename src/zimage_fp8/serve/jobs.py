"""One device, one thread, one bounded queue of jobs; a job is one picture to draw by an engine.

Whatever happens to a job, its future is completed: with the picture, or with the exception that
stopped it. A job is cancelled before it starts or at its next step boundary, so that a client who
left costs at most one step. `drain` refuses what has not begun, `close` finishes the rest and ends
the thread.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from zimage_fp8.errors import ZImageError
from zimage_fp8.model.pipeline import GeneratedImage, ImageRequest, Previews
from zimage_fp8.serve.pace import Pace, work_of
from zimage_fp8.serve.turns import Turns

log = logging.getLogger(__name__)

# OpenAI's client waits for retry-after up to 120 s and does not retry at all beyond it.
MAX_RETRY_AFTER_S = 120


class Lookups(Protocol):
    """How often a cache had what was asked of it, and had not."""

    hits: int
    misses: int


class Engine(Protocol):
    """What the server asks of a pipeline. `generate` is only ever called by one thread.

    captions: its cache of encoded prompts.
    """

    @property
    def captions(self) -> Lookups: ...

    @property
    def model(self) -> str: ...

    @property
    def policy(self) -> str: ...

    @property
    def default_size(self) -> tuple[int, int]: ...

    def validate(self, request: ImageRequest) -> None: ...

    def num_tokens(self, prompt: str) -> int: ...

    def generate(
        self,
        request: ImageRequest,
        on_step: Callable[[int, int], None] | None = None,
        previews: Previews | None = None,
    ) -> GeneratedImage: ...

    def describe(self) -> dict[str, object]: ...


class JobCancelled(Exception):
    """Raised inside `generate`, at a step boundary, when nobody waits for the picture any more."""


class Overloaded(Exception):
    """Too much to do. `retry_after_s` estimates when it is worth asking again; None is never."""

    def __init__(self, message: str, wait_s: float | None) -> None:
        self.retry_after_s: int | None = None
        if wait_s is not None:
            self.retry_after_s = min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait_s)))
            message = f"{message}; try again in {self.retry_after_s} s"
        super().__init__(message)


class QueueFull(Overloaded):
    """No room."""


class TooSlow(Overloaded):
    """There is room, but the client would have given up before its pictures are drawn."""


class QueueClosed(Exception):
    """The server is shutting down."""


class EngineLost(Exception):
    """The device does not answer any more; only a new process helps."""


Refusal = type[QueueClosed] | type[EngineLost]


@dataclass(eq=False)
class Order:
    """What the jobs of one request share. client: whoever takes turns with others."""

    client: object = None
    has_begun: bool = False


class Job:
    """One picture to draw. `queued_s` is its wait in the queue, known once it runs.

    on_step(done, total) is told of every step boundary, the one before the first step included.
    is_warm_up: the first of its kind takes longer, so the pace learns nothing from it.
    """

    def __init__(
        self,
        request: ImageRequest,
        engine: Engine,
        previews: Previews | None = None,
        on_step: Callable[[int, int], None] | None = None,
        *,
        is_warm_up: bool = False,
    ) -> None:
        self.request = request
        self.engine = engine
        self.previews = previews
        self.on_step = on_step
        self.future: Future[GeneratedImage] = Future()
        self.is_warm_up = is_warm_up
        self.queued_s = 0.0
        self.work = work_of(request)
        self.order = Order()
        self.submitted = time.time()
        self._unwanted = threading.Event()

    @property
    def is_unwanted(self) -> bool:
        return self._unwanted.is_set()

    def cancel(self) -> None:
        """Nobody waits for this picture any more. No effect on a finished job."""
        self._unwanted.set()

    @property
    def client(self) -> object:
        return self.order.client

    def run(self, pace: Pace) -> None:
        """Complete the future, after `pace` has learnt how long that took."""
        if not self.future.set_running_or_notify_cancel():
            return
        started = time.perf_counter()
        self.queued_s = max(0.0, time.time() - self.submitted)
        pace.begin(started)
        try:
            self._stop_if_unwanted(0, self.request.steps_to_run)
            image = self.engine.generate(self.request, self._stop_if_unwanted, self.previews)
            if not self.is_warm_up:
                pace.learn(self, time.perf_counter() - started)
        except BaseException as error:  # noqa: BLE001  the waiting client must hear of all of them
            self.future.set_exception(error)
            return
        self.future.set_result(image)

    def _stop_if_unwanted(self, done: int, total: int) -> None:
        if self.is_unwanted:
            raise JobCancelled(f"stopped after step {done} of {total}: the client is gone")
        if self.on_step:
            self.on_step(done, total)


def probe_device() -> None:
    """Raise what CUDA says when an earlier kernel broke its context: that is for good."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


# After these nothing is broken; after any other failure the device is probed.
HARMLESS = (ZImageError, JobCancelled)


class JobQueue:
    """Jobs in turns. At most `max_waiting` wait before newcomers are turned away."""

    def __init__(self, max_waiting: int, probe: Callable[[], None] = probe_device) -> None:
        self.max_waiting = max_waiting
        self.pace = Pace()
        self._probe = probe
        self._waiting: Turns[Job] = Turns()
        self._running: Job | None = None
        self._closed: Refusal | None = None  # why, when nothing is accepted any more
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    @property
    def num_waiting(self) -> int:
        with self._changed:
            return len(self._wanted())

    @property
    def num_running(self) -> int:
        return int(self._running is not None)

    def start(self) -> None:
        self._thread.start()

    def submit(
        self, jobs: Sequence[Job], client: object = None, patience_s: float | None = None
    ) -> None:
        """Queue all jobs of one request or none.

        client: clients take turns. patience_s: how long this one waits for all of them. Raises
        QueueFull, TooSlow, QueueClosed or EngineLost.
        """
        order = Order(client)
        for job in jobs:
            job.order = order
        with self._changed:
            waiting = self.refuse_if_full()
            if patience_s is not None:
                self._refuse_if_too_slow(jobs, waiting, patience_s)
            self._waiting.add(jobs)
            self._changed.notify()

    def refuse_if_full(self) -> list[Job]:
        """The jobs that wait, if there is room for more. Raises QueueFull and what closed it."""
        with self._changed:
            if self._closed:
                raise self._closed()
            waiting = self._wanted()
            if len(waiting) >= self.max_waiting:
                until_next = self.pace.estimate_s([], self._running)
                raise QueueFull(f"{len(waiting)} pictures are waiting already", until_next)
            return waiting

    def drain(self) -> None:
        """Take nothing new, and refuse every request of which no picture has begun."""
        self._refuse_waiting(QueueClosed, lambda job: job.order.has_begun)

    def close(self) -> None:
        """Finish what was accepted, then end the thread."""
        with self._changed:
            self._closed = self._closed or QueueClosed
            self._changed.notify()
        self._thread.join()

    def _refuse_waiting(self, reason: Refusal, is_kept: Callable[[Job], bool]) -> None:
        with self._changed:
            self._closed = self._closed or reason
            waiting = list(self._waiting)
            self._waiting = Turns(filter(is_kept, waiting))
            self._changed.notify()
        for job in waiting:
            if not is_kept(job) and job.future.set_running_or_notify_cancel():
                job.future.set_exception(reason())

    def _wanted(self) -> list[Job]:
        return [job for job in self._waiting if not job.is_unwanted]

    def _refuse_if_too_slow(
        self, jobs: Sequence[Job], waiting: Sequence[Job], patience_s: float
    ) -> None:
        alone_s = self.pace.estimate_s(jobs)
        in_turn = list(Turns([*waiting, *jobs]))
        before = in_turn[: 1 + max(map(in_turn.index, jobs))]
        in_all_s = self.pace.estimate_s(before, self._running)
        if in_all_s > patience_s:
            is_hopeless = alone_s > patience_s  # even an idle server would be too slow
            raise TooSlow(
                f"this would take about {in_all_s:.1f} s, and the client waits {patience_s:g} s",
                None if is_hopeless else in_all_s - patience_s,
            )

    def _work(self) -> None:
        while job := self._next_job():
            job.run(self.pace)
            self._running = None
            if (error := job.future.exception()) is not None:
                self._doubt_device(error)

    def _next_job(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) or self._closed)
            if not len(self._waiting):
                return None
            self._running = job = self._waiting.pop()
            job.order.has_begun = True
            return job

    def _doubt_device(self, error: BaseException) -> None:
        """Give up when the device is broken."""
        if isinstance(error, HARMLESS):
            return
        try:
            self._probe()
        except Exception as lost:  # noqa: BLE001  whatever it says, it does not work
            log.critical("the device is lost, start this server again: %s", lost)
            self._refuse_waiting(EngineLost, lambda job: False)
