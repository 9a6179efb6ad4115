"""Built-in metrics of vectors' models (rankings, probabilities, scores), beside scipy and scikit-learn."""

from __future__ import annotations

import json
import math
import warnings
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]  # has no type information
from sklearn.metrics import log_loss, ndcg_score

from tests.validation.scoring import score
from vllm_tasks import InvalidCall
from vllm_tasks.metrics import built_in
from vllm_tasks.metrics.measure import Sums

quick = settings(deadline=None, max_examples=60)
IDS = [f"d{i}" for i in range(12)]
NUMBERS = st.lists(
    st.tuples(st.integers(-4, 4).map(lambda i: i / 4), st.integers(-4, 4).map(lambda i: i / 4 + 1e6)),
    min_size=3,
    max_size=12,
)


@quick
@given(
    st.permutations(IDS),
    st.dictionaries(st.sampled_from(IDS), st.integers(1, 3), min_size=1),
    st.integers(1, 15),
)
def test_ndcg_is_that_of_scikit_learn(ranking: list[str], gains: dict[str, int], k: int) -> None:
    """With gains as with relevant ids alone."""
    places = {name: -place for place, name in enumerate(ranking)}

    def expected(gains: dict[str, int]) -> float:
        return float(ndcg_score([[gains.get(i, 0) for i in IDS]], [[places[i] for i in IDS]], k=k))

    assert score("ndcg_at_k", ranking, gains, k=k) == pytest.approx(expected(gains))
    assert score("ndcg_at_k", ranking, list(gains), k=k) == pytest.approx(expected(dict.fromkeys(gains, 1)))


@quick
@given(st.permutations(IDS), st.sets(st.sampled_from(IDS), min_size=1), st.integers(1, 15))
def test_recall_is_its_definition(ranking: list[str], relevant: set[str], k: int) -> None:
    """The relevant among the first k of all relevant ones."""
    hits = [name for name in ranking[:k] if name in relevant]
    assert score("recall_at_k", ranking, list(relevant), k=k) == len(hits) / len(relevant)


def test_rankings_are_read_from_texts_too() -> None:
    """Ids are compared as texts; one that is repeated counts once; what is no ranking scores 0."""
    assert score("recall_at_k", "[7, 7, 8]", ["7", 8], k=2) == 1
    assert score("ndcg_at_k", json.dumps(["a", "a"]), ["a"]) == 1
    assert score("ndcg_at_k", ["b"], {"a": Decimal("0.5"), "b": 1}, k=1) == 1
    assert score("ndcg_at_k", ["a"], {"a": Decimal("0.5"), "b": 1}, k=1) == 0.5
    assert score("recall_at_k", "first d1", ["d1"]) == score("ndcg_at_k", {}, ["d1"]) == 0
    for target in ([], {}, "d1", {"d1": 0}, None):
        with pytest.raises(InvalidCall, match="takes a list of relevant ids"):
            score("recall_at_k", ["d1"], target)
    with pytest.raises(InvalidCall, match="k=0 must be"):
        score("ndcg_at_k", ["d1"], ["d1"], k=0)


@quick
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), min_size=3, max_size=3)), min_size=1
    )
)
def test_log_loss_is_that_of_scikit_learn(rows: list[tuple[str, list[int]]]) -> None:
    """Its mean over the rows, also where a model excludes the right class."""
    rows = [(target, weights if sum(weights) else [1, 1, 1]) for target, weights in rows]
    probabilities = [[w / sum(weights) for w in weights] for _, weights in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sums that are not exactly 1
        expected = log_loss([target for target, _ in rows], probabilities, labels=["a", "b", "c"])
    found = [
        score("log_loss", {"probabilities": row}, target.upper(), labels=["a", "b", "c"])
        for row, (target, _) in zip(probabilities, rows, strict=True)
    ]
    assert math.fsum(found) / len(found) == pytest.approx(expected)
    named = score("log_loss", {"probabilities": dict(zip("abc", probabilities[0], strict=True))}, rows[0][0])
    assert named == found[0]


def test_log_loss_needs_the_names_of_the_classes() -> None:
    """A list has none; an answer without probabilities gives the right class none."""
    with pytest.raises(InvalidCall, match="2 classes in the order of the model's id2label"):
        score("log_loss", {"probabilities": [0.5, 0.5]}, "a")
    assert score("log_loss", "a", "a") == pytest.approx(36.04, abs=0.01)


def test_a_probability_that_is_no_number_is_none() -> None:
    """What a model has written fails no validation; labels that are numbers are those of the targets."""
    for written in {"a": "0.9"}, {"a": None}, {"a": [1]}, {"a": True}, {"b": 1}:
        assert score("log_loss", {"probabilities": written}, "a") == pytest.approx(36.04, abs=0.01)
    found = score("log_loss", {"probabilities": [0.25, 0.75]}, 1.0, labels=[0.0, 1.0])
    assert found == pytest.approx(-math.log(0.75))


@quick
@given(NUMBERS)
def test_correlations_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    """Also of numbers far from 0, with ties; failed rows and answers without a number are left out."""
    answers: list[Any] = [answer for answer, _ in pairs]
    targets = [target for _, target in pairs]
    spread = len(set(answers)) > 1 and len(set(targets)) > 1
    more = [*answers, None, "unknown"], [*targets, 0, 5]
    found = pearson(*more), score("spearman", *more)
    if not spread:
        assert all(map(math.isnan, found))
        return
    assert found[0] == pytest.approx(pearsonr(answers, targets).statistic, abs=1e-9)
    assert found[1] == pytest.approx(spearmanr(answers, targets).statistic, abs=1e-9)


@pytest.mark.parametrize("rows", range(2, 9))
def test_equal_numbers_have_no_correlation(rows: int) -> None:
    """Nor if their mean differs from them by a rounding error, as that of three times 0.1."""
    assert math.isnan(pearson([0.1] * rows, list(range(rows))))
    assert math.isnan(pearson(list(range(rows)), [0.1] * rows))


def test_a_number_of_many_digits_is_a_number() -> None:
    """An answer that repeats a digit to its end is far off, and fails no validation."""
    targets = [1, 2, 3, 4]
    for digits in "1" * 250, "-1e308", "1.7e308":
        expected = pearson([0, 0, float(digits) / 1e300, 0], targets)
        assert pearson(["1", "2", digits, "2.5"], targets) == pytest.approx(expected)
    assert pearson(["1.7e308", "-1.7e308"], [1, 2]) == pytest.approx(-1)


def test_correlations_need_numbers_as_targets() -> None:
    """Texts that are numbers will do."""
    assert pearson(["1", "2"], [2, "4"]) == pytest.approx(1)
    for name in ("pearson", "spearman"):
        with pytest.raises(InvalidCall, match=f"{name} takes numbers as targets, not 'good'"):
            score(name, [1, 2], [1, "good"])


def test_classes_are_those_of_labels() -> None:
    """Accuracy and macro F1 read the label of a classification."""
    answer = {"label": "Bug", "probability": 0.9, "probabilities": [0.9, 0.1]}
    assert score("accuracy", answer, "bug") == 1
    assert score("macro_f1", [answer, answer], ["bug", "bug"]).total([1, 1, 1]) == 1


def pearson(answers: list[Any], targets: list[Any]) -> float:
    found = built_in("pearson").score(answers, targets)
    assert isinstance(found, Sums)
    return found.total([math.fsum(column) for column in zip(*found.rows, strict=True)])
