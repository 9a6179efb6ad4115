"""Latency: seconds from handing a row to the engine to its answer; the value is the mean of rows.

From 0, lower is better. It includes the wait for other rows, so it is of this load and not of the model
alone. Failed rows are left out, and so are rows whose time is not known.
"""

from __future__ import annotations

import math

from vllm_tasks.metrics.measure import Answer, Measure


def score(answer: Answer) -> float | None:
    """Seconds; None where they are not known."""
    return answer.seconds


MEASURE = Measure(score, kind="answer", range=(0.0, math.inf), higher_is_better=False, miss=None)
