"""95 % confidence intervals of metrics, over rows or clusters of rows that are independent of each other.

There is one for each kind of metric, chosen by simulated coverage (`make bench-COVERAGE`):

- a fraction of rows: Wilson's, with a continuity correction for up to 5 rows on one side (`proportion`)
- a mean of scores between two bounds: percentiles of a Dirichlet distribution, with half a row at each bound
- any other mean: the studentised bootstrap, or bootstrap-t (Efron 1979; Hall 1988, Annals of Statistics 16)
- a function of sums, and a score of the whole set: Wilson's for the rows that have the same standard error

All are pure, with the seed as an argument, and the order of the rows has no influence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from vllm_tasks.validation.resampling import (
    Array,
    Total,
    chunks,
    column_sums,
    distinct_rows,
    draws,
    generator,
    totals,
    vectors,
)

LEVEL = 0.95
"""The confidence level of every interval."""
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
RESAMPLES = 2_000
"""Draws for the interval of a mean."""
RESAMPLES_OF_SETS = 200
"""Fewer, since each resample scores the whole set again."""
DELETED = 2_000
"""Most values of a function of sums that a jackknife takes; with more rows, it leaves out groups of them."""
FEW = 5
"""Up to so many hits or misses, Wilson's interval is corrected for continuity. Of 100 rows, its coverage dips
to 89.5 % without the correction (p = 0.9945), and is 96.5 % on average with it for all; so its least is
93.3 %."""

Bounds = tuple[float, float]
UNKNOWN: Bounds = (-math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % confidence interval; nan if it is unknown."""

    low: float
    high: float


def wilson(hits: float, n: float) -> Interval:
    """Wilson's interval of a proportion, `hits` of `n` (Wilson 1927, JASA 22:209-212); (0, 1) if `n` is 0.

    Unlike `p +- 1.96 * sqrt(p * (1 - p) / n)`, it stays in [0, 1] and has a width at 0 and at `n` hits.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{hits!r} hits of {n!r} are not a proportion: hits must be from 0 to n")
    if n == 0:
        return Interval(0.0, 1.0)
    p, spread = hits / n, Z * Z / n
    middle = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    return Interval(0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half)


def proportion(hits: int, n: int) -> Interval:
    """Wilson's interval, corrected for continuity if there are 1 to 5 hits or misses, or none.

    The correction is Newcombe's (1998, Statistics in Medicine 17:857-872, method 4). `FEW` has the coverage.
    """
    plain = wilson(hits, n)
    if n == 0 or min(hits, n - hits) > FEW:
        return plain

    def low(k: int) -> float:
        p = k / n
        root = Z * Z - 2 - 1 / n + 4 * p * (n * (1 - p) + 1)
        return max(0.0, (2 * k + Z * Z - 1 - Z * math.sqrt(max(root, 0.0))) / (2 * (n + Z * Z))) if k else 0.0

    return Interval(low(hits), 1.0 - low(n - hits))


def mean_interval(rows: ArrayLike, bounds: Bounds = UNKNOWN, seed: int = 0) -> Interval:
    """The interval of a mean; a row is (sum, number) of the scores of one row or one cluster.

    If a score is at one of two `bounds`, many scores are equal, or there are only two rows, half a row at
    each bound joins the rows, and these have random weights (Dirichlet; for scores of 0 and 1 that is
    Jeffreys' interval, of a Beta distribution). So the interval has a width even if all scores are equal, and
    it allows for low scores that were not seen. Otherwise it is bootstrap-t, which suits skewed scores such
    as latencies: it resamples (mean - value) / standard error. Without bounds, the interval of equal scores
    has no width, because nothing is known but them. Both ends are nan if there are no scores, and if there
    are two rows without bounds, whose resamples have no spread.
    """
    matrix = vectors(rows)
    total = column_sums(matrix)
    if not len(matrix) or not total[1]:
        return Interval(math.nan, math.nan)
    first, counts = distinct_rows(matrix)
    distinct, value, rng = matrix[first], total[0] / total[1], generator(seed, "interval")
    known = distinct[distinct[:, 1] > 0]
    levels = known[:, 0] / known[:, 1]
    touched = bool(np.isin(levels, bounds).any())
    alike = len(distinct) == 1 or 2 * len(distinct) <= len(matrix) or len(matrix) == 2
    if all(map(math.isfinite, bounds)) and (touched or alike):
        pseudo = np.outer([total[1] / len(matrix)] * 2, [1.0, 1.0]) * [(bounds[0], 1), (bounds[1], 1)]
        weighed = np.vstack([distinct, pseudo])
        weights = np.append(counts, (0.5, 0.5))
        found = [rng.gamma(weights, size=(part, len(weights))) @ weighed for part in _parts(len(weights))]
        drawn = np.concatenate([sums[:, 0] / sums[:, 1] for sums in found])
        return _within(_percentiles(drawn), bounds, value)
    # A cluster's mean of equal scores differs from them by a rounding error.
    if len(levels) < 2 or np.ptp(levels) <= 1e-12 * np.abs(levels).max():
        return Interval(value, value)
    s, c = distinct.T
    moments = np.stack([s, c, s * s, s * c, c * c], axis=1)
    own = float(_studentised(counts @ moments, value)[1][0])
    pivots = np.concatenate(
        [_studentised(drawn @ moments, value)[0] for drawn in draws(rng, counts, RESAMPLES)]
    )
    known_pivots = pivots[np.isfinite(pivots)]
    if not len(known_pivots) or np.ptp(known_pivots) == 0:
        return Interval(math.nan, math.nan)
    ends = _percentiles(known_pivots)
    return _within(Interval(value - ends.high * own, value - ends.low * own), bounds, value)


def sums_interval(
    rows: ArrayLike,
    total: Total,
    bounds: Bounds = UNKNOWN,
    *,
    pseudo: Sequence[Sequence[float]] = (),
    excess: float = 0.0,
) -> Interval:
    """The interval of `total` of the sum of `rows` (n x k), by its standard error.

    The error, and the bias that is taken off, are the jackknife's (Efron and Stein 1981, Annals of Statistics
    9:586-596). `pseudo` are rows of which half of each adds its influence to the variance, such as one missed
    row of each class: without them, classes of a few rows that are all right would claim to be sure. `excess`
    is how far the lower end is below the value at least, see `Sums`. See `effective` for the interval. Rows
    without which there is no value are left out; both ends are nan if these are all rows, or if there are
    none.
    """
    matrix = vectors(rows)
    value, bias, error = jackknife(matrix, total, pseudo)
    found = effective(value - bias, error, len(matrix), bounds)
    return _within(Interval(min(found.low, value - excess), found.high), bounds, value)


def jackknife(
    matrix: Array, total: Total, pseudo: Sequence[Sequence[float]] = ()
) -> tuple[float, float, float]:
    """The value of `total` of the sum of the rows, its bias and its standard error; nan where unknown."""
    sums = np.array(column_sums(matrix))
    n = len(matrix)
    if n < 2 or not math.isfinite(value := float(total(sums.tolist()))):
        return math.nan, math.nan, math.nan
    first, counts = distinct_rows(matrix)
    left_out = matrix[first]
    if len(first) > DELETED:
        order = generator(0, "groups").permutation(np.repeat(first, counts))
        left_out = np.add.reduceat(matrix[order], np.linspace(0, n, DELETED, endpoint=False).astype(np.int64))
        counts = np.ones(DELETED, np.int64)
    without = totals_without(sums, left_out, total)
    known = np.isfinite(without)
    without, counts = without[known], counts[known]
    if not len(without):
        return value, math.nan, math.nan
    size = int(counts.sum())
    mean_without = float(counts @ without) / size
    variance = (size - 1) / size * float(counts @ (without - mean_without) ** 2)
    if len(pseudo):
        moved = totals_without(sums, -vectors(pseudo), total) - value
        variance += 0.5 * float(np.square(moved[np.isfinite(moved)]).sum())
    return value, (size - 1) * (mean_without - value), math.sqrt(variance)


def totals_without(sums: Array, rows: Array, total: Total) -> Array:
    """The metric of `sums` less each of the rows."""
    parts = (slice(start, start + part) for start, part in _starts(len(rows), len(sums)))
    return np.concatenate([totals(sums - rows[part], total) for part in parts] or [np.zeros(0)])


def set_interval(
    score: Callable[[Sequence[int]], float],
    value: float,
    clusters: Sequence[Sequence[int]],
    bounds: Bounds = UNKNOWN,
    seed: int = 0,
) -> Interval:
    """The interval of the `value` of a metric that is not a function of sums, from 200 resamples.

    `score` is given the positions of the rows in ascending order, with repetitions; `clusters` are the
    positions of rows that are drawn together. With bounds, which are (0, 1) if all values are between them,
    the interval is `effective`'s by the standard deviation of the resamples, otherwise these' percentiles.
    Resamples whose metric is nan are left out; both ends are nan if all are, or if there are no rows.
    """
    n = len(clusters)
    if n == 0:
        return Interval(math.nan, math.nan)
    rng = generator(seed, "interval")
    drawn = (
        sorted(row for i in rng.integers(0, n, n).tolist() for row in clusters[i])
        for _ in range(RESAMPLES_OF_SETS)
    )
    found = np.array([score(rows) for rows in drawn], dtype=np.float64)
    known = found[np.isfinite(found)]
    if not len(known):
        return Interval(math.nan, math.nan)
    if bounds == UNKNOWN and known.min() >= 0 and known.max() <= 1:
        bounds = (0.0, 1.0)
    if not all(map(math.isfinite, bounds)):
        return _percentiles(known)
    return _within(effective(value, float(known.std()), n, bounds), bounds, value)


def effective(value: float, error: float, n: int, bounds: Bounds = UNKNOWN) -> Interval:
    """The interval of a value whose standard error is `error`, from `n` independent rows.

    Between two bounds it is Wilson's, for that number of rows (the effective sample size) with which a
    proportion would have this error; for an error of 0 it is Wilson's of `n` rows. So it is not symmetric
    near a bound, and for a correlation it is close to Fisher's. With a lower bound alone, the error is taken
    on the logarithm's scale. Without bounds it is `value +- 1.96 * error`. Both ends are nan if the error is.
    """
    if math.isnan(value) or math.isnan(error):
        return Interval(math.nan, math.nan)
    low, high = bounds
    if math.isfinite(low) and math.isfinite(high):
        width = high - low
        p = min(max((value - low) / width, 0.0), 1.0)
        # The variance of one row with the value that is half a row away from the bounds.
        middle = (n * p + 0.5) / (n + 1)
        rows = max(1.0, middle * (1 - middle) / (error / width) ** 2) if error > 0 else n
        found = wilson(min(p * rows, rows), rows)
        return Interval(low + width * found.low, low + width * found.high)
    if math.isfinite(low) and value > low:
        by = math.exp(min(Z * error / (value - low), 700.0))
        return Interval(low + (value - low) / by, low + (value - low) * by)
    return Interval(value - Z * error, value + Z * error)


def _studentised(moments: Array, value: float) -> tuple[Array, Array]:
    """(mean - value) / standard error, and the standard error, of sums of (s, c, s^2, sc, c^2)."""
    s, c, ss, sc, cc = np.atleast_2d(moments).T
    with np.errstate(divide="ignore", invalid="ignore"):
        means = s / c
        spread = ss - 2 * means * sc + means**2 * cc
        # Equal scores leave rounding errors of their squares, which are not a spread.
        errors = np.sqrt(np.where(spread > 1e-12 * ss, spread, 0.0)) / c
        pivots: Array = (means - value) / errors
    return pivots, errors


def _starts(size: int, width: int) -> Iterator[tuple[int, int]]:
    start = 0
    for part in chunks(size, width):
        yield start, part
        start += part


def _parts(width: int) -> Iterator[int]:
    return chunks(RESAMPLES, width)


def _within(interval: Interval, bounds: Bounds, value: float) -> Interval:
    if math.isnan(interval.low):
        return interval
    return Interval(min(max(interval.low, bounds[0]), value), max(min(interval.high, bounds[1]), value))


def _percentiles(values: Array) -> Interval:
    """The ends of the middle 95 %; they are values from the input."""
    known = np.sort(values)
    outside = int((1 - LEVEL) / 2 * len(known))
    return Interval(float(known[outside]), float(known[-1 - outside]))
