"""The text of a value in a prompt: one rule for templates, choices, and the targets of metrics."""

from __future__ import annotations

from datetime import date, time, timedelta
from decimal import Decimal
from numbers import Number
from uuid import UUID

MISSING = {"nan", "-nan", "snan", "-snan", "nat"}
"""The printed forms of a table's missing values: NaN of floats and decimals, NaT of dates."""
NUMPY_PLAIN = {"bool", "bool_", "datetime64"}
"""numpy's scalars that are not numbers to Python. They are listed by name because numpy is optional."""
MOST_DIGITS = 1_000_000
"""Digits of a decimal. `Decimal("1E+999999999")` is short, but its digits would fill the memory."""


class NoText(ValueError):
    """A value whose text is not certain. The message follows the value's name, as in 'x is None'."""


def plain_text(value: object) -> str:
    """Return the text of a value.

    A text is returned unchanged. A number has all its digits: a float the fewest that read back as the same
    float (`0.1`), a decimal its own, without an exponent (`12.50`, `100000`), a number from JSON those of its
    line. Booleans, dates, times, durations and UUIDs print as in Python (`2024-01-02 12:30:00+00:00`).

    Raises `NoText` for None, a missing value (NaN, NaT), bytes, lists, objects, and all other types.
    """
    if isinstance(value, str):
        return value
    if not _is_plain(value):
        shown = "None" if value is None else f"a {type(value).__name__}"
        raise NoText(f"is {shown}, not a text or a number; convert it in prompt_func")
    text = _printed(value)
    if text.lower() in MISSING:
        raise NoText(f"is {text}, which tables use for a missing value")
    return text


def _is_plain(value: object) -> bool:
    """Return whether the text of a value is certain."""
    kind = type(value)
    return isinstance(value, Number | date | time | timedelta | UUID) or (
        kind.__module__ == "numpy" and kind.__name__ in NUMPY_PLAIN
    )


def _printed(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        # It uses Decimal because Python refuses to print an int of more than 4,300 digits.
        return int.__repr__(value) if value.bit_length() < 10_000 else format(Decimal(value), "f")
    if isinstance(value, Decimal) and value.is_finite():
        if abs(value.adjusted()) > MOST_DIGITS:
            raise NoText(f"has more than {MOST_DIGITS:,} digits")
        return format(value, "f")
    return str(value)
