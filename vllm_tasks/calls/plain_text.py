"""How a value reads in a prompt: one rule for templates, choices, and what answers are compared with."""

from __future__ import annotations

from datetime import date, time, timedelta
from decimal import Decimal
from numbers import Number
from uuid import UUID

MISSING = {"nan", "-nan", "snan", "-snan", "nat"}
"""How the missing values of tables print: NaN of floats and decimals, NaT of dates."""
NUMPY_PLAIN = {"bool", "bool_", "datetime64"}
"""numpy's scalars that are none of Python's numbers; by name, as numpy need not be there."""
MOST_DIGITS = 1_000_000
"""Of a decimal. Decimal("1E+999999999") is short, and its digits would fill the memory."""


class NoText(ValueError):
    """A value whose text is in doubt; the message goes on after the value's name."""


def plain_text(value: object) -> str:
    """The text of a value.

    A text is itself. Numbers have all their digits: a float the shortest that give it back (`0.1`), a decimal
    its own, without an exponent (`12.50`, `100000`), a number of JSON those of its line. Booleans are `True`
    and `False`; dates, times, durations and UUIDs print as Python prints them (`2024-01-02 12:30:00+00:00`).

    Raises `NoText` for None, a missing value (NaN, NaT), bytes, lists, objects, and all other types.
    """
    if isinstance(value, str):
        return value
    if not _is_plain(value):
        shown = "None" if value is None else f"a {type(value).__name__}"
        raise NoText(f"is {shown}, not a text or a number; use prompt_func to convert it")
    text = _printed(value)
    if text.lower() in MISSING:
        raise NoText(f"is {text}, which tables use for a missing value")
    return text


def _is_plain(value: object) -> bool:
    """Whether the text of a value is beyond doubt."""
    kind = type(value)
    return isinstance(value, Number | date | time | timedelta | UUID) or (
        kind.__module__ == "numpy" and kind.__name__ in NUMPY_PLAIN
    )


def _printed(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        # By Decimal, since Python refuses to print an int of more than 4,300 digits.
        return int.__repr__(value) if value.bit_length() < 10_000 else format(Decimal(value), "f")
    if isinstance(value, Decimal) and value.is_finite():
        if abs(value.adjusted()) > MOST_DIGITS:
            raise NoText(f"has more than {MOST_DIGITS:,} digits")
        return format(value, "f")
    return str(value)
