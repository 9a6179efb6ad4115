"""Recall at k: the fraction of the relevant ids that are among the first k of a ranking; the value is the
mean over rows.

Range 0 to 1, higher is better. An answer is a ranking, a list of ids from the best to the worst, and the
target a list of relevant ids. An id that a ranking repeats counts at its first place.
"""

from __future__ import annotations

from typing import Any

from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.rankings import LENGTH, gains_of, ranking_of


def score(prediction: Any, target: Any, *, k: int = LENGTH) -> float:
    """Return the recall of one ranking.

    Args:
        prediction: A list of ids, or a text that is JSON. Anything but a list scores 0.
        target: The relevant ids, or an object from ids to their gains; those above 0 are relevant.
        k: How many ids of the ranking count.

    Raises:
        InvalidCall: The target names no relevant id, or k is not at least 1.
    """
    relevant = gains_of(target, k, "recall_at_k").keys()
    return len(relevant & set(ranking_of(prediction)[:k])) / len(relevant)


MEASURE = Measure(score)
