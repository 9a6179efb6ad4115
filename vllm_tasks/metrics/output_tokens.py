"""Output tokens: how many the model said for a row, by the engine's count; the value is the mean of rows.

From 0, lower is better: fewer cost less. Failed rows have none.
"""

from __future__ import annotations

import math

from vllm_tasks.metrics.measure import Answer, Measure


def score(answer: Answer) -> float | None:
    """Tokens; None where they are not known."""
    return answer.completion_tokens


MEASURE = Measure(score, kind="answer", range=(0.0, math.inf), higher_is_better=False, miss=None)
