"""Regex match: 1 if a pattern finds the target, else 0; the value is the fraction of rows where it does.

Range 0 to 1, higher is better. Patterns are those of Python's `re`. A pattern with nested repetitions can
take time exponential in the answer's length.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import accepted, text_of


def score(prediction: Any, target: Any, *, pattern: str | None = None, last: bool = False) -> bool:
    """Return whether the pattern finds the target.

    Args:
        prediction: The model's answer.
        target: A text, or a list of texts of which any may match. Without `pattern` it is itself the pattern
            and may match anywhere in the answer.
        pattern: A pattern whose first match in the answer, or that match's first group, must equal the
            target. White space at the ends is ignored.
        last: Use the last match instead of the first.

    Raises:
        InvalidCall: The pattern is not valid, or the target or the answer is not a text.
    """
    answer, texts = text_of(prediction, "regex_match"), accepted(target, "regex_match")
    if pattern is None:
        return any(_compiled(text).search(answer) for text in texts)
    found = _found(_compiled(pattern), answer, last)
    return found is not None and found.strip() in [text.strip() for text in texts]


def _found(pattern: re.Pattern[str], text: str, last: bool) -> str | None:
    matches = pattern.finditer(text)
    match = next(iter(deque(matches, maxlen=1)), None) if last else next(matches, None)
    if match is None:
        return None
    found: str | None = match[1] if pattern.groups else match[0]
    return found


def _compiled(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise InvalidCall(f"regex_match: {pattern!r:.200} is not a pattern of `re`: {error}") from error


MEASURE = Measure(score)
