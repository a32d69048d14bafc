"""One engine, one thread, one bounded queue of jobs; a job is one picture to draw.

Whatever happens to a job, its future is completed: with the picture, or with the exception that
stopped it. A job is cancelled before it starts or at its next step boundary, so that a client who
left costs at most one step. `close` finishes what was accepted and ends the thread.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Protocol

from zimage_fp8.model.pipeline import GeneratedImage, ImageRequest

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

    def generate(
        self, request: ImageRequest, on_step: Callable[[int, int], None] | None = None
    ) -> GeneratedImage: ...

    def describe(self) -> dict[str, object]: ...


class JobCancelled(Exception):
    """Raised inside `generate`, at a step boundary, when nobody waits for the picture any more."""


class QueueFull(Exception):
    """No room. `retry_after_s` estimates when there will be some."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} pictures are waiting already; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class QueueClosed(Exception):
    """The server is shutting down."""


class Job:
    """One picture to draw. `queued_s` is its wait in the queue, known once it runs."""

    def __init__(self, request: ImageRequest) -> None:
        self.request = request
        self.future: Future[GeneratedImage] = Future()
        self.queued_s = 0.0
        self._submitted = time.perf_counter()
        self._unwanted = threading.Event()

    @property
    def is_unwanted(self) -> bool:
        return self._unwanted.is_set()

    def cancel(self) -> None:
        """Nobody waits for this picture any more. No effect on a finished job."""
        self._unwanted.set()

    def run(self, engine: Engine) -> bool:
        """Complete the future. True when it holds a picture."""
        if not self.future.set_running_or_notify_cancel():
            return False
        self.queued_s = time.perf_counter() - self._submitted
        try:
            self._stop_if_unwanted(0, self.request.steps)
            self.future.set_result(engine.generate(self.request, on_step=self._stop_if_unwanted))
        except BaseException as error:  # noqa: BLE001  the waiting client must hear of all of them
            self.future.set_exception(error)
            return False
        return True

    def _stop_if_unwanted(self, done: int, total: int) -> None:
        if self.is_unwanted:
            raise JobCancelled(f"stopped after step {done} of {total}: the client is gone")


class JobQueue:
    """Jobs in order of arrival. At most `max_waiting` wait before newcomers are turned away."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine = engine
        self.max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._seconds_per_job = 1.0
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def submit(self, requests: Iterable[ImageRequest]) -> Sequence[Job]:
        """Queue all requests or none. Raises QueueFull or QueueClosed."""
        jobs = [Job(request) for request in requests]
        with self._changed:
            if self._closed:
                raise QueueClosed
            num_waiting = sum(not job.is_unwanted for job in self._waiting)
            if num_waiting >= self.max_waiting:
                raise QueueFull(num_waiting, self._retry_after_s())
            self._waiting.extend(jobs)
            self._changed.notify()
        return jobs

    def close(self) -> None:
        """Finish what was accepted, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while job := self._next_job():
            started = time.perf_counter()
            if job.run(self.engine):
                self._seconds_per_job = time.perf_counter() - started

    def _next_job(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._waiting.popleft() if self._waiting else None

    def _retry_after_s(self) -> int:
        """When one place will be free, judging by the last job."""
        return min(MAX_RETRY_AFTER_S, math.ceil(self._seconds_per_job))
