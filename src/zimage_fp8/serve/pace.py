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
    """Forwards times pixels, and the engine that does them: each has a pace of its own."""

    @property
    def work(self) -> int: ...

    @property
    def engine(self) -> object: ...


def work_of(request: ImageRequest) -> int:
    forwards = request.steps_to_run * (2 if request.guidance else 1)
    return forwards * request.width * request.height


class Pace:
    """Seconds per unit of work, a running mean for each engine.

    An engine that has drawn nothing is taken to be like the others; until something was drawn,
    every estimate is 0.
    """

    def __init__(self) -> None:
        self._seconds_per_work: dict[object, float] = {}
        self._begun = 0.0

    def begin(self, now: float) -> None:
        """A job starts."""
        self._begun = now

    def learn(self, job: HasWork, took_s: float) -> None:
        last = took_s / job.work
        mean = self._seconds_per_work.get(job.engine, last)
        self._seconds_per_work[job.engine] = mean + WEIGHT_OF_LAST * (last - mean)

    def estimate_s(self, jobs: Iterable[HasWork], running: HasWork | None = None) -> float:
        """Seconds to draw `jobs`, and before them what is left of the running one."""
        left_s = 0.0
        if running:
            left_s = max(0.0, self._alone_s(running) - (time.perf_counter() - self._begun))
        return left_s + sum(map(self._alone_s, jobs))

    def _alone_s(self, job: HasWork) -> float:
        known = dict(self._seconds_per_work)  # the engine's thread may be adding to it
        if not known:
            return 0.0
        return job.work * known.get(job.engine, sum(known.values()) / len(known))
