"""Contains: 1 if the target occurs in the answer, else 0; the value is the fraction of rows where it does.

Range 0 to 1, higher is better. A long answer that names everything scores well: look at the answers' lengths.
"""

from __future__ import annotations

import re
from typing import Any

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import accepted, text_of


def score(prediction: Any, target: Any, *, ignore_case: bool = False, whole_words: bool = False) -> bool:
    """Return whether the answer contains the target.

    Args:
        prediction: The model's answer.
        target: A text, or a list of texts of which any may occur.
        ignore_case: Compare case-folded texts.
        whole_words: If the target begins or ends with a letter, digit or underscore, no other one may adjoin
            that end.

    Raises:
        InvalidCall: The target is empty, so every text would contain it, or it is not a text.
    """
    answer, texts = text_of(prediction, "contains"), accepted(target, "contains")
    if "" in texts:
        raise InvalidCall(
            f"contains: every answer contains an empty text, and the target is {target!r:.100}; give a text "
            "to look for"
        )
    if ignore_case:
        answer, texts = answer.casefold(), [text.casefold() for text in texts]
    if whole_words:
        return any(re.search(_alone(text), answer) for text in texts)
    return any(text in answer for text in texts)


def _alone(text: str) -> str:
    before = r"(?<!\w)" if re.match(r"\w", text[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", text[-1]) else ""
    return before + re.escape(text) + after


MEASURE = Measure(score)
