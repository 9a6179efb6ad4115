"""Scores of rows and of sets, and scores compared row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.validation.exam import mine
from vllm_tasks import InvalidCall
from vllm_tasks.metrics.measure import Answer
from vllm_tasks.validation import Metric
from vllm_tasks.validation.scores import compared, score


def answers(*predictions: Any, targets: Any = "x") -> list[Answer]:
    return [
        Answer(i, targets, p, error="refused: no" if p is None else None) for i, p in enumerate(predictions)
    ]


@pytest.mark.parametrize("found", [math.nan, math.inf, 10**400, None, "much", [1.0]])
def test_a_score_that_is_no_number_is_refused(found: Any) -> None:
    """A score of a custom metric that is not a finite number is refused with its row, and not averaged."""
    with pytest.raises(InvalidCall, match=r"'mine' returned .* for row 1, which is no"):
        score(mine(lambda p, t: found if p == "b" else 1.0), answers("a", "b"), "miss")
    if found is not None:
        with pytest.raises(InvalidCall, match=r"'mine' returned .*, which is no"):
            score(mine(lambda ps, ts: found, over="set"), answers("a", "b"), "miss")


def test_a_score_beyond_the_largest_is_refused() -> None:
    """The square of 1e300 is no float, so no interval could be computed."""
    with pytest.raises(InvalidCall, match="for row 1, and an interval is computed for values up to 1e"):
        score(mine(lambda p, t: 1e300 if p == "b" else 1.0), answers("a", "b"), "miss")


def test_equal_scores_have_an_interval_that_is_called_approximate() -> None:
    """Without a spread and without bounds, an interval has no width, which claims too much."""
    found = score(mine(lambda p, t: 2.5), answers(*"ab" * 50), "miss").value
    assert (found.low, found.high) == (2.5, 2.5)
    assert found.approximate == "all scores are equal, which says nothing about the scores of other rows"
    assert score(mine(lambda p, t: 1.0), answers(*"ab" * 50), "miss").value.approximate is None


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("said", [["1"], ["1", "1", "1"], ["a", "b"]])
def test_a_correlation_without_a_spread_says_what_it_needs(name: str, said: list[str]) -> None:
    """The error does not stop at nan."""
    rows = [Answer(i, i, prediction) for i, prediction in enumerate(said)]
    with pytest.raises(InvalidCall, match=f"'{name}' is not defined for these .* neither these nor their"):
        score(Metric(identifier=name), rows, "miss")


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_correlation_is_of_the_rows_that_are_numbers(name: str) -> None:
    """Answers without a number neither count as rows nor make its interval narrow."""
    rows = [Answer(i, i, str(i) if i < 3 else "unknown") for i in range(100)]
    found = score(Metric(identifier=name), rows, "miss").value
    assert (found.value, found.n, found.clusters) == (pytest.approx(1), 3, 3)
    assert found.approximate == "3 independent rows are too few to be precise"
    assert found.high - found.low > 0.5


def test_a_row_that_counts_in_neither_run_is_no_evidence() -> None:
    """Two runs of which 3 rows are numbers may differ as two runs of 3 rows."""
    rows = [Answer(i, i, str(i) if i < 3 else "unknown") for i in range(100)]
    found = compared(Metric(identifier="pearson"), rows, rows, "miss")
    assert (found.difference, found.p_different) == (0.0, 1.0)
    assert found.high - found.low > 0.5


def test_two_rows_say_little_about_others() -> None:
    """Their resamples have no spread, which is no certainty."""
    lengths = mine(lambda p, t: 100.0 * len(p))
    found = score(lengths, answers("a", "aaa"), "miss").value
    assert (found.value, found.low, found.high) == (200.0, -math.inf, math.inf)
    found = score(Metric(identifier="token_f1"), answers("x y", "x y z"), "miss").value
    assert 0 <= found.low < 0.4
    assert 0.8 < found.high <= 1


def test_equal_scores_of_clusters_are_equal() -> None:
    """Three times 0.1 is not 0.3, and its mean not 0.1."""
    found = score(mine(lambda p, t: 0.1), answers(*"aaab"), "miss", [0, 0, 0, 3]).value
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))


def test_a_failed_row_has_no_score_where_less_is_better() -> None:
    """A miss would be the best score there, so the row is left out and counted."""
    edits = mine(lambda p, t: float(len(p)), higher_is_better=False)
    found = score(edits, answers("aa", None, "aaaa"), "miss")
    assert (found.value.value, found.value.n, found.value.failed) == (3.0, 2, 1)
    assert found.scores == {0: 2.0, 2: 4.0}
    with pytest.raises(InvalidCall, match="nothing to score: all 2 rows failed, for example: refused: no"):
        score(edits, answers(None, None), "miss")


def test_a_metric_of_the_set_sees_failed_rows_as_none() -> None:
    """`over="set"` gets all rows at once; a failed row's prediction is None, or left out with `exclude`."""
    seen = []

    def share(predictions: list[Any], targets: list[Any]) -> float:
        seen.append(predictions)
        return sum(p == t for p, t in zip(predictions, targets, strict=True)) / len(targets)

    found = score(mine(share, over="set"), answers("x", None, "y", "x"), "miss")
    assert seen[0] == ["x", None, "y", "x"]
    assert (found.value.value, found.value.n, found.scores) == (0.5, 4, {})
    assert found.value.low <= 0.5 <= found.value.high
    assert score(mine(share, over="set"), answers("x", None, "y", "x"), "exclude").value.value == 2 / 3


def test_resamples_without_a_value_are_left_out() -> None:
    """A metric of the set that is undefined for some resamples has an interval from the others."""

    def precision(predictions: list[Any], targets: list[Any]) -> float:
        said = [t == "x" for p, t in zip(predictions, targets, strict=True) if p == "x"]
        return sum(said) / len(said) if said else math.nan

    found = score(mine(precision, over="set"), answers("x", "y", "y"), "miss")
    assert (found.value.value, found.value.high) == (1.0, 1.0)
    assert 0 < found.value.low < 1


def test_a_metric_of_the_set_that_raises_is_named() -> None:
    """The exception of a metric over a set is raised with the metric's name."""
    with pytest.raises(InvalidCall, match="'mine' failed: ZeroDivisionError"):
        score(mine(lambda ps, ts: 1 / 0, over="set"), answers("a"), "miss")


def test_options_reach_a_metric() -> None:
    """Options are keywords of the function, even if a built-in metric uses their name differently."""
    split = mine(lambda p, t, *, delimiter: float(len(p.split(delimiter))), options={"delimiter": ";"})
    assert score(split, answers("a;b;c"), "miss").value.value == 3.0


def test_runs_are_compared_row_by_row() -> None:
    """The difference is after minus before, over rows that have a score in both."""
    before, after = answers(*"xxxxyyyyxx"), answers(*"xxxxxxxxxx")
    found = compared(Metric(identifier="exact_match"), before, after, "miss")
    assert (found.difference, found.rows) == (0.4, 10)
    assert (found.p_worse, found.p_different) == (1.0, 0.125)  # 4 coins that all fall one way, or all alike
    with pytest.raises(InvalidCall, match="whole sets"):
        compared(mine(max, over="set"), before, after, "miss")
