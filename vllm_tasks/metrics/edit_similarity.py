"""Edit similarity: 1 - d / max(|answer|, |target|), with d the least number of characters to insert, delete
or replace (Levenshtein 1966); the value is the mean of rows.

Range 0 to 1, higher is better; two empty texts score 1. Computed by rapidfuzz.
"""

from __future__ import annotations

from typing import Any

from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import accepted, text_of


def score(prediction: Any, target: Any) -> float:
    """Of one answer; of a list as target the largest over its texts.

    Raises `ImportError` without rapidfuzz.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError("edit_similarity needs rapidfuzz: pip install 'vllm-tasks[eval]'") from error
    answer, texts = text_of(prediction, "edit_similarity"), accepted(target, "edit_similarity")
    return max(Levenshtein.normalized_similarity(answer, text) for text in texts)


MEASURE = Measure(score)
