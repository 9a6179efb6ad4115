"""JSON valid: 1 if the answer is JSON (RFC 8259), else 0; the value is the fraction of rows that are.

Range 0 to 1, higher is better. The target is ignored. The rules are those of `datatype="json"`, so JSON with
numbers too large for a float, lone surrogates or more than 100 levels scores 0.
"""

from __future__ import annotations

import math
from typing import Any

from vllm_tasks.metrics.data import JsonText, is_json
from vllm_tasks.metrics.measure import Measure


def score(prediction: Any, target: Any = None) -> bool:
    """Return whether the answer is data, or a text that is JSON and nothing else: no code fence, no NaN.

    Args:
        prediction: The model's answer: a text or data.
        target: Ignored.
    """
    if not isinstance(prediction, str) or isinstance(prediction, JsonText):
        return not isinstance(prediction, float) or math.isfinite(prediction)
    return is_json(prediction)


MEASURE = Measure(score)
