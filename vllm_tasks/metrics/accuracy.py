"""Accuracy: 1 if the answer names the target's class, else 0; the value is the share of rows that do.

Range 0 to 1, higher is better. Case and white space at the ends do not count. Where one class is common, look
at macro_f1 too: always naming it scores its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_tasks.metrics.classes import class_of, known_classes, target_class
from vllm_tasks.metrics.measure import Measure


def score(prediction: Any, target: Any, *, labels: Sequence[Any] | None = None) -> bool:
    """Whether the answer is the target's class.

    labels: all classes there are; an answer that is none of them is a miss, a target that is none raises
        `InvalidCall`.
    """
    wanted = target_class(target, known_classes(labels, "accuracy"), "accuracy")
    return class_of(prediction, "accuracy") == wanted.casefold()


MEASURE = Measure(score)
