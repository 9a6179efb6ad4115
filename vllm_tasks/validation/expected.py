"""What answers are compared with: the values of a target's column, as metrics get them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from vllm_tasks.calls.plain_text import NoText, plain_text


class NotComparable(ValueError):
    """A value that no answer can be; the message goes on after its name."""


def expected(value: Any) -> Any:
    """A target as metrics get it: data that a model could have said, with numbers as numbers.

    Texts, booleans, whole numbers, floats and decimals are themselves (a number of JSON is a float, one of a
    DECIMAL a `Decimal`); dates, times, durations and UUIDs are the text that a prompt has of them; lists and
    dicts have such items. Raises `NotComparable` for NaN, infinity, bytes and other types.
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
