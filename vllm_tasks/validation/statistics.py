"""What the rows of a data set can tell: intervals of a metric, and whether one run is worse than another.

Everything is a function of its arguments, the seed among them: equal inputs give equal results to the last
digit (of one release of numpy), and the order of the rows changes none. Scores and sums are finite numbers.

A mean is treated as what it is, a function of sums: rows of (score, 1), and `mean` to divide them. So one
implementation serves means and every `Sums` metric. Rows that are alike are drawn together, which is the same
in distribution, and for scores of 0 and 1 much less work.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Total = Callable[[Sequence[float]], float]
"""The metric of a sum of row vectors, as `Sums.total`."""
Array = NDArray[np.float64]
Counts = NDArray[np.int64]

LEVEL = 0.95
"""Of every interval."""
ALPHA = 0.05
"""A drop is not by chance when chance alone would do it in no more than this share of comparisons."""
RESAMPLES = 1_000
"""Of a bootstrap."""
RESAMPLES_OF_SETS = 200
"""Where each one scores the whole set again; the interval's ends are that much rougher."""
SWAPS_OF_MEANS = 10_000
SWAPS_OF_SUMS = 2_000
"""Where each one calls `total` twice."""
EVERY_SWAP = 2**12
"""All ways to swap are tried, and the p-value is exact, when they are no more: always for 12 rows that
differ, and for more of them with scores of 0 and 1 (for 60 wins and 60 losses)."""
CHUNK = 2**22
"""Numbers held at once, 32 MiB of them."""
ALIKE = 8
"""Rows for each distinct one, from which on counts are drawn by their distribution, and not row by row."""
TIE = 1e-9
"""Values that are this close, by their size, are equal: sums of floats depend on their order."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % confidence interval; nan where nothing is known."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Paired:
    """Two runs over the same rows. See `paired`."""

    difference: float
    """The value after, less the value before."""
    low: float
    high: float
    """The 95 % interval of `difference`."""
    p_worse: float
    """How often chance alone would make it at least so much worse: one-sided, in the metric's direction."""
    p_different: float
    """How often chance alone would move it at least so far, up or down."""
    rows: int


def wilson(hits: int, n: int) -> Interval:
    """Of a proportion, `hits` of `n` (Wilson 1927, JASA 22:209-212); (0, 1) when `n` is 0.

    Unlike `p +- 1.96 * sqrt(p * (1 - p) / n)` it stays in [0, 1] and has a width at 0 and at `n` hits.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{hits!r} hits of {n!r} are no proportion")
    if n == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return Interval(0.0 if hits == 0 else middle - half, 1.0 if hits == n else middle + half)


def mean(sums: Sequence[float]) -> float:
    """The `total` of rows (score, 1): their mean; nan of none."""
    return sums[0] / sums[1] if sums[1] else math.nan


def mean_rows(scores: Sequence[float | None]) -> Array:
    """One (score, 1) for each row, to which `mean` is the total; a row without a score counts for nothing."""
    return np.array([(0.0, 0.0) if s is None else (float(s), 1.0) for s in scores]).reshape(-1, 2)


def mean_interval(scores: Sequence[float | None], seed: int = 0) -> Interval:
    """Of a mean of scores; see `bootstrap`."""
    return bootstrap(mean_rows(scores), mean, seed)


def bootstrap(rows: ArrayLike, total: Total = mean, seed: int = 0) -> Interval:
    """Of what `total` makes of the sum of `rows` (n x k), by the percentile bootstrap (Efron 1979).

    A bootstrap knows no more than its rows: the interval of one row, or of rows that are all equal, has no
    width. Resamples whose metric is nan are left out; when all are, and when there are no rows, both ends
    are nan. Memory is 32 MiB beside the distinct rows.
    """
    matrix = _vectors(rows)
    if len(matrix) == 0:
        return Interval(math.nan, math.nan)
    first, counts = _distinct(matrix)
    distinct, rng = matrix[first], _generator(seed, "interval")
    return _percentiles([_totals(drawn @ distinct, total) for drawn in _draws(rng, counts, RESAMPLES)])


def bootstrap_set(score: Callable[[Sequence[int]], float], n: int, seed: int = 0) -> Interval:
    """Of a metric that is no function of sums: `score` is called for the positions of each of 200 resamples.

    The positions are in ascending order, some of them more than once. Resamples whose metric is nan are left
    out. Both ends are nan when all are, and when `n` is 0; they are equal when all resamples have one value,
    as they have when `n` is 1.
    """
    if n == 0:
        return Interval(math.nan, math.nan)
    rng = _generator(seed, "interval")
    drawn = (np.sort(rng.integers(0, n, n)).tolist() for _ in range(RESAMPLES_OF_SETS))
    return _percentiles([np.array([score(positions) for positions in drawn], dtype=np.float64)])


def paired(
    before: ArrayLike, after: ArrayLike, total: Total = mean, *, higher_is_better: bool = True, seed: int = 0
) -> Paired:
    """Compare two runs by their row vectors (n x k each, of means `mean_rows`), paired by position.

    The columns of both must mean the same. A `Sums` metric whose vectors depend on what was predicted, as a
    confusion matrix does, has to score both runs in one call, and its rows are cut in two afterwards.

    `low` and `high` are of a bootstrap that draws the same rows on both sides. The p-values are of
    approximate randomisation (Noreen 1989, "Computer-Intensive Methods for Testing Hypotheses"; of metrics
    that are no means: Yeh 2000, COLING): were both runs of one model, each row's two answers might as well
    have come in the other order, so all ways to swap them are equally likely; p is the share of them, or of
    a sample, at least as extreme as what was seen. Of means it is the sign-flip test, and of scores of 0 and
    1 McNemar's. A sample counts what was seen as one more, so that p is never 0 (Phipson and Smyth 2010).

    Runs that agree in every row have p 1, as have no rows at all and a difference that is not finite; a swap
    whose metric is nan counts as extreme. Raises `ValueError` for arrays of unequal shapes.
    """
    old, new = _vectors(before), _vectors(after)
    if old.shape != new.shape:
        raise ValueError(f"rows are paired by position, and {old.shape} is no pair of {new.shape}")
    if len(old) == 0:
        return Paired(math.nan, math.nan, math.nan, 1.0, 1.0, 0)
    old_sums, new_sums = _sums(old), _sums(new)
    first, counts = _distinct(old, new)
    pairs = _Pairs(old[first], new[first], counts, np.array(old_sums), np.array(new_sums))
    interval = _difference_interval(pairs, total, _generator(seed, "interval"))
    worse, different = _p_values(pairs, total, higher_is_better, _generator(seed, "swaps"))
    return Paired(total(new_sums) - total(old_sums), interval.low, interval.high, worse, different, len(old))


def regressed(paired: Paired, max_regression: float, higher_is_better: bool = True) -> bool:
    """Whether it got worse by more than is allowed, and not by chance.

    Both must hold: the drop that was seen is larger than `max_regression` (a drop of exactly that is
    allowed), and `p_worse <= 0.05`. Without the second, sampling noise alone would stop a model: of 1,319
    rows with 40 % right, a run with temperature that is asked again falls by more than a point about one
    time in four (benchmarks/gate.py). Without the first, a large data set would stop it for drops that
    nobody minds.

    False alarms: when nothing changed, and the rows' answers are drawn independently, the two answers of each
    row are exchangeable. Then `p_worse <= 0.05` in at most 5 % of comparisons, whatever the metric, its
    distribution and the number of rows (Noreen 1989; Phipson and Smyth 2010 for the sampled p-value), and the
    first condition can only lower that: at most 5 % for every `max_regression >= 0`. That is of a
    `before` that was not chosen for its value. The last run that passed was lucky on average, if passing was
    hard, and those after it look a little worse than they are: simulated 4.7 % with this gate alone, and
    7.0 % with a threshold as well that the unchanged model reaches in half of its runs.

    A true drop of exactly `max_regression`, when it is well beyond noise, is seen as a larger one about half
    of the time, and then fires: this is a test for any drop, with a least size that is compared as it was
    seen, and no test of "the drop is larger than `max_regression`". To be caught nearly always a drop has to
    exceed the limit by about two standard errors of the difference, and 0 by about three; `high - low` is
    four of them. A drop within the limit passes each time it happens, so that many small ones add up: that is
    what thresholds are for.

    A difference that is nan never fires.
    """
    drop = -paired.difference if higher_is_better else paired.difference
    beyond = drop > max_regression and not math.isclose(drop, max_regression, rel_tol=TIE, abs_tol=1e-12)
    return beyond and paired.p_worse <= ALPHA


@dataclass(frozen=True)
class _Pairs:
    """Distinct pairs of row vectors, how often each comes, and the sums of all rows."""

    old: Array
    new: Array
    counts: Counts
    old_sums: Array
    new_sums: Array


def _difference_interval(pairs: _Pairs, total: Total, rng: np.random.Generator) -> Interval:
    with np.errstate(invalid="ignore"):  # two infinite values have no difference
        return _percentiles(
            [
                _totals(drawn @ pairs.new, total) - _totals(drawn @ pairs.old, total)
                for drawn in _draws(rng, pairs.counts, RESAMPLES)
            ]
        )


def _p_values(
    pairs: _Pairs, total: Total, higher_is_better: bool, rng: np.random.Generator
) -> tuple[float, float]:
    """One-sided for worse, and two-sided. Only rows that differ can tell."""
    differ = (pairs.old != pairs.new).any(axis=1)
    moves, counts = (pairs.new - pairs.old)[differ], pairs.counts[differ]
    sign = 1 if higher_is_better else -1

    def gains(swapped: Array, moves: Array = moves) -> Array:
        moved = swapped @ moves
        with np.errstate(invalid="ignore"):
            return sign * (_totals(pairs.new_sums - moved, total) - _totals(pairs.old_sums + moved, total))

    seen = float(gains(np.zeros((1, len(counts))))[0])
    if len(counts) == 0 or not math.isfinite(seen):
        return 1.0, 1.0
    tie = TIE * float(np.abs(_totals(np.stack([pairs.old_sums, pairs.new_sums]), total)).max())

    def extreme(gains: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which are at least as bad, and which as far from 0; nan is both."""
        return ~(gains > seen + tie), ~(np.abs(gains) < abs(seen) - tie)

    if math.prod((counts + 1).tolist()) <= EVERY_SWAP:
        swapped, chances = _every_swap(counts.tolist())
        worse, different = (math.fsum(chances[which]) for which in extreme(gains(swapped)))
        return min(1.0, worse), min(1.0, different)
    swaps = SWAPS_OF_MEANS if total is mean else SWAPS_OF_SUMS
    if _few(counts):
        moves, counts = np.repeat(moves, counts, axis=0), np.ones(counts.sum(), np.int64)
    found = [extreme(gains(swapped, moves)) for swapped in _swaps(rng, counts, swaps)]
    worse, different = (1 + sum(int(which.sum()) for which in side) for side in zip(*found, strict=True))
    return worse / (1 + swaps), different / (1 + swaps)


def _vectors(rows: ArrayLike) -> Array:
    """As floats, without -0.0: it equals 0.0, and has other bits, by which rows are told apart."""
    return np.asarray(rows, dtype=np.float64) + 0.0


def _sums(rows: Array) -> list[float]:
    return [math.fsum(column.tolist()) for column in rows.T]


def _totals(sums: Array, total: Total) -> Array:
    """The metric of each row of sums."""
    if total is mean:
        with np.errstate(divide="ignore", invalid="ignore"):
            means: Array = sums[:, 0] / sums[:, 1]
        return means
    return np.array([total(row) for row in sums.tolist()], dtype=np.float64)


def _distinct(*sides: Array) -> tuple[Counts, Counts]:
    """Where each distinct row, over all sides, stands first, and how often it comes.

    In the order of a hash of their contents, which is the same in any order of the rows.
    """
    first: dict[bytes, int] = {}
    counts: Counter[bytes] = Counter()
    for i, row in enumerate(zip(*sides, strict=True)):
        key = hashlib.blake2b(b"".join(side.tobytes() for side in row), digest_size=16).digest()
        first.setdefault(key, i)
        counts[key] += 1
    order = sorted(counts)
    return np.array([first[k] for k in order], np.int64), np.array([counts[k] for k in order], np.int64)


def _few(counts: Counts) -> bool:
    """Whether so few rows are alike that drawing row by row is faster than by the distribution of counts."""
    return int(counts.sum()) < ALIKE * len(counts)


def _generator(seed: int, use: str) -> np.random.Generator:
    """Of one use: what else is drawn by a seed changes nothing."""
    return np.random.Generator(np.random.PCG64([seed % 2**64, *use.encode()]))


def _chunks(size: int, width: int) -> Iterator[int]:
    """`size` in parts, so that a part of rows of this width is no more than `CHUNK`."""
    part = max(1, CHUNK // max(1, width))
    for start in range(0, size, part):
        yield min(part, size - start)


def _draws(rng: np.random.Generator, counts: Counts, size: int) -> Iterator[Array]:
    """How often each distinct row is drawn, in `size` samples of as many rows as there are."""
    n, distinct = int(counts.sum()), len(counts)
    owners = np.repeat(np.arange(distinct), counts)
    for part in _chunks(size, n):
        if _few(counts):
            drawn = owners[rng.integers(0, n, (part, n))] + distinct * np.arange(part)[:, None]
            times = np.bincount(drawn.ravel(), minlength=part * distinct).reshape(part, distinct)
        else:
            times = rng.multinomial(n, counts / n, part)
        yield times.astype(np.float64)


def _swaps(rng: np.random.Generator, counts: Counts, size: int) -> Iterator[Array]:
    """How many of each distinct row's occurrences are swapped, `size` times, each with probability 1/2."""
    for part in _chunks(size, len(counts)):
        if counts.max() == 1:
            yield rng.integers(0, 2, (part, len(counts)), dtype=np.uint8).astype(np.float64)
        else:
            yield rng.binomial(counts, 0.5, (part, len(counts))).astype(np.float64)


def _every_swap(counts: Sequence[int]) -> tuple[Array, Array]:
    """All numbers of swapped occurrences, and the probability of each."""
    chances = [[math.comb(c, swapped) / 2**c for swapped in range(c + 1)] for c in counts]
    swapped = np.array(list(itertools.product(*(range(c + 1) for c in counts))), dtype=np.float64)
    return swapped, np.array([math.prod(chosen) for chosen in itertools.product(*chances)])


def _percentiles(values: Sequence[Array]) -> Interval:
    """The ends of the middle 95 %: values that came up, so that infinite ones need no arithmetic."""
    every = np.concatenate(values)
    known = np.sort(every[~np.isnan(every)])
    if len(known) == 0:
        return Interval(math.nan, math.nan)
    outside = int((1 - LEVEL) / 2 * len(known))
    return Interval(float(known[outside]), float(known[-1 - outside]))
