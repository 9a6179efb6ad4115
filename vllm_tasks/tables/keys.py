"""Keys of rows as text for logs, errors and names of task runs."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_tasks.datalayer.selection import Key
from vllm_tasks.printable import printable

KEY_LENGTH = 100
"""Characters of a key in names and logs."""


def key_range(keys: Sequence[Key]) -> str:
    """`first..last` of the keys in a group, as text for people."""
    try:
        first, last = min(keys), max(keys)
    except (TypeError, ArithmeticError):  # keys of several types, as SQLite allows, or NaN
        first, last = min(keys, key=repr), max(keys, key=repr)
    if first == last:
        return display_key(first)
    # Columns that both keys share, such as the run of a validation, are left out.
    ends = [
        tuple(a for a, b in zip(key, other, strict=True) if a != b)
        for key, other in ((first, last), (last, first))
    ]
    return "..".join(map(display_key, ends))


def display_key(key: Key) -> str:
    """A key as text for people: printable, of limited length, and without parentheses for one column."""
    text = str(key[0]) if len(key) == 1 else f"({', '.join(map(str, key))})"
    return printable(text if len(text) <= KEY_LENGTH else f"{text[:KEY_LENGTH]}…")
