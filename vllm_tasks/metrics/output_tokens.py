"""Output tokens: tokens of a row's answer, as the engine counts them; the value is the mean over rows.

From 0, lower is better, because fewer tokens cost less. Failed rows are left out.
"""

from __future__ import annotations

import math

from vllm_tasks.metrics.measure import Answer, Measure


def score(answer: Answer) -> float | None:
    """Return the tokens of a row's answer, or None if their number is unknown."""
    return answer.completion_tokens


MEASURE = Measure(score, kind="answer", range=(0.0, math.inf), higher_is_better=False, miss=None)
