"""Macro F1: the mean over classes of 2 hits / (rows predicted as the class + rows of the class).

Range 0 to 1, higher is better. It is scikit-learn's `f1_score(average="macro", zero_division=0)` over the
classes of the targets and of `labels`. A class that only answers name is wrong where it is named, and has no
part in the mean. Every class has the same weight, however rare. Case and white space at the ends are ignored.
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
"""The limit exists because each row's vector has three numbers per class."""
ENOUGH = 5
"""Fewer rows of a class make the interval approximate (`make bench-COVERAGE`)."""


def score(predictions: Sequence[Any], targets: Sequence[Any], *, labels: Sequence[Any] | None = None) -> Sums:
    """Return the counts of each row, the function from their sums to macro F1, and the confusion table.

    The table names answers without a known class `other`, and failed rows, as well as those in whose answer
    `extract` finds nothing, `failed`.

    Args:
        predictions: The answers in row order; None for a failed row, which has no class.
        targets: The right class of each row.
        labels: All classes. Each of them counts, even without a row. None: the classes of the targets.

    Raises:
        InvalidCall: A target is a list or none of the labels, the labels are not distinct, or there are more
            than 1,000 classes.
    """
    known = known_classes(labels, "macro_f1")
    written = [target_class(target, known, "macro_f1") for target in targets]
    classes = known or spelled(written)
    if len(classes) > MOST_CLASSES:
        raise InvalidCall(
            f"macro_f1: there are {len(classes):,} classes, and the limit is {MOST_CLASSES:,}: for free text "
            "take exact_match or token_f1, for more classes accuracy"
        )
    pairs = [
        (target.casefold(), None if prediction is None else class_of(prediction, "macro_f1"))
        for target, prediction in zip(written, predictions, strict=True)
    ]
    order = {name: i for i, name in enumerate(sorted(classes))}
    vectors = {pair: _vector(*pair, order) for pair in set(pairs)}

    def total(sums: Sequence[float]) -> float:
        return _macro_f1(sums, len(order), every=known is not None)

    rows_of = Counter(target for target, _ in pairs)
    # One missed row of each class, and one row that is right of each class without rows.
    pseudo = [_vector(name, None if name in rows_of else name, order) for name in order]
    rare = sum(rows_of[name] < ENOUGH for name in (order if known else rows_of))
    return Sums(
        [vectors[pair] for pair in pairs],
        total,
        _confusion(pairs, classes),
        pseudo,
        approximate=f"{rare} of {len(order)} classes have fewer than {ENOUGH} rows" if rare else None,
    )


def _vector(target: str, called: str | None, order: dict[str, int]) -> list[float]:
    """Return per class the hits, then the rows predicted as it, then the rows of it. F1 needs only these of
    the confusion table, whose size is the square of the number of classes."""
    vector = [0.0] * (3 * len(order))
    vector[2 * len(order) + order[target]] = 1.0
    if called in order:
        vector[len(order) + order[called]] = 1.0
    if called == target:
        vector[order[target]] = 1.0
    return vector


def _macro_f1(sums: Sequence[float], n: int, every: bool) -> float:
    """Return the mean over the classes that have rows, or with `every` over all `n`. It is plain Python since
    a resampled interval calls it thousands of times, and `f1_score` takes a millisecond."""
    hits, called, being = sums[:n], sums[n : 2 * n], sums[2 * n :]
    if not any(being):
        return math.nan
    each = [
        2 * h / (c + b) if c + b else 0.0 for h, c, b in zip(hits, called, being, strict=True) if b or every
    ]
    return math.fsum(each) / len(each)


def _confusion(pairs: Sequence[tuple[str, str | None]], classes: dict[str, str]) -> Confusion:
    failed, other = _unused("failed", classes), _unused("other", classes)
    cells = Counter(
        (classes[target], failed if called is None else classes.get(called, other))
        for target, called in pairs
    )
    labels = sorted({*classes.values(), *(called for _, called in cells)})
    return Confusion(tuple(labels), tuple(tuple(cells[i, j] for j in labels) for i in labels))


def _unused(name: str, classes: dict[str, str]) -> str:
    """Return `name`, in parentheses if a class has this name."""
    while name.casefold() in classes:
        name = f"({name})"
    return name


MEASURE = Measure(score, kind="sums")
