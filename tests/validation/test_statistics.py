"""Intervals of a metric, the comparison of two runs, and the gate that stands on it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from vllm_tasks.validation import resampling, statistics
from vllm_tasks.validation.resampling import Total, mean
from vllm_tasks.validation.statistics import (
    Interval,
    Paired,
    bootstrap,
    bootstrap_set,
    mean_interval,
    mean_rows,
    paired,
    regressed,
    wilson,
)

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40)
PAIRS = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0])] * 2), min_size=1, max_size=40)


def precision(sums: Sequence[float]) -> float:
    """A statistic that is no mean: a ratio of sums, squared."""
    return (sums[0] / sums[1]) ** 2 if sums[1] else math.nan


def compared(before: Sequence[float | None], after: Sequence[float | None], **options: bool) -> Paired:
    return paired(mean_rows(before), mean_rows(after), mean, **options)


def seen(difference: float, p_worse: float) -> Paired:
    return Paired(difference, difference - 0.1, difference + 0.1, p_worse, min(1.0, 2 * p_worse), 100)


# --- wilson


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
        with pytest.raises(ValueError, match="no proportion"):
            wilson(hits, n)


# --- values and intervals


@settings(deadline=None, max_examples=30)
@given(SCORES, st.randoms())
def test_the_order_of_the_rows_changes_no_interval(scores: list[float], order: random.Random) -> None:
    awkward = [s / 3 for s in scores]
    shuffled = order.sample(awkward, len(awkward))
    assert mean_interval(shuffled, seed=1) == mean_interval(awkward, seed=1)


def test_zero_is_zero_whatever_its_sign() -> None:
    """Scores that are equal are drawn alike: 0.0 and -0.0 have other bits."""
    draw = random.Random(0)
    scores = [draw.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(100)]
    signed = [-s if s == 0 and draw.random() < 0.5 else s for s in scores]
    others = scores[::-1]
    assert mean_interval(signed) == mean_interval(scores)
    assert compared(signed, others) == compared(scores, others)
    assert compared(others, signed) == compared(others, scores)


def test_equal_seeds_give_equal_intervals_and_others_others() -> None:
    scores = np.random.default_rng(0).random(200).tolist()
    assert mean_interval(scores, 7) == mean_interval(scores, 7) != mean_interval(scores, 8)
    assert mean_interval(scores, -1) != mean_interval(scores, 1)


@pytest.mark.parametrize("scores", [[0.3], [1.0] * 50, [0.5, None, 0.5]])
def test_an_interval_of_equal_rows_has_no_width(scores: list[float | None]) -> None:
    known = [s for s in scores if s is not None]
    assert mean_interval(scores) == Interval(known[0], known[0])


@pytest.mark.parametrize("scores", [[], [None, None]])
def test_of_no_scores_nothing_is_known(scores: list[float | None]) -> None:
    interval = mean_interval(scores)
    assert math.isnan(mean((0.0, 0.0)))
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_resamples_without_a_value_are_left_out() -> None:
    """One row of two has a score, so a quarter of the resamples draws only the other row."""
    assert mean_interval([0.5, None]) == Interval(0.5, 0.5)
    assert bootstrap([(0.5, 1.0), (0.0, 0.0)], precision) == Interval(0.25, 0.25)


def test_infinite_values_are_ends_like_any_other() -> None:
    assert bootstrap([(1.0, 0.0), (0.0, 1.0)], lambda s: s[0] / s[1] if s[1] else math.inf) == Interval(
        0, math.inf
    )


@pytest.mark.parametrize("score", ["0 or 1", "continuous"])
def test_the_bootstrap_covers_the_true_mean_about_95_times_of_100(score: str) -> None:
    rng = np.random.default_rng(0)
    samples = [
        (rng.random(120) < 0.4) * 1.0 if score == "0 or 1" else rng.beta(2, 3, 120) for _ in range(200)
    ]
    intervals = [mean_interval(sample.tolist(), seed) for seed, sample in enumerate(samples)]
    assert 0.91 <= sum(i.low <= 0.4 <= i.high for i in intervals) / len(intervals) <= 0.98


def test_the_interval_of_a_mean_is_about_two_standard_errors_wide_on_each_side() -> None:
    scores = np.random.default_rng(1).normal(0, 1, 1_000)
    interval = mean_interval(scores.tolist())
    error = scores.std() / math.sqrt(1_000)
    assert interval.low == pytest.approx(scores.mean() - 1.96 * error, abs=0.2 * error)
    assert interval.high == pytest.approx(scores.mean() + 1.96 * error, abs=0.2 * error)


def test_rows_drawn_in_parts_are_the_rows_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = mean_rows(np.random.default_rng(0).random(50).tolist())
    others = rows[::-1] * 0.9
    at_once = bootstrap(rows), paired(rows, others)
    monkeypatch.setattr(resampling, "CHUNK", 1_000)
    low, high = bootstrap(rows).low, bootstrap(rows).high
    assert (low, high) == (pytest.approx(at_once[0].low), pytest.approx(at_once[0].high))
    assert paired(rows, others).p_worse == pytest.approx(at_once[1].p_worse, abs=0.02)


def test_a_set_is_scored_again_for_each_resample() -> None:
    scores = np.random.default_rng(0).random(300)
    asked: list[list[int]] = []

    def score(positions: Sequence[int]) -> float:
        asked.append(list(positions))
        return float(scores[list(positions)].mean())

    interval = bootstrap_set(score, 300, seed=3)
    assert len(asked) == statistics.RESAMPLES_OF_SETS
    assert all(len(positions) == 300 and positions == sorted(positions) for positions in asked)
    assert len({*map(tuple, asked)}) == len(asked)
    assert interval == bootstrap_set(score, 300, seed=3)
    assert interval.low == pytest.approx(mean_interval(scores.tolist()).low, abs=0.01)
    assert interval.high == pytest.approx(mean_interval(scores.tolist()).high, abs=0.01)


def test_a_set_of_one_row_of_none_and_without_a_value() -> None:
    assert bootstrap_set(lambda _: 0.7, 1) == Interval(0.7, 0.7)
    assert math.isnan(bootstrap_set(lambda _: 0.7, 0).low)
    assert math.isnan(bootstrap_set(lambda _: math.nan, 5).high)


# --- two runs


def test_p_of_means_is_the_share_of_all_sign_flips() -> None:
    before, after = [0.9, 0.5, 0.75, 0.25, 1.0, 0.5, 0.1], [0.5, 0.25, 1.0, 0.0, 0.5, 0.5, 0.0]
    moved = [b - a for a, b in zip(before, after, strict=True)]
    flips = [
        sum(s * d for s, d in zip(signs, moved, strict=True))
        for signs in itertools.product((1, -1), repeat=7)
    ]
    result = compared(before, after)
    assert result.difference == pytest.approx(sum(moved) / 7)
    assert result.p_worse == pytest.approx(sum(f <= sum(moved) + 1e-9 for f in flips) / 128)
    assert result.p_different == pytest.approx(sum(abs(f) >= abs(sum(moved)) - 1e-9 for f in flips) / 128)
    assert result.rows == 7


def test_p_of_sums_is_the_share_of_all_swaps() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.integers(1, 9, (8, 2)).astype(float), rng.integers(1, 9, (8, 2)).astype(float)
    gains = []
    for swap in itertools.product((False, True), repeat=8):
        swapped = np.array(swap)[:, None]
        new, old = np.where(swapped, before, after), np.where(swapped, after, before)
        gains.append(precision(new.sum(axis=0).tolist()) - precision(old.sum(axis=0).tolist()))
    result = paired(before, after, precision)
    assert result.difference == pytest.approx(gains[0])
    assert result.p_worse == pytest.approx(sum(g <= gains[0] + 1e-12 for g in gains) / 256)
    assert result.p_different == pytest.approx(sum(abs(g) >= abs(gains[0]) - 1e-12 for g in gains) / 256)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 30))
def test_of_scores_of_0_and_1_it_is_mcnemars_exact_test(losses: int, wins: int, same: int) -> None:
    """McNemar 1947: the binomial test of the improved rows among the rows that differ."""
    before = [1.0] * losses + [0.0] * wins + [1.0] * same
    after = [0.0] * losses + [1.0] * wins + [1.0] * same
    result = compared(before, after)
    if wins + losses == 0:
        assert (result.p_worse, result.p_different) == (1.0, 1.0)
        return
    assert result.p_worse == pytest.approx(binomtest(wins, wins + losses, alternative="less").pvalue)
    assert result.p_different == pytest.approx(binomtest(wins, wins + losses).pvalue)


@pytest.mark.parametrize(("losses", "wins"), [(130, 100), (500, 520), (90, 60)])
def test_a_sample_of_swaps_is_close_to_mcnemars_test(losses: int, wins: int) -> None:
    result = compared([1.0] * losses + [0.0] * wins, [0.0] * losses + [1.0] * wins)
    assert result.p_worse == pytest.approx(
        binomtest(wins, wins + losses, alternative="less").pvalue, abs=0.015
    )
    assert result.p_different == pytest.approx(binomtest(wins, wins + losses).pvalue, abs=0.015)


@pytest.mark.parametrize("total", [mean, precision])
@pytest.mark.parametrize("few", [True, False], ids=["row by row", "by counts"])
def test_a_sample_of_swaps_is_close_to_all_of_them(
    total: Total, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(4)
    before = [(float(x), 1.0) for x in rng.random(10)]
    after = [(x - float(d), 1.0) for (x, _), d in zip(before, rng.normal(0.1, 0.3, 10), strict=True)]
    exact = paired(before, after, total)
    monkeypatch.setattr(statistics, "EVERY_SWAP", 0)
    monkeypatch.setattr(resampling, "ALIKE", 8 if few else 0)
    sampled = paired(before, after, total)
    assert sampled.p_worse == pytest.approx(exact.p_worse, abs=0.03)
    assert sampled.p_different == pytest.approx(exact.p_different, abs=0.03)


def test_the_smallest_p_of_a_sample_is_not_0() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(60) + 1
    assert compared(before.tolist(), (before - 1).tolist()).p_worse == 1 / (1 + statistics.SWAPS_OF_MEANS)
    sums = np.stack([before, np.ones(60)], axis=1)
    assert paired(sums, sums * (0.1, 1), precision).p_worse == 1 / (1 + statistics.SWAPS_OF_SUMS)


@settings(deadline=None, max_examples=30)
@given(PAIRS, st.randoms())
def test_the_order_of_the_rows_changes_no_comparison(
    pairs: list[tuple[float, float]], order: random.Random
) -> None:
    shuffled = order.sample(pairs, len(pairs))
    assert compared(*zip(*pairs, strict=True)) == compared(*zip(*shuffled, strict=True))


@settings(deadline=None, max_examples=30)
@given(PAIRS)
def test_what_is_worse_one_way_is_better_the_other(pairs: list[tuple[float, float]]) -> None:
    before, after = zip(*pairs, strict=True)
    there, back = compared(before, after), compared(after, before, higher_is_better=False)
    assert there.difference == -back.difference
    assert there.p_worse == pytest.approx(back.p_worse, abs=0.03)
    assert there.p_different == pytest.approx(back.p_different, abs=0.03)
    assert 0 < there.p_worse <= 1
    assert 0 < there.p_different <= 1
    assert there.low <= there.high


def test_a_mean_as_a_ratio_of_sums_is_the_same_mean() -> None:
    """A mean is only faster; with up to 12 rows that differ, all swaps are computed either way."""
    rows, others = mean_rows([0.1, 0.9, 0.4, 0.4, 0.8]), mean_rows([0.2, 0.1, 0.3, 0.4, 0.9])
    assert paired(rows, others, lambda s: s[0] / s[1]) == paired(rows, others, mean)


def test_a_row_that_has_a_score_in_one_run_only_counts_in_that_one() -> None:
    result = compared([1.0, 0.5, None], [1.0, None, 0.0])
    assert result.difference == 0.5 - 0.75
    assert result.rows == 3


def test_runs_that_agree_differ_by_nothing() -> None:
    assert compared([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]) == Paired(0.0, 0.0, 0.0, 1.0, 1.0, 3)


def test_no_rows_and_no_value_tell_nothing() -> None:
    for result in compared([], []), compared([None, None], [1.0, 0.0]):
        assert math.isnan(result.difference)
        assert math.isnan(result.low)
        assert (result.p_worse, result.p_different) == (1.0, 1.0)
        assert not regressed(result, 0.0)


def test_swaps_without_a_value_count_as_extreme() -> None:
    """Of the four ways to swap these two rows, two leave one side without a score, and one is better."""
    result = compared([1.0, None], [None, 0.5])
    assert (result.difference, result.p_worse, result.p_different) == (-0.5, 0.75, 1.0)


def test_runs_over_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="paired by position"):
        paired(mean_rows([1.0, 0.0]), mean_rows([1.0]))
    with pytest.raises(ValueError, match="paired by position"):
        paired([[1.0, 2.0]], [[1.0, 2.0, 3.0]])


# --- the gate


@pytest.mark.parametrize(
    ("difference", "p_worse", "most", "higher_is_better", "fires"),
    [
        (-0.03, 0.01, 0.02, True, True),
        (-0.03, 0.05, 0.02, True, True),
        (-0.03, 0.0501, 0.02, True, False),
        (-0.02, 0.01, 0.02, True, False),
        (0.78 - 0.80, 0.01, 0.02, True, False),  # -0.020000000000000018
        (0.03, 0.01, 0.02, True, False),
        (0.03, 0.01, 0.02, False, True),
        (-0.03, 0.01, 0.02, False, False),
        (0.0, 1.0, 0.0, True, False),
        (-1e-6, 0.01, 0.0, True, True),
        (math.nan, 0.01, 0.0, True, False),
    ],
)
def test_it_fires_for_more_than_is_allowed_and_not_by_chance(
    difference: float, p_worse: float, most: float, higher_is_better: bool, fires: bool
) -> None:
    assert regressed(seen(difference, p_worse), most, higher_is_better) is fires


def test_a_metric_where_less_is_better_regresses_upwards() -> None:
    seconds = np.random.default_rng(0).random(200) + 1
    slower = compared(seconds.tolist(), (1.2 * seconds).tolist(), higher_is_better=False)
    faster = compared(seconds.tolist(), (0.8 * seconds).tolist(), higher_is_better=False)
    assert regressed(slower, 0.1, higher_is_better=False)
    assert not regressed(slower, 0.4, higher_is_better=False)
    assert not regressed(faster, 0.1, higher_is_better=False)


@pytest.mark.parametrize("rows", [30, 200])
def test_a_model_that_did_not_change_is_stopped_in_at_most_5_of_100_comparisons(rows: int) -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        chances = rng.beta(0.8, 1.2, rows)
        before, after = rng.random(rows) < chances, rng.random(rows) < chances
        alarms += regressed(compared(before.tolist(), after.tolist()), 0.0)
    assert wilson(alarms, 300).low <= 0.05


def test_a_model_of_which_one_right_answer_in_four_turned_wrong_is_stopped() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(400) < 0.4
    after = before & (rng.random(400) < 0.75)
    assert regressed(compared(before.tolist(), after.tolist()), 0.02)
