"""JSON valid: 1 if the answer is JSON (RFC 8259), else 0; the value is the share of rows that are.

Range 0 to 1, higher is better. The target is not looked at. JSON is what a model with `datatype="json"`
takes: so none with numbers too large for a float, halves of characters, or more than 100 levels.
"""

from __future__ import annotations

import math
from typing import Any

from vllm_tasks.metrics.data import JsonText, is_json
from vllm_tasks.metrics.measure import Measure


def score(prediction: Any, target: Any = None) -> bool:
    """Whether the answer is data already, or a text that is JSON and nothing else: no code fence, no NaN."""
    if not isinstance(prediction, str) or isinstance(prediction, JsonText):
        return not isinstance(prediction, float) or math.isfinite(prediction)
    return is_json(prediction)


MEASURE = Measure(score)
