"""JSON data: read from what a model said, and compared by value."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any, NoReturn

LONG = 4_000
"""Digits from which Python refuses to make an int of a text (sys.set_int_max_str_digits)."""


class NoJson(ValueError):
    """A text that is no JSON."""


def read_json(text: str) -> Any:
    """The data in `text`, which must be JSON and nothing else (RFC 8259, so no NaN or Infinity).

    Raises `NoJson`, also for lists within lists deeper than Python's reader follows.
    """
    try:
        return json.loads(text, parse_int=_whole, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise NoJson(str(error)) from error


def _whole(digits: str) -> int | Decimal:
    return int(digits) if len(digits) < LONG else Decimal(digits)


def _no_number(constant: str) -> NoReturn:
    raise NoJson(f"{constant} is no JSON")


def data_of(value: Any) -> Any:
    """Data as it is, and of a text what it holds as JSON; None for a text that holds none."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value)
    except NoJson:
        return None


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: numbers by value (1 is 1.0), but true is not 1.

    Without recursion: what a model said may be nested deeper than Python calls.
    """
    pairs = [(one, other)]
    while pairs:
        a, b = pairs.pop()
        if isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                return False
            pairs += [(a[key], b[key]) for key in a]
        elif isinstance(a, list) and isinstance(b, list):
            if len(a) != len(b):
                return False
            pairs += zip(a, b, strict=True)
        elif isinstance(a, bool) is not isinstance(b, bool) or a != b:
            return False
    return True
