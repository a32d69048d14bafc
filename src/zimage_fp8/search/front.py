"""The front of cost against error, when errors add up: a knapsack, solved along its convex hull."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from zimage_fp8.evaluate import psnr_db

KEEP = "keep"

Choice = tuple[str, ...]  # per part, the name of its spec


@dataclass(frozen=True)
class Option:
    """A part in one format: its cost, and its squared error in every prompt's picture."""

    spec: str
    cost: float
    errors: tuple[float, ...]

    @property
    def error(self) -> float:
        return fmean(self.errors)


@dataclass(frozen=True)
class Point:
    """A whole plan. predicted_psnr: mean over the prompts, of the parts' errors added up, in dB."""

    specs: Choice
    cost: float
    predicted_psnr: float


def front(parts: Sequence[Sequence[Option]], rest: float) -> list[Point]:
    """Plans from the cheapest to the best, each the best for its cost as far as errors add up.

    rest: the cost of what nobody chooses. Between neighbours one part changes its format, the one
    that saves most error per cost.
    """
    hulls = [_hull(options) for options in parts]
    steps = sorted(
        (
            (_saving(before, after), place, index)
            for place, hull in enumerate(hulls)
            for index, (before, after) in enumerate(pairwise(hull))
        ),
        key=lambda step: (-step[0], step[1], step[2]),
    )
    chosen = [hull[0] for hull in hulls]
    points = [_point(chosen, rest)]
    for _, place, index in steps:
        chosen[place] = hulls[place][index + 1]
        points.append(_point(chosen, rest))
    return points


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower left hull: costs rise, errors fall, and each step saves less per cost than the one
    before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda it: (it.cost, it.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _saving(before: Option, after: Option) -> float:
    """Squared error saved per cost."""
    dearer = after.cost - before.cost
    return (before.error - after.error) / dearer if dearer > 0 else float("inf")


def _point(chosen: Sequence[Option], rest: float) -> Point:
    per_prompt = [sum(errors) for errors in zip(*(it.errors for it in chosen), strict=True)]
    return Point(
        specs=tuple(it.spec for it in chosen),
        cost=rest + sum(it.cost for it in chosen),
        predicted_psnr=fmean(map(psnr_db, per_prompt)),
    )
