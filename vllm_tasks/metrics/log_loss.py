"""Log loss: -ln of the probability that the answer gives to the target's class; the value is the mean over
rows.

From 0, lower is better. It is scikit-learn's `log_loss`, with probabilities of at least 2.2e-16, so that a
class which the model excludes costs 36.04. Answers are those of `task="classify"`, or objects with
`probabilities`. Failed rows are left out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.classes import Label, known_classes, target_class
from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import accepted

LEAST = sys.float_info.epsilon


def score(prediction: Any, target: Any, *, labels: Sequence[Any] | None = None) -> float:
    """Return the loss of one row.

    Args:
        prediction: An object whose `probabilities` are an object by class, or a list in the order of
            `labels`. Any other answer, and a probability that is not a number, gives the target's class none.
        target: The right class. Case and white space at the ends are ignored.
        labels: The classes of a list of probabilities, in the order of the model's `id2label`.

    Raises:
        InvalidCall: A target is a list or none of the labels, or the labels are not distinct.
    """
    known = known_classes(labels, "log_loss")
    written = target_class(target, known, "log_loss").casefold()
    found: Any = prediction.get("probabilities") if isinstance(prediction, Mapping) else None
    if isinstance(prediction, Label):
        found = dict(prediction.probabilities)
    if isinstance(found, list):
        if labels is None or len(labels) != len(found):
            raise InvalidCall(
                f"log_loss needs options={{'labels': [...]}}, the {len(found)} classes in the order of the "
                "model's id2label: the answers have probabilities without names"
            )
        found = dict(zip(accepted(list(labels), "log_loss"), found, strict=True))
    by_class = (
        {str(name).strip().casefold(): p for name, p in found.items()} if isinstance(found, dict) else {}
    )
    probability = by_class.get(written)
    if not isinstance(probability, int | float) or isinstance(probability, bool):  # "high", or true
        probability = 0.0
    return -math.log(min(max(LEAST, probability), 1.0))


MEASURE = Measure(score, range=(0.0, math.inf), higher_is_better=False, miss=None)
