"""Reads JSON data from a model's answers and compares it by value."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from vllm_tasks.calls.datatypes import Undecodable, read_json


class JsonText(str):
    """A text that a model wrote as a JSON string. It is data already and is not read as JSON again."""


def is_json(text: str) -> bool:
    """Return whether `text` is JSON and nothing else, by the rules of `datatype="json"`."""
    try:
        read_json(text)
    except Undecodable:
        return False
    return True


def data_of(value: Any) -> Any:
    """Return data unchanged, and a text as the JSON value that it holds, or None if it is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return read_json(value)
    except Undecodable:
        return None


def same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are equal: numbers by value (1 is 1.0, and 0.1 is a decimal 0.10), but
    true is not 1.

    It does not recurse, because an answer may be nested deeper than Python's calls can be.
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
    """Return a float that is compared with a decimal as the decimal that it prints as."""
    return Decimal(repr(value)) if isinstance(value, float) and isinstance(other, Decimal) else value
