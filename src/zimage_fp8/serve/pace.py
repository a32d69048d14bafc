"""How long drawing takes, learnt from what was drawn: for Retry-After and for deadlines.

Work is counted in forwards times pixels. That is coarse (attention grows faster than pixels), but
a server mostly draws one size, and every finished picture corrects the estimate.
"""

import time
from collections.abc import Iterable
from typing import Protocol

from zimage_fp8.model.pipeline import ImageRequest

WEIGHT_OF_LAST = 0.3


class HasWork(Protocol):
    @property
    def work(self) -> int: ...


def work_of(request: ImageRequest) -> int:
    forwards = request.steps * (2 if request.guidance else 1)
    return forwards * request.width * request.height


class Pace:
    """Seconds per unit of work, a running mean. Until something was drawn, every estimate is 0."""

    def __init__(self) -> None:
        self._seconds_per_work: float | None = None
        self._begun = 0.0

    def begin(self, now: float) -> None:
        """A job starts."""
        self._begun = now

    def learn(self, job: HasWork, took_s: float) -> None:
        last = took_s / job.work
        if self._seconds_per_work is None:
            self._seconds_per_work = last
        self._seconds_per_work += WEIGHT_OF_LAST * (last - self._seconds_per_work)

    def estimate_s(self, jobs: Iterable[HasWork], running: HasWork | None = None) -> float:
        """Seconds to draw `jobs`, and before them what is left of the running one."""
        pace = self._seconds_per_work or 0.0
        left_s = 0.0
        if running:
            left_s = max(0.0, running.work * pace - (time.perf_counter() - self._begun))
        return left_s + sum(job.work for job in jobs) * pace
