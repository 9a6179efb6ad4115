"""Metrics of probabilities: their values against references, and the page of a validation of classes."""

from __future__ import annotations

import copy
import math
import pickle
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from benchmarks.risk import curve
from tests.validation.scoring import score
from vllm_tasks import InvalidCall
from vllm_tasks.metrics.classes import Label
from vllm_tasks.metrics.measure import Answer, Reliability, Sums

quick = settings(deadline=None, max_examples=40)
NAMES = ["a", "b", "c"]


def label(*weights: float) -> Label:
    """The answer of a model that gives the classes these weights."""
    probabilities = {name: w / math.fsum(weights) for name, w in zip(NAMES, weights, strict=False)}
    return Label.of(max(probabilities, key=probabilities.__getitem__), probabilities)


WEIGHT = st.floats(0.01, 1)
ROWS = st.lists(
    st.tuples(st.builds(label, WEIGHT, WEIGHT, WEIGHT), st.sampled_from(NAMES)), min_size=1, max_size=30
)


def brier(rows: list[tuple[Label, str]]) -> float:
    return math.fsum(score("brier", Answer(0, target, found)) for found, target in rows) / len(rows)


def ece(rows: list[tuple[Any, str]], **options: Any) -> Sums:
    found = score("expected_calibration_error", [p for p, _ in rows], [t for _, t in rows], **options)
    assert isinstance(found, Sums)
    return found


def value(found: Sums, rows: list[int] | None = None) -> float:
    chosen = found.rows if rows is None else [found.rows[i] for i in rows]
    return found.total([math.fsum(column) for column in zip(*chosen, strict=True)])


@quick
@given(rows=ROWS)
def test_brier_is_scikit_learns(rows: list[tuple[Label, str]]) -> None:
    """With three classes, halved, as `scale_by_half` does."""
    probabilities = [[found.probabilities[name] for name in NAMES] for found, _ in rows]
    expected = brier_score_loss([t for _, t in rows], probabilities, labels=NAMES, scale_by_half=True)
    assert brier(rows) == pytest.approx(expected, abs=1e-12)


def test_brier_of_two_classes_is_that_of_one_of_them() -> None:
    """Scikit-learn takes the probability of one class then."""
    rows = [(label(p, 1 - p), t) for p, t in ((0.9, "a"), (0.6, "b"), (0.2, "b"))]
    expected = brier_score_loss([t == "a" for _, t in rows], [found.probabilities["a"] for found, _ in rows])
    assert brier(rows) == pytest.approx(expected)
    assert score("brier", Answer(0, "unknown", label(1, 1e-9))) == pytest.approx(1)


@pytest.mark.parametrize("bins", [1, 3, 10])
@quick
@given(rows=ROWS)
def test_the_calibration_error_is_its_definition(rows: list[tuple[Label, str]], bins: int) -> None:
    """Brute force: numpy's bins, each with its accuracy, its mean confidence and its share of the rows."""
    confidence = np.array([max(found.probabilities.values()) for found, _ in rows])
    right = np.array([found == target for found, target in rows], dtype=float)
    bin_of = np.digitize(confidence, np.arange(1, bins) / bins, right=True)
    expected = 0.0
    for i in range(bins):
        if (inside := bin_of == i).any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert value(ece(rows, bins=bins)) == pytest.approx(expected, abs=1e-9)


def test_a_failed_row_has_no_part_in_the_calibration_error() -> None:
    """It has no probability; a set of failed rows alone has no value."""
    rows = [(label(0.75, 0.25), "a"), (label(0.75, 0.25), "b")]
    assert value(ece([*rows, (None, "a")])) == value(ece(rows)) == pytest.approx(0.25)
    assert math.isnan(value(ece([(None, "a")])))


def test_resampled_sums_are_the_error_of_the_resample() -> None:
    """So intervals and paired tests need no further scoring."""
    drawn = random.Random(0)
    rows = [(label(drawn.random(), drawn.random()), drawn.choice("ab")) for _ in range(50)]
    chosen = drawn.choices(range(50), k=50)
    assert value(ece(rows), chosen) == pytest.approx(value(ece([rows[i] for i in chosen])))


def test_reliability_has_the_bins_with_rows() -> None:
    """A bin is open below and has its rows, their mean probability and the fraction that is right."""
    rows = [(label(0.8, 0.2), "a"), (label(0.75, 0.25), "b"), (label(0.35, 0.65), "b")]
    found = ece(rows).table
    assert isinstance(found, Reliability)
    assert [(b.low, b.high, b.rows, b.right) for b in found.bins] == [(0.6, 0.7, 1, 1.0), (0.7, 0.8, 2, 0.5)]
    assert found.bins[1].probability == pytest.approx(0.775)


def test_answers_without_probabilities_are_refused() -> None:
    for wrong in (lambda: score("brier", Answer(0, "a", "a")), lambda: ece([("a", "a")])):
        with pytest.raises(InvalidCall, match="datatype=Classes"):
            wrong()
    for bins in (0, 101, 2.5, True):
        with pytest.raises(InvalidCall, match="whole number from 1 to 100"):
            ece([(label(1), "a")], bins=bins)


def test_text_metrics_take_the_label() -> None:
    """A label is the text of the class, also as a copy."""
    found = label(0.7, 0.3)
    assert score("exact_match", found, "a")
    assert score("accuracy", found, " A ")
    assert score("macro_f1", [found, label(0.1, 0.9)], ["a", "b"]).total([1, 1, 1, 1, 1, 1]) == 1
    for again in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert (again, again.probabilities) == (found, found.probabilities)


def test_a_risk_coverage_curve_begins_with_the_most_probable_row() -> None:
    """Each value is the accuracy among the rows that are at least as probable."""
    assert curve([0.5, 0.9, 0.7, 0.6], [True, True, False, False]) == [1, 1 / 2, 1 / 3, 1 / 2]
