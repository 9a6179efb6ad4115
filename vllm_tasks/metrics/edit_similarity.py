"""Edit similarity: 1 - d / max(|answer|, |target|), where d is the least number of characters to insert,
delete or replace (Levenshtein 1966); the value is the mean over rows.

Range 0 to 1, higher is better; two empty texts score 1. It is computed by rapidfuzz.
"""

from __future__ import annotations

from typing import Any

from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import accepted, text_of


def score(prediction: Any, target: Any) -> float:
    """Return the similarity of an answer and its target.

    Args:
        prediction: The model's answer.
        target: A text, or a list of texts of which the most similar counts.

    Raises:
        InvalidCall: The target or the answer is not a text.
        ImportError: rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError("edit_similarity needs rapidfuzz: pip install 'vllm-tasks[eval]'") from error
    answer, texts = text_of(prediction, "edit_similarity"), accepted(target, "edit_similarity")
    return max(Levenshtein.normalized_similarity(answer, text) for text in texts)


MEASURE = Measure(score)
