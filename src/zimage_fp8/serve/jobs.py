"""One engine, one thread, one bounded queue of jobs; a job is one picture to draw.

Whatever happens to a job, its future is completed: with the picture, or with the exception that
stopped it. A job is cancelled before it starts or at its next step boundary, so that a client who
left costs at most one step. `drain` refuses what has not begun, `close` finishes the rest and ends
the thread.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from zimage_fp8.model.pipeline import GeneratedImage, ImageRequest, Previews
from zimage_fp8.serve.pace import Pace, work_of

# OpenAI's client waits for retry-after up to 120 s and does not retry at all beyond it.
MAX_RETRY_AFTER_S = 120


class Engine(Protocol):
    """What the server asks of a pipeline. `generate` is only ever called by one thread."""

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


class Job:
    """One picture to draw. `queued_s` is its wait in the queue, known once it runs."""

    def __init__(self, request: ImageRequest, previews: Previews | None = None) -> None:
        self.request = request
        self.previews = previews
        self.future: Future[GeneratedImage] = Future()
        self.queued_s = 0.0
        self.work = work_of(request)
        self.order: object = None  # what the jobs of one request share
        self._submitted = time.perf_counter()
        self._unwanted = threading.Event()

    @property
    def is_unwanted(self) -> bool:
        return self._unwanted.is_set()

    def cancel(self) -> None:
        """Nobody waits for this picture any more. No effect on a finished job."""
        self._unwanted.set()

    def run(self, engine: Engine, pace: Pace) -> None:
        """Complete the future, after `pace` has learnt how long that took."""
        if not self.future.set_running_or_notify_cancel():
            return
        started = time.perf_counter()
        self.queued_s = started - self._submitted
        pace.begin(started)
        try:
            self._stop_if_unwanted(0, self.request.steps)
            image = engine.generate(self.request, self._stop_if_unwanted, self.previews)
        except BaseException as error:  # noqa: BLE001  the waiting client must hear of all of them
            self.future.set_exception(error)
            return
        pace.learn(self, time.perf_counter() - started)
        self.future.set_result(image)

    def _stop_if_unwanted(self, done: int, total: int) -> None:
        if self.is_unwanted:
            raise JobCancelled(f"stopped after step {done} of {total}: the client is gone")


class JobQueue:
    """Jobs in order of arrival. At most `max_waiting` wait before newcomers are turned away."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self.pace = Pace()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._begun = object()  # the order of the last job that began
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_closed(self) -> bool:
        return self._closed

    @property
    def num_waiting(self) -> int:
        with self._changed:
            return len(self._wanted())

    @property
    def num_running(self) -> int:
        return int(self._running is not None)

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: Sequence[Job], patience_s: float | None = None) -> None:
        """Queue all jobs of one request or none.

        patience_s: how long the client waits for all of them. Raises QueueFull, TooSlow, or
        QueueClosed.
        """
        with self._changed:
            if self._closed:
                raise QueueClosed
            waiting = self._wanted()
            if len(waiting) >= self.max_waiting:
                until_next = self.pace.estimate_s([], self._running)
                raise QueueFull(f"{len(waiting)} pictures are waiting already", until_next)
            if patience_s is not None:
                self._refuse_if_too_slow(jobs, waiting, patience_s)
            order = object()
            for job in jobs:
                job.order = order
            self._waiting.extend(jobs)
            self._changed.notify()

    def drain(self) -> None:
        """Take nothing new, and refuse every request of which no picture has begun."""
        with self._changed:
            self._closed = True
            refused = [job for job in self._waiting if job.order is not self._begun]
            self._waiting = deque(job for job in self._waiting if job.order is self._begun)
            self._changed.notify()
        for job in refused:
            if job.future.set_running_or_notify_cancel():
                job.future.set_exception(QueueClosed())

    def close(self) -> None:
        """Finish what was accepted, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _wanted(self) -> list[Job]:
        return [job for job in self._waiting if not job.is_unwanted]

    def _refuse_if_too_slow(
        self, jobs: Sequence[Job], waiting: Sequence[Job], patience_s: float
    ) -> None:
        alone_s = self.pace.estimate_s(jobs)
        in_all_s = self.pace.estimate_s([*waiting, *jobs], self._running)
        if in_all_s > patience_s:
            is_hopeless = alone_s > patience_s  # even an idle server would be too slow
            raise TooSlow(
                f"this would take about {in_all_s:.1f} s, and the client waits {patience_s:g} s",
                None if is_hopeless else in_all_s - patience_s,
            )

    def _work(self) -> None:
        while job := self._next_job():
            job.run(self.engine, self.pace)
            self._running = None

    def _next_job(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            job = self._waiting.popleft()
            self._running, self._begun = job, job.order
            return job
