"""JSON data: read from what a model said, and compared by value."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from vllm_tasks.calls.datatypes import Undecodable, read_json


class JsonText(str):
    """A text that a model wrote as JSON, in quotation marks: data already, of which no JSON is to be read."""


def is_json(text: str) -> bool:
    """Whether `text` is JSON and nothing else, as a model's `datatype="json"` takes it."""
    try:
        read_json(text)
    except Undecodable:
        return False
    return True


def data_of(value: Any) -> Any:
    """Data as it is, and of a text what it holds as JSON; None for a text that holds none."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value)
    except Undecodable:
        return None


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal: numbers by value (1 is 1.0, and 0.1 a decimal 0.10), but true is
    not 1.

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
        elif isinstance(a, bool) is not isinstance(b, bool) or _number(a, b) != _number(b, a):
            return False
    return True


def _number(value: Any, other: Any) -> Any:
    """Beside a decimal a float is the decimal that it is written as; its binary value is another one."""
    return Decimal(repr(value)) if isinstance(value, float) and isinstance(other, Decimal) else value
