"""One device, one thread, one bounded queue of jobs; a job is one picture to draw by an engine.

The thread walks step by step. At every boundary finished pictures leave and the next in turn may
join, if it has the shape of those that run and there are fewer than `max_batch`; one step of all of
them is one forward. Nobody is overtaken: while the next one cannot join, nobody does.

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
from functools import partial

import torch

from zimage_fp8.errors import ZImageError
from zimage_fp8.serve.job import Job, JobCancelled, Order
from zimage_fp8.serve.pace import Pace
from zimage_fp8.serve.turns import Turns

log = logging.getLogger(__name__)

# OpenAI's client waits for retry-after up to 120 s and does not retry at all beyond it.
MAX_RETRY_AFTER_S = 120


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


def probe_device() -> None:
    """Raise what CUDA says when an earlier kernel broke its context: that is for good."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


# After these nothing is broken; after any other failure the device is probed.
HARMLESS = (ZImageError, JobCancelled)


class JobQueue:
    """Jobs in turns. At most `max_waiting` wait before newcomers are turned away, and at most
    `max_batch` are drawn at once."""

    def __init__(
        self,
        max_waiting: int,
        max_batch: int = 1,
        probe: Callable[[], None] = probe_device,
    ) -> None:
        self.max_waiting = max_waiting
        self.max_batch = max_batch
        self.pace = Pace()
        self._probe = probe
        self._waiting: Turns[Job] = Turns()
        self._running: list[Job] = []
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
        return len(self._running)

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
        while self._gather():
            self._draw()
            with self._changed:
                self._running = self._alive()

    def _gather(self) -> bool:
        """Wait for work, and let join who may. False when nothing is left and nothing will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or len(self._waiting) or self._closed)
            while len(self._waiting) and self._may_join(next(iter(self._waiting))):
                job = self._waiting.pop()
                job.order.has_begun = True
                self._running.append(job)
            return bool(self._running)

    def _may_join(self, job: Job) -> bool:
        if not self._running:
            return True
        if len(self._running) == self.max_batch:
            return False
        first = self._running[0]
        return job.engine is first.engine and job.shape == first.shape

    def _alive(self) -> list[Job]:
        return [job for job in self._running if not job.future.done()]

    def _draw(self) -> None:
        """Every running picture by one step; newcomers begin, finished ones are completed."""
        began, company = time.perf_counter(), len(self._running)
        for job in self._alive():
            if not job.has_begun:
                self._attempt(job, job.begin)
        self._step(self._alive())
        for job in self._alive():
            self._attempt(job, job.after_step)
        share_s = (time.perf_counter() - began) / company
        for job in self._alive():
            job.spent_s += share_s
        for job in self._alive():
            if job.drawing.is_done:
                self._attempt(job, partial(self._finish, job))

    def _step(self, jobs: Sequence[Job]) -> None:
        """Together; after a failure one by one, to fail those that fail alone."""
        if not jobs:
            return
        try:
            jobs[0].engine.step([job.drawing for job in jobs])
        except BaseException as error:  # noqa: BLE001  the waiting client must hear of all of them
            if len(jobs) == 1:
                self._fail(jobs[0], error)
            else:
                log.warning("a step of %d pictures failed, now one by one: %s", len(jobs), error)
                for job in jobs:
                    self._step([job])

    def _finish(self, job: Job) -> None:
        """Complete the future, after the pace has learnt how long it took."""
        began = time.perf_counter()
        image = job.engine.finish(job.drawing)
        job.spent_s += time.perf_counter() - began
        if not job.is_warm_up:
            self.pace.learn(job, job.spent_s)
        job.future.set_result(image)

    def _attempt(self, job: Job, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001  the waiting client must hear of all of them
            self._fail(job, error)

    def _fail(self, job: Job, error: BaseException) -> None:
        job.future.set_exception(error)
        self._doubt_device(error)

    def _doubt_device(self, error: BaseException) -> None:
        """Give up when the device is broken."""
        if isinstance(error, HARMLESS):
            return
        try:
            self._probe()
        except Exception as lost:  # noqa: BLE001  whatever it says, it does not work
            log.critical("the device is lost, start this server again: %s", lost)
            self._refuse_waiting(EngineLost, lambda job: False)
