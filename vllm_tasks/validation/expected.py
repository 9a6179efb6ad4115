"""Targets: the known answers of a data set, converted to the values that metrics compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from vllm_tasks.calls.plain_text import NoText, plain_text


class NotComparable(ValueError):
    """A target that no answer can equal; the message continues a sentence that names the value."""


def expected(value: Any) -> Any:
    """Convert a target to data that a model could produce, with numbers as numbers.

    Texts, booleans, whole numbers, floats and decimals stay as they are (a JSON number is a float, a value of
    a DECIMAL column a `Decimal`). Dates, times, durations and UUIDs become the text that a prompt would have.
    Items of lists and dicts are converted too. NaN, infinity, bytes and other types raise `NotComparable`.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | Decimal):
        if not (value.is_finite() if isinstance(value, Decimal) else math.isfinite(value)):
            raise NotComparable(f"has {value!r:.100}, which is not finite")
        return value if isinstance(value, Decimal) else float(value)
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else plain_text(key): expected(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [expected(item) for item in value]
    try:
        return plain_text(value)
    except NoText:
        raise NotComparable(
            f"has {value!r:.100}, a {type(value).__name__}, which no answer can equal"
        ) from None
