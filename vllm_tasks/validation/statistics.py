"""The comparison of two runs over the same rows, and the test whether one run is worse.

All functions are pure, with the seed as an argument: equal inputs give results that are equal to the last
digit (with one release of numpy), and the order of the rows has no influence. Scores and sums are finite.

A mean is a function of sums: the rows are (score, 1), and `mean` divides their sums. One implementation
therefore serves means and every `Sums` metric. Rows that are not independent are summed by cluster, and
clusters take the place of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from vllm_tasks.validation.intervals import UNKNOWN, Bounds, Interval, effective, jackknife
from vllm_tasks.validation.resampling import (
    Array,
    Total,
    column_sums,
    distinct_rows,
    every_swap,
    few,
    generator,
    mean,
    random_swaps,
    totals,
    vectors,
)

ALPHA = 0.05
"""A drop counts as more than chance if its one-sided p-value is at most this."""
SWAPS_OF_MEANS = 10_000
SWAPS_OF_SUMS = 2_000
"""Fewer, since each swap calls `total` twice."""
EVERY_SWAP = 2**12
"""Up to so many swaps, all of them are evaluated and the p-value is exact: always for 12 rows that differ,
and for more rows with scores of 0 and 1 (60 improved and 60 regressed rows)."""
TIE = 1e-9
"""Values within this relative distance are equal, since sums of floats depend on their order."""


@dataclass(frozen=True)
class Sides:
    """The rows of two runs by one metric, paired by position (n x k each).

    The columns mean the same on both sides. A `Sums` metric whose vectors depend on the predictions, such as
    a confusion matrix, scores both runs in one call, and its rows are split afterwards.
    """

    before: Array
    after: Array
    total: Total = mean
    higher_is_better: bool = True
    bounds: Bounds = UNKNOWN
    """The lowest and highest value of the metric."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for arrays of different shapes."""
        if self.before.shape != self.after.shape:
            raise ValueError(
                f"rows are paired by position, so {self.before.shape} and {self.after.shape} must be the "
                "same shape"
            )

    def values(self) -> tuple[float, float]:
        """The metric before and after."""
        return self.total(column_sums(self.before)), self.total(column_sums(self.after))


@dataclass(frozen=True, slots=True)
class Paired:
    """The comparison of two runs over the same rows. See `paired`."""

    difference: float
    """The value after, minus the value before."""
    low: float
    high: float
    """The 95 % interval of `difference`; nan if it is unknown, as for latency."""
    p_worse: float
    """One-sided p-value: how often chance alone makes the value worse by at least this much."""
    p_different: float
    """Two-sided p-value: how often chance alone moves the value at least this far, up or down."""
    rows: int


def mean_rows(scores: Sequence[float | None]) -> Array:
    """One vector (score, 1) for each row, with `mean` as the total; (0, 0) for a row without a score."""
    return np.array([(0.0, 0.0) if s is None else (float(s), 1.0) for s in scores]).reshape(-1, 2)


def clustered(rows: ArrayLike, clusters: Sequence[int] | None) -> Array:
    """One vector for each cluster: the sum of its rows' vectors. None: each row is a cluster."""
    matrix = vectors(rows)
    if clusters is None or not len(matrix):
        return matrix
    names, places = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((len(names), matrix.shape[1]))
    np.add.at(sums, places, matrix)
    return sums


def paired(sides: Sides, clusters: Sequence[int] | None = None, seed: int = 0) -> Paired:
    """Compare two runs.

    `low` and `high` come from the jackknife over rows, or clusters, of both sides together. The p-values come
    from approximate randomisation (Noreen 1989, "Computer-Intensive Methods for Testing Hypotheses"; for
    metrics other than means, Yeh 2000, COLING). If both runs were of one model, each row's two answers could
    equally have come in the other order: all ways to swap them are equally likely. p is the fraction of them,
    or of a sample, that is at least as extreme as the observed difference. For means this is the sign-flip
    test, for scores of 0 and 1 McNemar's. A sample includes the observed order, so p > 0 (Phipson and Smyth
    2010).

    p is 1 if the runs agree in every row, if there are no rows, and if the difference is not finite. A swap
    whose metric is nan counts as extreme.
    """
    rows = len(sides.before)
    if not rows:
        return Paired(math.nan, math.nan, math.nan, 1.0, 1.0, 0)
    old, new = sides.values()
    interval = _difference_interval(sides, clusters)
    (gains,), chances = _gains([sides], clusters, seed)
    worse, different = 1.0, 1.0
    if math.isfinite(seen := float(gains[0])) and len(gains) > 1:
        tie = _tie(sides)
        worse = math.fsum(chances[~(gains > seen + tie)])
        different = math.fsum(chances[~(np.abs(gains) < abs(seen) - tie)])
    return Paired(new - old, interval.low, interval.high, min(1.0, worse), min(1.0, different), rows)


def familywise(family: Sequence[Sides], clusters: Sequence[int] | None = None, seed: int = 0) -> list[float]:
    """For each metric, the one-sided p-value that counts all of `family` as one test.

    It is how often chance alone makes *any* of the metrics as improbably worse as this one is: the swaps are
    those of `paired`, but of all metrics at once, and each swap counts by the least of its p-values (minP of
    Westfall and Young 1993, "Resampling-Based Multiple Testing"). So one of them is <= 0.05 in at most 5 % of
    comparisons, however many metrics there are. Metrics that move together cost less than by Holm's method,
    which would multiply the least p by their number. With one metric it is `p_worse`.
    """
    if not family or not len(family[0].before):
        return [1.0] * len(family)
    every, chances = _gains(family, clusters, seed)
    ps = [_p_of_each(gains, chances, _tie(sides)) for gains, sides in zip(every, family, strict=True)]
    least = np.min(ps, axis=0)
    return [min(1.0, math.fsum(chances[least <= p[0] * (1 + TIE)])) for p in ps]


def regressed(
    paired: Paired, max_regression: float, higher_is_better: bool = True, p_worse: float | None = None
) -> bool:
    """Whether a run got worse by more than is allowed, and by more than chance.

    Two conditions must hold: the observed drop is larger than `max_regression` (a drop of exactly that is
    allowed), and `p_worse <= 0.05`. Without the second condition, sampling noise alone would stop a model:
    with 1,319 rows, 40 % of them right, a repeated run with temperature falls by more than a point about one
    time in four (benchmarks/gate.py). Without the first condition, a large data set would stop a model for
    drops that do not matter.

    False alarms: if nothing changed, and the answers of different clusters are drawn independently, the two
    answers of each cluster are exchangeable. Then `p_worse <= 0.05` in at most 5 % of comparisons, whatever
    the metric, its distribution and the number of rows (Noreen 1989; Phipson and Smyth 2010 for the sampled
    p-value). The first condition can only lower that: at most 5 % for every `max_regression >= 0`. A
    `p_worse` that is given replaces that of `paired`: the gate's counts all limits and baselines of a verdict
    (`vllm_tasks.validation.gate`).

    A true drop of exactly `max_regression`, if it is well beyond noise, is observed as a larger one about
    half of the time, and the gate then fires. The test is for any drop, with a least size for the observed
    drop; it does not test "the drop is larger than `max_regression`". A drop is caught nearly always if it
    exceeds the limit by about two standard errors of the difference, and 0 by about three; `high - low` is
    four of them. A drop within the limit always passes.

    A difference that is nan never fires.
    """
    drop = -paired.difference if higher_is_better else paired.difference
    beyond = drop > max_regression and not math.isclose(drop, max_regression, rel_tol=TIE, abs_tol=1e-12)
    return beyond and (paired.p_worse if p_worse is None else p_worse) <= ALPHA


def _difference_interval(sides: Sides, clusters: Sequence[int] | None) -> Interval:
    """The interval is as wide as if one more row differed, as much as those that do, or wholly if none does:
    three rows that differ are no reason to be sure (Agresti and Min 2005, Statistics in Medicine 24:729-740,
    add one such pair to the counts of McNemar's table)."""
    both = clustered(np.hstack([sides.before, sides.after]), clusters)
    both = both[both.any(axis=1)]  # a row that counts in neither run is no evidence
    k, total = sides.before.shape[1], sides.total
    width = sides.bounds[1] - sides.bounds[0]

    def difference(sums: Sequence[float]) -> float:
        return total(sums[k:]) - total(sums[:k])

    value, bias, error = jackknife(both, difference)
    differ = int((both[:, :k] != both[:, k:]).any(axis=1).sum())
    if differ:
        error *= math.sqrt(1 + 1 / differ)
    elif len(both) and math.isfinite(width):
        error = width / len(both)
    return effective(value - bias, error, len(both), (-width, width))


def _gains(family: Sequence[Sides], clusters: Sequence[int] | None, seed: int) -> tuple[list[Array], Array]:
    """What each metric gains by each way to swap rows, and the probabilities of the ways.

    The first way is the observed one, without any swap. Only rows that differ have an influence.
    """
    old = clustered(np.hstack([sides.before for sides in family]), clusters)
    new = clustered(np.hstack([sides.after for sides in family]), clusters)
    old_sums, new_sums = np.array(column_sums(old)), np.array(column_sums(new))
    first, counts = distinct_rows(old, new)
    moves = (new - old)[first]
    differ = moves.any(axis=1)
    moves, counts = moves[differ], counts[differ]
    ends = np.cumsum([sides.before.shape[1] for sides in family])[:-1]

    def gains(swapped: Array, moves: Array) -> list[Array]:
        moved = swapped @ moves
        columns = zip(
            family,
            np.split(new_sums - moved, ends, axis=1),
            np.split(old_sums + moved, ends, axis=1),
            strict=True,
        )
        with np.errstate(invalid="ignore"):
            return [
                (1 if s.higher_is_better else -1) * (totals(after, s.total) - totals(before, s.total))
                for s, after, before in columns
            ]

    if math.prod((counts + 1).tolist()) <= EVERY_SWAP:
        swapped, chances = every_swap(counts.tolist())
        return gains(swapped, moves), chances
    swaps = SWAPS_OF_MEANS if all(sides.total is mean for sides in family) else SWAPS_OF_SUMS
    if few(counts):
        moves, counts = np.repeat(moves, counts, axis=0), np.ones(counts.sum(), np.int64)
    parts = [gains(np.zeros((1, len(counts))), moves)]
    parts += [gains(swapped, moves) for swapped in random_swaps(generator(seed, "swaps"), counts, swaps)]
    return [np.concatenate(each) for each in zip(*parts, strict=True)], np.full(1 + swaps, 1 / (1 + swaps))


def _tie(sides: Sides) -> float:
    return TIE * max(map(abs, sides.values()))


def _p_of_each(gains: Array, chances: Array, tie: float) -> Array:
    """For each way to swap rows, the probability of one that is at least as bad; 1 if the observed gain is
    not finite, and nan counts as bad."""
    if not math.isfinite(gains[0]):
        return np.ones(len(gains))
    known = np.nan_to_num(gains, nan=-math.inf)
    order = np.argsort(known, kind="stable")
    upto = np.cumsum(chances[order])
    found: Array = upto[np.searchsorted(known[order], known + tie, side="right") - 1]
    return found
