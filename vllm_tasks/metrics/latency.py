"""Latency: seconds from handing a row to the engine to its completion; the value is the mean over rows.

From 0, lower is better. It includes the wait for other rows, so it measures the load as well as the model.
Failed rows and rows with an unknown time are left out.
"""

from __future__ import annotations

import math

from vllm_tasks.metrics.measure import Answer, Measure


def score(answer: Answer) -> float | None:
    """Return the seconds of a row, or None if they are unknown."""
    return answer.seconds


MEASURE = Measure(
    score, kind="answer", range=(0.0, math.inf), higher_is_better=False, miss=None, of_load=True
)
