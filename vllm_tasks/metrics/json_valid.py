"""JSON valid: 1 if the answer is JSON (RFC 8259), else 0; the value is the share of rows that are.

Range 0 to 1, higher is better. The target is not looked at.
"""

from __future__ import annotations

import math
from typing import Any

from vllm_tasks.metrics.data import NoJson, read_json
from vllm_tasks.metrics.measure import Measure


def score(prediction: Any, target: Any = None) -> bool:
    """Whether the answer is data already, or a text that is JSON and nothing else: no code fence, no NaN."""
    if not isinstance(prediction, str):
        return not isinstance(prediction, float) or math.isfinite(prediction)
    try:
        read_json(prediction)
    except NoJson:
        return False
    return True


MEASURE = Measure(score)
