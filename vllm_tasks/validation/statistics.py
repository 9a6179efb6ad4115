"""Statistics over the rows of a data set: intervals of a metric, and the test whether one run is worse.

All functions are pure, with the seed as an argument: equal inputs give results that are equal to the last
digit (with one release of numpy), and the order of the rows has no influence. Scores and sums are finite.

A mean is a function of sums: the rows are (score, 1), and `mean` divides their sums. One implementation
therefore serves means and every `Sums` metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_tasks.validation.resampling import (
    Array,
    Counts,
    Total,
    column_sums,
    distinct_rows,
    draws,
    every_swap,
    few,
    generator,
    mean,
    random_swaps,
    totals,
    vectors,
)

LEVEL = 0.95
"""The confidence level of every interval."""
ALPHA = 0.05
"""A drop counts as more than chance if its one-sided p-value is at most this."""
RESAMPLES = 1_000
"""Resamples of a bootstrap."""
RESAMPLES_OF_SETS = 200
"""Fewer, since each resample scores the whole set again; the ends of the interval are less precise."""
SWAPS_OF_MEANS = 10_000
SWAPS_OF_SUMS = 2_000
"""Fewer, since each swap calls `total` twice."""
EVERY_SWAP = 2**12
"""Up to so many swaps, all of them are evaluated and the p-value is exact: always for 12 rows that differ,
and for more rows with scores of 0 and 1 (60 improved and 60 regressed rows)."""
TIE = 1e-9
"""Values within this relative distance are equal, since sums of floats depend on their order."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % confidence interval; nan if it is unknown."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Paired:
    """The comparison of two runs over the same rows. See `paired`."""

    difference: float
    """The value after, minus the value before."""
    low: float
    high: float
    """The 95 % interval of `difference`."""
    p_worse: float
    """One-sided p-value: how often chance alone makes the value worse by at least this much."""
    p_different: float
    """Two-sided p-value: how often chance alone moves the value at least this far, up or down."""
    rows: int


def wilson(hits: int, n: int) -> Interval:
    """Wilson's interval of a proportion, `hits` of `n` (Wilson 1927, JASA 22:209-212); (0, 1) if `n` is 0.

    Unlike `p +- 1.96 * sqrt(p * (1 - p) / n)`, it stays in [0, 1] and has a width at 0 and at `n` hits.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{hits!r} hits of {n!r} are no proportion: hits must be from 0 to n")
    if n == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    p, spread = hits / n, z * z / n
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    return Interval(0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half)


def mean_rows(scores: Sequence[float | None]) -> Array:
    """One vector (score, 1) for each row, with `mean` as the total; (0, 0) for a row without a score."""
    return np.array([(0.0, 0.0) if s is None else (float(s), 1.0) for s in scores]).reshape(-1, 2)


def mean_interval(scores: Sequence[float | None], seed: int = 0) -> Interval:
    """The bootstrap interval of a mean of scores; see `bootstrap`."""
    return bootstrap(mean_rows(scores), mean, seed)


def bootstrap(rows: ArrayLike, total: Total = mean, seed: int = 0) -> Interval:
    """The percentile bootstrap interval (Efron 1979) of `total` of the sum of `rows` (n x k).

    The interval of one row, or of rows that are all equal, has width 0, because a bootstrap knows only its
    rows. Resamples whose metric is nan are left out; both ends are nan if all are, or if there are no rows.
    It needs 32 MiB of memory in addition to the distinct rows.
    """
    matrix = vectors(rows)
    if len(matrix) == 0:
        return Interval(math.nan, math.nan)
    first, counts = distinct_rows(matrix)
    distinct, rng = matrix[first], generator(seed, "interval")
    return _percentiles([totals(drawn @ distinct, total) for drawn in draws(rng, counts, RESAMPLES)])


def bootstrap_set(score: Callable[[Sequence[int]], float], n: int, seed: int = 0) -> Interval:
    """The bootstrap interval of a metric that is not a function of sums; `score` is called for 200 resamples.

    It is given the positions of the rows in ascending order, with repetitions. Resamples whose metric is nan
    are left out; both ends are nan if all are, or if `n` is 0. The ends are equal if all resamples have one
    value, which is always so if `n` is 1.
    """
    if n == 0:
        return Interval(math.nan, math.nan)
    rng = generator(seed, "interval")
    drawn = (np.sort(rng.integers(0, n, n)).tolist() for _ in range(RESAMPLES_OF_SETS))
    return _percentiles([np.array([score(positions) for positions in drawn], dtype=np.float64)])


def paired(
    before: ArrayLike, after: ArrayLike, total: Total = mean, *, higher_is_better: bool = True, seed: int = 0
) -> Paired:
    """Compare two runs by their row vectors (n x k each; for means, see `mean_rows`), paired by position.

    The columns must mean the same on both sides. A `Sums` metric whose vectors depend on the predictions,
    such as a confusion matrix, must score both runs in one call, and its rows are split afterwards.

    `low` and `high` come from a bootstrap that draws the same rows on both sides. The p-values come from
    approximate randomisation (Noreen 1989, "Computer-Intensive Methods for Testing Hypotheses"; for metrics
    other than means, Yeh 2000, COLING). If both runs were of one model, each row's two answers could equally
    have come in the other order: all ways to swap them are equally likely. p is the fraction of them, or of a
    sample, that is at least as extreme as the observed difference. For means this is the sign-flip test, for
    scores of 0 and 1 McNemar's. A sample includes the observed order, so p > 0 (Phipson and Smyth 2010).

    p is 1 if the runs agree in every row, if there are no rows, and if the difference is not finite. A swap
    whose metric is nan counts as extreme. Raises `ValueError` for arrays of different shapes.
    """
    old, new = vectors(before), vectors(after)
    if old.shape != new.shape:
        raise ValueError(
            f"rows are paired by position, so {old.shape} and {new.shape} must be the same shape"
        )
    if len(old) == 0:
        return Paired(math.nan, math.nan, math.nan, 1.0, 1.0, 0)
    old_sums, new_sums = column_sums(old), column_sums(new)
    first, counts = distinct_rows(old, new)
    pairs = _Pairs(old[first], new[first], counts, np.array(old_sums), np.array(new_sums))
    interval = _difference_interval(pairs, total, generator(seed, "interval"))
    worse, different = _p_values(pairs, total, higher_is_better, generator(seed, "swaps"))
    return Paired(total(new_sums) - total(old_sums), interval.low, interval.high, worse, different, len(old))


def regressed(paired: Paired, max_regression: float, higher_is_better: bool = True) -> bool:
    """Whether a run got worse by more than is allowed, and by more than chance.

    Two conditions must hold: the observed drop is larger than `max_regression` (a drop of exactly that is
    allowed), and `p_worse <= 0.05`. Without the second condition, sampling noise alone would stop a model:
    with 1,319 rows, 40 % of them right, a repeated run with temperature falls by more than a point about one
    time in four (benchmarks/gate.py). Without the first condition, a large data set would stop a model for
    drops that do not matter.

    False alarms: if nothing changed, and the rows' answers are drawn independently, the two answers of each
    row are exchangeable. Then `p_worse <= 0.05` in at most 5 % of comparisons, whatever the metric, its
    distribution and the number of rows (Noreen 1989; Phipson and Smyth 2010 for the sampled p-value). The
    first condition can only lower that: at most 5 % for every `max_regression >= 0`. This holds for a
    `before` that was not selected by its value. The last run that passed was lucky on average if passing was
    hard, so later runs look a little worse than they are: simulated, 4.7 % with this gate alone, and 7.0 %
    with an additional threshold that the unchanged model reaches in half of its runs.

    A true drop of exactly `max_regression`, if it is well beyond noise, is observed as a larger one about
    half of the time, and the gate then fires. The test is for any drop, with a least size for the observed
    drop; it does not test "the drop is larger than `max_regression`". A drop is caught nearly always if it
    exceeds the limit by about two standard errors of the difference, and 0 by about three; `high - low` is
    four of them. A drop within the limit always passes, so small drops add up: thresholds prevent that.

    A difference that is nan never fires.
    """
    drop = -paired.difference if higher_is_better else paired.difference
    beyond = drop > max_regression and not math.isclose(drop, max_regression, rel_tol=TIE, abs_tol=1e-12)
    return beyond and paired.p_worse <= ALPHA


@dataclass(frozen=True)
class _Pairs:
    """Distinct pairs of row vectors, the number of each, and the sums of all rows."""

    old: Array
    new: Array
    counts: Counts
    old_sums: Array
    new_sums: Array


def _difference_interval(pairs: _Pairs, total: Total, rng: np.random.Generator) -> Interval:
    with np.errstate(invalid="ignore"):  # two infinite values have no difference
        return _percentiles(
            [
                totals(drawn @ pairs.new, total) - totals(drawn @ pairs.old, total)
                for drawn in draws(rng, pairs.counts, RESAMPLES)
            ]
        )


def _p_values(
    pairs: _Pairs, total: Total, higher_is_better: bool, rng: np.random.Generator
) -> tuple[float, float]:
    """The p-values, one-sided for worse and two-sided. Only rows that differ have an influence."""
    differ = (pairs.old != pairs.new).any(axis=1)
    moves, counts = (pairs.new - pairs.old)[differ], pairs.counts[differ]
    sign = 1 if higher_is_better else -1

    def gains(swapped: Array, moves: Array = moves) -> Array:
        moved = swapped @ moves
        with np.errstate(invalid="ignore"):
            return sign * (totals(pairs.new_sums - moved, total) - totals(pairs.old_sums + moved, total))

    seen = float(gains(np.zeros((1, len(counts))))[0])
    if len(counts) == 0 or not math.isfinite(seen):
        return 1.0, 1.0
    tie = TIE * float(np.abs(totals(np.stack([pairs.old_sums, pairs.new_sums]), total)).max())

    def extreme(gains: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which gains are at least as bad as the observed one, and which as far from 0; nan is both."""
        return ~(gains > seen + tie), ~(np.abs(gains) < abs(seen) - tie)

    if math.prod((counts + 1).tolist()) <= EVERY_SWAP:
        swapped, chances = every_swap(counts.tolist())
        worse, different = (math.fsum(chances[which]) for which in extreme(gains(swapped)))
        return min(1.0, worse), min(1.0, different)
    swaps = SWAPS_OF_MEANS if total is mean else SWAPS_OF_SUMS
    if few(counts):
        moves, counts = np.repeat(moves, counts, axis=0), np.ones(counts.sum(), np.int64)
    found = [extreme(gains(swapped, moves)) for swapped in random_swaps(rng, counts, swaps)]
    worse, different = (1 + sum(int(which.sum()) for which in side) for side in zip(*found, strict=True))
    return worse / (1 + swaps), different / (1 + swaps)


def _percentiles(values: Sequence[Array]) -> Interval:
    """The ends of the middle 95 %. They are values from the input, so infinite ones need no arithmetic."""
    every = np.concatenate(values)
    known = np.sort(every[~np.isnan(every)])
    if len(known) == 0:
        return Interval(math.nan, math.nan)
    outside = int((1 - LEVEL) / 2 * len(known))
    return Interval(float(known[outside]), float(known[-1 - outside]))
