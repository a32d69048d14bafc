"""How sure a number is: percentiles, bootstrap intervals, paired comparisons. Pure functions.

Intervals are percentile bootstrap at 95 %, from a fixed seed, so that a report rendered again says
the same. Rows that belong to one prompt are resampled together: two pictures of one prompt are not
two independent observations (docs/benchmark.md).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
# Below, resampling knows too little: of five pairs that all point one way, chance alone makes one
# set in sixteen, and the interval of three values is their least and greatest.
MIN_SAMPLES = 6
SEED = 20261122

# An identical picture has infinite PSNR, which has no difference to anything. Beyond this the rms
# error is a quarter of one of 255 levels.
PSNR_CAP_DB = 60.0

Verdict = Literal["better", "worse", "not distinguishable"]
Samples = np.ndarray  # float64 [n]
Statistic = Callable[[np.ndarray, int], np.ndarray]  # ([resamples, n], axis) -> [resamples]


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; low and high are None below MIN_SAMPLES samples."""

    value: float
    low: float | None
    high: float | None

    @property
    def contains_zero(self) -> bool:
        """Also when nothing is known about the spread."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    def covers(self, other: float) -> bool:
        return self.low is not None and self.high is not None and self.low <= other <= self.high


@dataclass(frozen=True)
class Summary:
    """One metric of one variant over its pictures: `num_identical` of them are left out of mean,
    median and p10, which are None when all are identical."""

    num_pictures: int
    num_identical: int
    mean: Interval | None
    median: float | None
    p10: float | None


@dataclass(frozen=True)
class Comparison:
    """Two variants on the same pictures: mean difference (ours minus theirs) and who was closer."""

    difference: Interval
    wins: int
    ties: int
    losses: int
    verdict: Verdict


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between order statistics. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values")
    return float(np.percentile(np.asarray(values, np.float64), percent))


def percentile_interval(values: Sequence[float], percent: float) -> Interval:
    """The percentile with its bootstrap interval; latencies want 50, 90 and 99."""
    samples = np.asarray(values, np.float64)
    return _interval(samples, lambda x, axis: np.percentile(x, percent, axis))


def mean_interval(values: Sequence[float]) -> Interval:
    return _interval(np.asarray(values, np.float64), lambda x, axis: np.mean(x, axis))


def change_interval(values: Sequence[float], base: Sequence[float]) -> Interval:
    """median(values) / median(base) - 1, both resampled independently."""
    ours, theirs = np.asarray(values, np.float64), np.asarray(base, np.float64)
    value = float(np.median(ours) / np.median(theirs) - 1)
    if min(len(ours), len(theirs)) < MIN_SAMPLES:
        return Interval(value, None, None)
    random = np.random.default_rng(SEED)
    draws = [np.median(one[_indices(random, len(one))], axis=1) for one in (ours, theirs)]
    return Interval(value, *_bounds(draws[0] / draws[1] - 1))


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """The mean of `values`, whole clusters resampled. One cluster (prompt) per value."""
    sums, counts = _per_cluster(np.asarray(values, np.float64), clusters)
    value = float(sums.sum() / counts.sum())
    if len(sums) < MIN_SAMPLES:
        return Interval(value, None, None)
    chosen = _indices(np.random.default_rng(SEED), len(sums))  # [resamples, clusters]
    return Interval(value, *_bounds(sums[chosen].sum(1) / counts[chosen].sum(1)))


def summarize(rows: Mapping[tuple[int, str], float]) -> Summary:
    """(prompt, size) -> a metric that is infinite for identical pictures, or finite always."""
    finite = {case: value for case, value in rows.items() if np.isfinite(value)}
    values = list(finite.values())
    return Summary(
        num_pictures=len(rows),
        num_identical=len(rows) - len(finite),
        mean=clustered_mean(values, [prompt for prompt, _ in finite]) if finite else None,
        median=percentile(values, 50) if finite else None,
        p10=percentile(values, 10) if finite else None,
    )


def compare_paired(
    ours: Mapping[tuple[int, str], float],
    theirs: Mapping[tuple[int, str], float],
    *,
    higher_is_better: bool = True,
    tie: float = 0.0,
) -> Comparison:
    """Paired by (prompt, size), clustered by prompt, on the cases that both have.

    tie: the largest difference that counts as none for win and loss. Infinite values are capped at
    PSNR_CAP_DB. Raises ValueError without a common case.
    """
    cases = [case for case in ours if case in theirs]
    if not cases:
        raise ValueError("the two have no picture in common")
    differences = [_capped(ours[case]) - _capped(theirs[case]) for case in cases]
    difference = clustered_mean(differences, [prompt for prompt, _ in cases])
    sign = 1 if higher_is_better else -1
    wins = sum(sign * one > tie for one in differences)
    losses = sum(-sign * one > tie for one in differences)
    return Comparison(
        difference=difference,
        wins=wins,
        ties=len(cases) - wins - losses,
        losses=losses,
        verdict=verdict(difference, higher_is_better=higher_is_better),
    )


def verdict(difference: Interval, *, higher_is_better: bool) -> Verdict:
    """`not distinguishable` while the interval of the difference contains zero."""
    if difference.contains_zero:
        return "not distinguishable"
    return "better" if (difference.value > 0) == higher_is_better else "worse"


def _capped(value: float) -> float:
    return min(value, PSNR_CAP_DB) if np.isinf(value) else value


def _interval(values: Samples, statistic: Statistic) -> Interval:
    if not len(values):
        raise ValueError("no values")
    value = float(statistic(values[None, :], 1)[0])
    if len(values) < MIN_SAMPLES:
        return Interval(value, None, None)
    chosen = _indices(np.random.default_rng(SEED), len(values))
    return Interval(value, *_bounds(statistic(values[chosen], 1)))


def _indices(random: np.random.Generator, count: int) -> np.ndarray:
    return random.integers(0, count, (RESAMPLES, count))  # [resamples, count]


def _bounds(draws: np.ndarray) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def _per_cluster(values: Samples, clusters: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of every cluster, in order of appearance."""
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    index = np.array([places[cluster] for cluster in clusters])
    return np.bincount(index, values), np.bincount(index).astype(np.float64)
