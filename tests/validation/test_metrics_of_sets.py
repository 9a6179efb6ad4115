"""Built-in metrics of complete sets: sums over rows give the values that the libraries give."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn.metrics import f1_score

from vllm_tasks import InvalidCall
from vllm_tasks.metrics import built_in
from vllm_tasks.metrics.measure import Confusion, Likelihood, Sums

quick = settings(deadline=None, max_examples=40)

WORDS = st.lists(
    st.sampled_from(["the", "a", "cat", "dog", "sat", "mat", ".", ",", "Über"]), max_size=12
).map(" ".join)
TEXTS = WORDS | st.text(st.characters(), max_size=20)
ROWS = st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=6)


def sums(name: str, predictions: Sequence[Any], targets: Sequence[Any], **options: Any) -> Sums:
    found = built_in(name).score(predictions, targets, **options)
    assert isinstance(found, Sums)
    return found


def value(found: Sums, rows: Sequence[int] | None = None) -> float:
    chosen = found.rows if rows is None else [found.rows[i] for i in rows]
    return found.total([float(math.fsum(column)) for column in zip(*chosen, strict=True)])


def streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References in sacrebleu's order: the first ones of all rows, the second ones, ..."""
    most = max(map(len, references))
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lowercase": True, "tokenize": "intl"},
        {"smooth_method": "add-k", "smooth_value": 2},
        {"smooth_method": "floor", "max_ngram_order": 2},
        {"smooth_method": "none", "effective_order": True},
    ],
    ids=str,
)
@quick
@given(rows=ROWS)
def test_bleu_is_sacrebleus(options: dict[str, Any], rows: list[tuple[str, list[str]]]) -> None:
    """The sum of the rows' counts makes corpus BLEU, to the last digit."""
    predictions, references = [p for p, _ in rows], [r for _, r in rows]
    expected = BLEU(**options).corpus_score(predictions, streams(references)).score
    assert value(sums("bleu", predictions, references, **options)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"word_order": 2, "lowercase": True},
        {"char_order": 3, "beta": 1, "whitespace": True},
        {"eps_smoothing": True},
    ],
    ids=str,
)
@quick
@given(rows=ROWS)
def test_chrf_is_sacrebleus(options: dict[str, Any], rows: list[tuple[str, list[str]]]) -> None:
    """The sum of the rows' counts makes corpus chrF, to the last digit."""
    predictions, references = [p for p, _ in rows], [r for _, r in rows]
    expected = CHRF(**options).corpus_score(predictions, streams(references)).score
    assert value(sums("chrf", predictions, references, **options)) == expected


def test_a_failed_row_is_an_empty_translation() -> None:
    """So a failed row never improves the value."""
    rows = ["the cat sat on the mat", "a dog ran in the park"]
    for name in "bleu", "chrf":
        whole = value(sums(name, rows, rows))
        assert whole == pytest.approx(100)
        failed = value(sums(name, [rows[0], None], rows))
        assert failed == value(sums(name, [rows[0], ""], rows))
        assert 0 < failed < whole


@quick
@given(rows=ROWS, data=st.data())
def test_resampling_sums_is_scoring_the_resample(
    rows: list[tuple[str, list[str]]], data: st.DataObject
) -> None:
    """Sums of any rows, repeated and in any order, give the value of scoring those rows."""
    predictions, references = [p for p, _ in rows], [r for _, r in rows]
    drawn = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    for name in "bleu", "chrf":
        again = sums(name, [predictions[i] for i in drawn], [references[i] for i in drawn])
        assert value(sums(name, predictions, references), drawn) == value(again)


CLASSES = st.sampled_from(["a", "b", "c", "other"])
CALLED = st.lists(
    st.tuples(CLASSES, CLASSES | st.sampled_from(["x", "failed"]) | st.none()), min_size=1, max_size=15
)


def library_f1(pairs: Sequence[tuple[str, str | None]], labels: Sequence[str] | None) -> float:
    targets, predictions = [t for t, _ in pairs], [p or "no answer" for _, p in pairs]
    classes = sorted(set(targets)) if labels is None else labels
    return float(f1_score(targets, predictions, labels=classes, average="macro", zero_division=0))


@pytest.mark.parametrize("labels", [None, ["other", "c", "b", "a"]])
@quick
@given(pairs=CALLED)
def test_macro_f1_is_scikit_learns(labels: list[str] | None, pairs: list[tuple[str, str | None]]) -> None:
    """The mean is over the classes of the targets, and over all labels if they are given."""
    found = sums("macro_f1", [p for _, p in pairs], [t for t, _ in pairs], labels=labels)
    assert value(found) == pytest.approx(library_f1(pairs, labels), abs=1e-12)
    half = pairs[: (len(pairs) + 1) // 2]
    assert value(found, range(len(half))) == pytest.approx(library_f1(half, labels), abs=1e-12)


@quick
@given(pairs=CALLED)
def test_the_confusion_table_has_every_row(pairs: list[tuple[str, str | None]]) -> None:
    """Each target has its own row, even a class that is called like a failed row or another answer."""
    table = sums("macro_f1", [p for _, p in pairs], [t for t, _ in pairs]).table
    assert table is not None
    assert list(table.labels) == sorted(set(table.labels))
    by_class = dict(zip(table.labels, map(sum, table.counts), strict=True))
    assert {name: n for name, n in by_class.items() if n} == {
        t: sum(t == other for other, _ in pairs) for t, _ in pairs
    }
    hits = sum(table.counts[i][i] for i in range(len(table.labels)))
    assert hits == sum(t == p for t, p in pairs)


def test_the_confusion_table_names_failed_rows_and_other_answers() -> None:
    """A class is written like its target, and all other answers share a column."""
    found = sums("macro_f1", ["YES ", "perhaps", None, "No"], ["Yes", "Yes", "No", " no"])
    assert found.table == Confusion(
        ("No", "Yes", "failed", "other"), ((1, 0, 1, 0), (0, 1, 0, 1), (0, 0, 0, 0), (0, 0, 0, 0))
    )
    taken = sums("macro_f1", ["x", None], ["other", "failed"]).table
    assert taken is not None
    assert taken.labels == ("(failed)", "(other)", "failed", "other")


def test_macro_f1_takes_no_free_text() -> None:
    """Each row has a number for each class; more than a thousand are refused, also as labels."""
    targets = [f"text {i}" for i in range(1001)]
    assert value(sums("macro_f1", targets[:1000], targets[:1000])) == 1
    for options in {}, {"labels": targets}:
        with pytest.raises(InvalidCall, match=r"1,001 classes.* 1,000: for free text take exact_match"):
            sums("macro_f1", ["a"] * 1001, targets, **options)


def test_perplexity() -> None:
    """One in four by token has perplexity 4, for rows of any length; a failed row adds nothing."""
    texts = [[Likelihood(tokens * math.log(1 / 4), tokens, 9)] for tokens in (1, 2, 30)]
    found = sums("perplexity", [*texts, None], ["t"] * 4)
    assert value(found) == pytest.approx(4)
    assert math.isnan(value(found, [3]))
    assert value(sums("perplexity", [[Likelihood(-1e6, 1, 1)]], ["t"])) == math.inf


def test_a_text_without_tokens_adds_nothing_to_perplexity() -> None:
    """A text without tokens adds nothing with any likelihood, and alone it has no perplexity."""
    known, empty = [Likelihood(-2.0, 2, 9)], [Likelihood(math.nan, 0, 0)]
    assert value(sums("perplexity", [known, empty], ["t", ""])) == pytest.approx(math.e)
    assert math.isnan(value(sums("perplexity", [empty], [""])))


@pytest.mark.parametrize("name", ["bleu", "chrf", "macro_f1"])
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    """The same rows in another order have the same value."""
    predictions = ["a cat", "the dog sat", None, "yes", "A CAT"]
    targets = ["a cat", "a dog sat", "yes", "Yes", "A cat"]
    rows = list(zip(predictions, targets, strict=True))
    values = set()
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        values.add(value(sums(name, *map(list, zip(*rows, strict=True)))))
    assert len(values) == 1


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("bleu", {"tokenize": "13b"}, "'13b'; did you mean '13a'"),
        ("bleu", {"tokenize": ["13a"]}, "sacrebleu has none"),
        ("bleu", {"smooth_method": "Exp"}, "did you mean 'exp'"),
        ("bleu", {"smooth_value": "much"}, "not 'much'"),
        ("bleu", {"max_ngram_order": 0}, "at least 1 .usually 4., not 0"),
        ("chrf", {"char_order": 0}, "char_order must be an integer of at least 1, not 0"),
        ("chrf", {"word_order": -1}, "at least 0, not -1"),
        ("chrf", {"beta": "2"}, "not '2'"),
        ("macro_f1", {"labels": ["b"]}, "none of the labels"),
    ],
)
def test_a_bad_option_names_the_way_out(name: str, options: dict[str, Any], told: str) -> None:
    """An option that a library would misread is refused with the allowed values."""
    with pytest.raises(InvalidCall, match=told):
        sums(name, ["a"], ["a"], **options)


def test_data_is_no_translation() -> None:
    """Metrics of texts refuse answers that are data, because they would score punctuation."""
    for name in "bleu", "chrf", "macro_f1":
        with pytest.raises(InvalidCall, match="json_fields"):
            sums(name, [{"a": 1}], ["a"])
