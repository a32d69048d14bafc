"""How long drawing takes, learnt from what was drawn: for Retry-After and for deadlines.

Work is counted in forwards times pixels. That is coarse (attention grows faster than pixels), but
a server mostly draws one size, and every finished picture corrects the estimate. Pictures that
are drawn together share the engine's time, so what is learnt is a share, not a wait.
"""

from collections.abc import Iterable
from typing import Protocol

from zimage_fp8.model.request import ImageRequest

WEIGHT_OF_LAST = 0.3


class HasWork(Protocol):
    """Forwards times pixels, the engine that does them (each has a pace of its own), and the
    engine's time that they took so far."""

    @property
    def work(self) -> int: ...

    @property
    def spent_s(self) -> float: ...

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

    def learn(self, job: HasWork, took_s: float) -> None:
        last = took_s / job.work
        mean = self._seconds_per_work.get(job.engine, last)
        self._seconds_per_work[job.engine] = mean + WEIGHT_OF_LAST * (last - mean)

    def estimate_s(self, jobs: Iterable[HasWork], running: Iterable[HasWork] = ()) -> float:
        """Seconds to draw `jobs`, and before them what is left of the running ones."""
        left_s = sum(max(0.0, self._alone_s(job) - job.spent_s) for job in running)
        return left_s + sum(map(self._alone_s, jobs))

    def _alone_s(self, job: HasWork) -> float:
        known = dict(self._seconds_per_work)  # the engine's thread may be adding to it
        if not known:
            return 0.0
        return job.work * known.get(job.engine, sum(known.values()) / len(known))
