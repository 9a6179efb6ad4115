"""Intervals of metrics: they hold the true value about 95 times of 100, whatever the metric."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest

from benchmarks import coverage
from vllm_tasks.metrics.measure import Answer
from vllm_tasks.validation import Metric, intervals, resampling
from vllm_tasks.validation.intervals import (
    Interval,
    effective,
    mean_interval,
    proportion,
    set_interval,
    sums_interval,
    wilson,
)
from vllm_tasks.validation.resampling import mean
from vllm_tasks.validation.scores import score
from vllm_tasks.validation.statistics import clustered, mean_rows

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40)


def of(
    scores: Sequence[float | None], bounds: tuple[float, float] = intervals.UNKNOWN, seed: int = 0
) -> Interval:
    return mean_interval(mean_rows(scores), bounds, seed)


def precision(sums: Sequence[float]) -> float:
    """A statistic that is no mean: a ratio of sums, squared."""
    return (sums[0] / sums[1]) ** 2 if sums[1] else math.nan


# --- fractions


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_intervals_that_newcombe_published(
    hits: int, n: int, low: float, high: float
) -> None:
    """Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3."""
    assert (wilson(hits, n).low, wilson(hits, n).high) == (
        pytest.approx(low, abs=5e-5),
        pytest.approx(high, abs=5e-5),
    )


@given(st.integers(1, 5_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_scipy_and_stays_within_0_and_1(sample: tuple[int, int]) -> None:
    hits, n = sample
    theirs = binomtest(hits, n).proportion_ci(method="wilson")
    ours = wilson(hits, n)
    assert (ours.low, ours.high) == (
        pytest.approx(theirs.low, abs=1e-12),
        pytest.approx(theirs.high, abs=1e-12),
    )
    assert 0 <= ours.low <= hits / n <= ours.high <= 1


def test_wilson_of_nothing_is_everything_and_of_more_hits_than_rows_an_error() -> None:
    assert wilson(0, 0) == Interval(0.0, 1.0)
    for hits, n in (3, 2), (-1, 2):
        with pytest.raises(ValueError, match="not a proportion"):
            wilson(hits, n)


@given(st.integers(1, 2_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_few_hits_or_misses_are_corrected_for_continuity(sample: tuple[int, int]) -> None:
    hits, n = sample
    method = "wilsoncc" if min(hits, n - hits) <= 5 else "wilson"
    theirs, ours = binomtest(hits, n).proportion_ci(method=method), proportion(hits, n)
    assert (ours.low, ours.high) == (
        pytest.approx(theirs.low, abs=1e-9),
        pytest.approx(theirs.high, abs=1e-9),
    )


@pytest.mark.parametrize("n", [20, 100, 1_000])
def test_the_interval_of_a_fraction_dips_nowhere(n: int) -> None:
    """Summed exactly over all outcomes, for 999 probabilities; plain Wilson's holds 89.5 % at worst."""
    held = coverage.fractions_held(n)
    assert min(held) >= 0.93
    assert 0.95 <= np.mean(held) <= 0.97


# --- coverage, by the code of the benchmark


@pytest.mark.parametrize("case", coverage.cases()[:10], ids=lambda case: case.what)
def test_intervals_of_means_hold_the_truth(case: coverage.Case) -> None:
    """Skewed, at a bound, clustered; what is marked as approximate is exempt."""
    held, marked = coverage.coverage(case, 100, 200)
    assert wilson(round(200 * held), 200).high >= 0.93 or marked > 0.4
    assert wilson(round(200 * held), 200).low <= 0.98


@pytest.mark.parametrize(
    "case",
    [c for c in coverage.cases() if c.metric.identifier not in ("own", "chrf")],
    ids=lambda case: case.what,
)
def test_intervals_of_sums_and_sets_hold_the_truth(case: coverage.Case) -> None:
    """Macro F1 with classes of three rows, correlations, and a calibration error of 0."""
    times = 60 if case.metric.identifier == "spearman" else 150
    held, _ = coverage.coverage(case, 100, times)
    assert wilson(round(times * held), times).high >= 0.93


# --- means between bounds


def test_scores_of_0_and_1_have_jeffreys_interval() -> None:
    """Half a row at each bound is Jeffreys' prior (Brown, Cai, DasGupta 2001, Statistical Science 16)."""
    found, posterior = of([1.0] * 7 + [0.0] * 23, (0.0, 1.0)), beta(7.5, 23.5)
    assert found.low == pytest.approx(posterior.ppf(0.025), abs=0.015)
    assert found.high == pytest.approx(posterior.ppf(0.975), abs=0.015)


@pytest.mark.parametrize(
    ("scores", "bounds"), [([1.0] * 50, (0.0, 1.0)), ([5.0] * 50, (1.0, 5.0)), ([0.5], (0.0, 1.0))]
)
def test_an_interval_between_bounds_does_not_collapse(
    scores: list[float], bounds: tuple[float, float]
) -> None:
    """Fifty answers that are all right are compatible with one miss in 50."""
    found = of(scores, bounds)
    assert bounds[0] <= found.low < scores[0] - 0.03 * (bounds[1] - bounds[0])
    assert scores[0] <= found.high <= bounds[1]


def test_scores_of_your_own_get_the_scale_that_they_seem_to_have() -> None:
    """Ratings of 1 to 5 that are all 5; counts beyond any scale have no bounds, and none is made up."""

    def low(scores: Sequence[float]) -> float:
        metric = Metric(identifier="own", object=coverage.own)
        return score(metric, [Answer(i, "", s) for i, s in enumerate(scores)], "miss").value.low

    assert 4.8 < low([5.0] * 60) < 4.99
    assert 0.9 < low([1.0] * 60) < 0.96
    assert low([300.0] * 60) == 300.0
    assert -0.5 < low([-1.0, 0.25] * 60) < -0.375


# --- other means


@pytest.mark.parametrize("scores", [[0.3], [1.0] * 50, [0.5, None, 0.5]])
def test_an_interval_of_equal_rows_without_bounds_has_no_width(scores: list[float | None]) -> None:
    known = [s for s in scores if s is not None]
    assert of(scores) == Interval(known[0], known[0])


@pytest.mark.parametrize("scores", [[], [None, None]])
def test_of_no_scores_nothing_is_known(scores: list[float | None]) -> None:
    interval = of(scores)
    assert math.isnan(mean((0.0, 0.0)))
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_a_skewed_mean_has_more_room_above() -> None:
    """Bootstrap-t, where the percentiles of a bootstrap would be nearly symmetric."""
    scores = np.random.default_rng(0).lognormal(0, 1, 100)
    found, value = of(scores.tolist()), scores.mean()
    assert found.high - value > 1.2 * (value - found.low)


def test_a_mean_that_a_few_rows_decide_is_marked() -> None:
    rng = np.random.default_rng(0)

    def marked(scores: Any) -> str | None:
        metric = Metric(identifier="own", object=coverage.own)
        return score(metric, [Answer(i, "", s) for i, s in enumerate(scores)], "miss").value.approximate

    assert "a few rows decide this mean" in str(marked([*rng.random(100).tolist(), 5_000.0]))
    assert marked(rng.normal(500, 10, 100).tolist()) is None
    assert marked(rng.normal(500, 10, 29).tolist()) == "29 independent rows are too few to be precise"


@settings(deadline=None, max_examples=30)
@given(SCORES, st.randoms())
def test_the_order_of_the_rows_changes_no_interval(scores: list[float], order: random.Random) -> None:
    awkward = [s / 3 for s in scores]
    shuffled = order.sample(awkward, len(awkward))
    for bounds in intervals.UNKNOWN, (0.0, 1.0):
        assert repr(of(shuffled, bounds, 1)) == repr(of(awkward, bounds, 1))  # NaN is unequal to itself
    both = [sums_interval(mean_rows(each), precision) for each in (shuffled, awkward)]
    assert repr(both[0]) == repr(both[1])


def test_zero_is_zero_whatever_its_sign() -> None:
    """Scores that are equal are drawn alike: 0.0 and -0.0 have other bits."""
    draw = random.Random(0)
    scores = [draw.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(100)]
    signed = [-s if s == 0 and draw.random() < 0.5 else s for s in scores]
    assert of(signed) == of(scores)


def test_equal_seeds_give_equal_intervals_and_others_others() -> None:
    scores = np.random.default_rng(0).random(200).tolist()
    assert of(scores, seed=7) == of(scores, seed=7) != of(scores, seed=8)
    assert of(scores, seed=-1) != of(scores, seed=1)


def test_rows_drawn_in_parts_are_the_rows_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).random(50).tolist()
    at_once = of(scores), of([*scores, 1.0], (0.0, 1.0)), sums_interval(mean_rows(scores), precision)
    monkeypatch.setattr(resampling, "CHUNK", 1_000)
    parts = of(scores), of([*scores, 1.0], (0.0, 1.0)), sums_interval(mean_rows(scores), precision)
    for one, other in zip(at_once, parts, strict=True):
        assert (one.low, one.high) == (pytest.approx(other.low), pytest.approx(other.high))


def test_rows_of_a_cluster_count_as_one() -> None:
    """Ten equal rows of each of 40 passages have the interval of 40 rows."""
    scores = np.random.default_rng(0).random(40)
    clusters = np.repeat(np.arange(40), 10).tolist()
    found = mean_interval(clustered(mean_rows(np.repeat(scores, 10).tolist()), clusters))
    alone = of(scores.tolist())
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.05)


# --- sums and sets


def test_the_error_of_a_mean_as_a_function_of_sums_is_that_of_the_mean() -> None:
    """The jackknife's standard error of a mean is s / sqrt(n); with over 2,000 rows, by groups of them."""
    for n in 500, 5_000:
        scores = np.random.default_rng(1).normal(0, 1, n)
        found, error = sums_interval(mean_rows(scores.tolist()), mean), scores.std(ddof=1) / math.sqrt(n)
        assert found.low == pytest.approx(scores.mean() - 1.96 * error, abs=0.15 * error)
        assert found.high == pytest.approx(scores.mean() + 1.96 * error, abs=0.15 * error)


def test_rows_without_which_there_is_no_value_are_left_out() -> None:
    assert sums_interval([(0.5, 1.0), (0.0, 0.0)], precision).low == 0.25
    assert math.isnan(sums_interval([(0.5, 1.0)], precision).low)
    assert math.isnan(sums_interval(np.zeros((0, 2)), precision).low)
    assert math.isnan(sums_interval([(0.0, 0.0), (0.0, 0.0)], precision).low)


@pytest.mark.parametrize(("hits", "n"), [(0, 40), (12, 40), (40, 40), (311, 400)])
def test_a_fraction_by_its_error_has_about_wilsons_interval(hits: int, n: int) -> None:
    p = hits / n
    found, expected = effective(p, math.sqrt(p * (1 - p) / n), n, (0.0, 1.0)), wilson(hits, n)
    assert (found.low, found.high) == (
        pytest.approx(expected.low, abs=0.02),
        pytest.approx(expected.high, abs=0.02),
    )


def test_a_value_with_a_lower_bound_alone_has_its_error_on_the_logarithms_scale() -> None:
    found = effective(3.0, 0.5, 100, (1.0, math.inf))
    assert (found.low - 1) * (found.high - 1) == pytest.approx(4.0)
    assert found.high == pytest.approx(1 + 2 * math.exp(1.96 * 0.25), rel=1e-3)


def test_a_set_is_scored_again_for_each_resample() -> None:
    scores = np.random.default_rng(0).random(300)
    asked: list[list[int]] = []

    def of_set(positions: Sequence[int]) -> float:
        asked.append(list(positions))
        return float(scores[list(positions)].mean())

    rows = [[i] for i in range(300)]
    interval = set_interval(of_set, float(scores.mean()), rows, seed=3)
    assert len(asked) == intervals.RESAMPLES_OF_SETS
    assert all(len(positions) == 300 and positions == sorted(positions) for positions in asked)
    assert len({*map(tuple, asked)}) == len(asked)
    assert interval == set_interval(of_set, float(scores.mean()), rows, seed=3)
    assert interval.low == pytest.approx(of(scores.tolist()).low, abs=0.01)
    assert interval.high == pytest.approx(of(scores.tolist()).high, abs=0.01)


def test_clusters_of_a_set_are_drawn_together() -> None:
    drawn: list[list[int]] = []
    set_interval(lambda rows: drawn.append(list(rows)) or 0.0, 0.0, [[0, 3], [1], [2]])  # type: ignore[func-returns-value]
    assert all(rows.count(0) == rows.count(3) for rows in drawn)
    assert {len(rows) for rows in drawn} == {3, 4, 5, 6}


def test_a_set_without_bounds_of_none_and_without_a_value() -> None:
    assert set_interval(lambda _: 7.0, 7.0, [[0]]) == Interval(7.0, 7.0)
    assert set_interval(lambda _: 0.7, 0.7, [[0]]).low < 0.7
    assert math.isnan(set_interval(lambda _: 0.7, 0.7, []).low)
    assert math.isnan(set_interval(lambda _: math.nan, 0.7, [[0]]).high)
