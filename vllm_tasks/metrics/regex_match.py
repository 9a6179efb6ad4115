"""Regex match: 1 if what a pattern finds in the answer is the target, else 0; the value is the share of rows.

Range 0 to 1, higher is better. Patterns are those of Python's `re`. A pattern with repetitions inside
repetitions can take time exponential in the answer's length.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Measure
from vllm_tasks.metrics.text import accepted, text_of


def score(prediction: Any, target: Any, *, pattern: str | None = None, last: bool = False) -> bool:
    """Whether the pattern finds the target or, where that is a list, any of its texts.

    pattern: its first match in the answer (`last`: its last one) must equal the target; of a pattern with
        groups the first group. White space at the ends counts on neither side.
    Without a pattern the target is one, and it must be found somewhere in the answer.

    Raises `InvalidCall` for what is no pattern.
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
        raise InvalidCall(f"regex_match: {pattern!r:.200} is no pattern of Python's re: {error}") from error


MEASURE = Measure(score)
