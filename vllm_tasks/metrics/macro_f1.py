"""Macro F1 of classes: the mean over classes of 2 hits / (rows called so + rows that are so).

Range 0 to 1, higher is better. It is scikit-learn's `f1_score(average="macro", zero_division=0)` over the
classes of the targets and those in `labels`; a class that only answers name is wrong where it is named, and
has no part in the mean. Every class counts alike, however rare. Case and white space at the ends are nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.classes import class_of, known_classes, spelled, target_class
from vllm_tasks.metrics.measure import Confusion, Measure, Sums

MOST_CLASSES = 1_000
"""Each row's vector has three numbers for each of them."""


def score(predictions: Sequence[Any], targets: Sequence[Any], *, labels: Sequence[Any] | None = None) -> Sums:
    """Of all rows; a failed one is an answer of no class.

    labels: all classes there are, each of which counts even without a row; a target that is none of them
        raises `InvalidCall`, and so do more than 1,000 classes.

    The table calls answers of no class `other` and failed rows `failed`.
    """
    known = known_classes(labels, "macro_f1")
    written = [target_class(target, known, "macro_f1") for target in targets]
    classes = known or spelled(written)
    if len(classes) > MOST_CLASSES:
        raise InvalidCall(
            f"macro_f1: there are {len(classes):,} classes, and it takes {MOST_CLASSES:,} at most: for free "
            "text take exact_match or token_f1, for more classes accuracy"
        )
    pairs = [
        (target.casefold(), None if prediction is None else class_of(prediction, "macro_f1"))
        for target, prediction in zip(written, predictions, strict=True)
    ]
    order = {name: i for i, name in enumerate(sorted(classes))}
    vectors = {pair: _vector(*pair, order) for pair in set(pairs)}

    def total(sums: Sequence[float]) -> float:
        return _macro_f1(sums, len(order), every=known is not None)

    return Sums([vectors[pair] for pair in pairs], total, _confusion(pairs, classes))


def _vector(target: str, called: str | None, order: dict[str, int]) -> list[float]:
    """By class: hits, then rows called so, then rows that are so. F1 needs no more of the confusion table,
    which has the square of that many cells."""
    vector = [0.0] * (3 * len(order))
    vector[2 * len(order) + order[target]] = 1.0
    if called in order:
        vector[len(order) + order[called]] = 1.0
    if called == target:
        vector[order[target]] = 1.0
    return vector


def _macro_f1(sums: Sequence[float], n: int, every: bool) -> float:
    """Of the `n` classes that have rows, or of every one. In plain numbers, since a resampled interval asks
    for it thousands of times, and f1_score itself takes a millisecond."""
    hits, called, being = sums[:n], sums[n : 2 * n], sums[2 * n :]
    if not any(being):
        return math.nan
    each = [
        2 * h / (c + b) if c + b else 0.0 for h, c, b in zip(hits, called, being, strict=True) if b or every
    ]
    return math.fsum(each) / len(each)


def _confusion(pairs: Sequence[tuple[str, str | None]], classes: dict[str, str]) -> Confusion:
    failed, other = _free("failed", classes), _free("other", classes)
    cells = Counter(
        (classes[target], failed if called is None else classes.get(called, other))
        for target, called in pairs
    )
    labels = sorted({*classes.values(), *(called for _, called in cells)})
    return Confusion(tuple(labels), tuple(tuple(cells[i, j] for j in labels) for i in labels))


def _free(name: str, classes: dict[str, str]) -> str:
    """`name`, or with brackets where a class is called so."""
    while name.casefold() in classes:
        name = f"({name})"
    return name


MEASURE = Measure(score, kind="sums")
