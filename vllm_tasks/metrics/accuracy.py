"""Accuracy: 1 if the answer names the target's class, else 0; the value is the fraction of rows that do.

Range 0 to 1, higher is better. Case and white space at the ends are ignored. If one class is common, look at
macro_f1 too: a model that always names this class scores its fraction of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_tasks.metrics.classes import class_of, known_classes, target_class
from vllm_tasks.metrics.measure import Measure


def score(prediction: Any, target: Any, *, labels: Sequence[Any] | None = None) -> bool:
    """Return whether the answer names the target's class.

    Args:
        prediction: The model's answer.
        target: The right class.
        labels: All classes. An answer that is none of them is a miss.

    Raises:
        InvalidCall: The target is a list or none of the labels, or the labels are not distinct.
    """
    wanted = target_class(target, known_classes(labels, "accuracy"), "accuracy")
    return class_of(prediction, "accuracy") == wanted.casefold()


MEASURE = Measure(score)
