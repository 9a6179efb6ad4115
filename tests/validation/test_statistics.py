"""The comparison of two runs, and the gate that stands on it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from vllm_tasks.validation import resampling, statistics
from vllm_tasks.validation.intervals import wilson
from vllm_tasks.validation.resampling import Total, mean
from vllm_tasks.validation.statistics import (
    Paired,
    Sides,
    clustered,
    familywise,
    mean_rows,
    paired,
    regressed,
)

PAIRS = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0])] * 2), min_size=1, max_size=40)


def precision(sums: Sequence[float]) -> float:
    """A statistic that is no mean: a ratio of sums, squared."""
    return (sums[0] / sums[1]) ** 2 if sums[1] else math.nan


def between(before: Any, after: Any, total: Total = mean, *, higher_is_better: bool = True) -> Paired:
    return paired(Sides(np.asarray(before, float), np.asarray(after, float), total, higher_is_better))


def compared(before: Sequence[float | None], after: Sequence[float | None], **options: bool) -> Paired:
    return between(mean_rows(before), mean_rows(after), **options)


def seen(difference: float, p_worse: float) -> Paired:
    return Paired(difference, difference - 0.1, difference + 0.1, p_worse, min(1.0, 2 * p_worse), 100)


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
    result = between(before, after, precision)
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
    exact = between(before, after, total)
    monkeypatch.setattr(statistics, "EVERY_SWAP", 0)
    monkeypatch.setattr(resampling, "ALIKE", 8 if few else 0)
    sampled = between(before, after, total)
    assert sampled.p_worse == pytest.approx(exact.p_worse, abs=0.03)
    assert sampled.p_different == pytest.approx(exact.p_different, abs=0.03)


def test_the_smallest_p_of_a_sample_is_not_0() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(60) + 1
    assert compared(before.tolist(), (before - 1).tolist()).p_worse == 1 / (1 + statistics.SWAPS_OF_MEANS)
    sums = np.stack([before, np.ones(60)], axis=1)
    assert between(sums, sums * (0.1, 1), precision).p_worse == 1 / (1 + statistics.SWAPS_OF_SUMS)


@settings(deadline=None, max_examples=30)
@given(PAIRS, st.randoms())
def test_the_order_of_the_rows_changes_no_comparison(
    pairs: list[tuple[float, float]], order: random.Random
) -> None:
    shuffled = order.sample(pairs, len(pairs))
    here, there = (compared(*zip(*each, strict=True)) for each in (pairs, shuffled))
    assert repr(here) == repr(there)  # NaN is unequal to itself


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
    assert there.low <= there.high or len(pairs) == 1


def test_a_mean_as_a_ratio_of_sums_is_the_same_mean() -> None:
    """A mean is only faster; with up to 12 rows that differ, all swaps are computed either way."""
    rows, others = mean_rows([0.1, 0.9, 0.4, 0.4, 0.8]), mean_rows([0.2, 0.1, 0.3, 0.4, 0.9])
    assert between(rows, others, lambda s: s[0] / s[1]) == between(rows, others, mean)


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
        between(mean_rows([1.0, 0.0]), mean_rows([1.0]))
    with pytest.raises(ValueError, match="paired by position"):
        between([[1.0, 2.0]], [[1.0, 2.0, 3.0]])


# --- many limits at once


def accuracies(rng: np.random.Generator, metrics: int, rows: int = 120, lost: float = 0.0) -> list[Sides]:
    """Two runs of one model by metrics that agree in four of five rows; the second loses a fraction."""
    chances = rng.beta(1.2, 0.8, rows)

    def run(lost: float) -> list[Any]:
        right = (rng.random(rows) < chances) & (rng.random(rows) >= lost)
        return [np.where(rng.random(rows) < 0.2, rng.random(rows) < chances, right) for _ in range(metrics)]

    return [
        Sides(mean_rows(before.tolist()), mean_rows(after.tolist()))
        for before, after in zip(run(0.0), run(lost), strict=True)
    ]


def test_one_limit_alone_has_the_p_of_its_comparison() -> None:
    """Exact and sampled, with chance in either direction."""
    for seed, rows in itertools.product(range(5), (8, 200)):
        (one,) = accuracies(np.random.default_rng(seed), 1, rows)
        assert familywise([one]) == [pytest.approx(paired(one).p_worse, abs=1e-9)]


def test_limits_that_are_one_and_the_same_cost_nothing_and_others_cost_less_than_holms() -> None:
    """Twelve copies of a metric are one test; twelve that differ cost at most twelve times the least p."""
    (one,) = accuracies(np.random.default_rng(2), 1, lost=0.15)
    assert familywise([one] * 12) == [pytest.approx(paired(one).p_worse, abs=1e-9)] * 12
    several = accuracies(np.random.default_rng(2), 12, lost=0.1)
    alone, together = [paired(each).p_worse for each in several], familywise(several)
    assert all(q >= p - 0.01 for p, q in zip(alone, together, strict=True))
    assert min(together) < 12 * min(alone)


def test_twelve_limits_stop_a_model_that_did_not_change_in_at_most_5_of_100_runs() -> None:
    """Each limit on its own stops it in more."""
    rng = np.random.default_rng(0)
    runs = [accuracies(rng, 12) for _ in range(150)]
    together = sum(min(familywise(each)) <= 0.05 for each in runs)
    alone = sum(min(paired(one).p_worse for one in each) <= 0.05 for each in runs)
    assert wilson(together, 150).low <= 0.05 < wilson(alone, 150).low


def test_limits_of_other_directions_and_kinds_are_tested_together() -> None:
    """A metric that did not change, one by a ratio of sums, and one where less is better and more came."""
    rng = np.random.default_rng(3)
    same = mean_rows(rng.random(40).tolist())
    seconds = mean_rows((rng.random(40) + 1).tolist())
    found = familywise(
        [
            Sides(same, same),
            Sides(same, same * (0.9, 1), precision),
            Sides(seconds, seconds * (1.5, 1), mean, False),
        ]
    )
    assert found[0] == 1.0
    assert max(found[1:]) <= 0.01
    assert familywise([]) == []


def test_rows_of_one_passage_are_swapped_together() -> None:
    """Ten passages, of which eight got worse, with 20 equal rows each: the p of 8 of 10, not 160 of 200."""
    passages = [1.0] * 8 + [0.0] * 2
    one = Sides(
        mean_rows(np.repeat(passages, 20).tolist()),
        mean_rows(np.repeat([1 - p for p in passages], 20).tolist()),
    )
    clusters = np.repeat(np.arange(10), 20).tolist()
    expected = binomtest(2, 10, alternative="less").pvalue
    assert paired(one, clusters).p_worse == pytest.approx(expected)
    assert familywise([one], clusters) == [pytest.approx(expected)]
    assert paired(one).p_worse < 1e-3
    narrow, wide = paired(one), paired(one, clusters)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    assert clustered([(1.0, 1.0), (0.5, 1.0), (0.0, 1.0)], [7, 3, 7]).tolist() == [[0.5, 1.0], [1.0, 2.0]]


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
