"""Keys of rows as people read them, in logs, errors and names of task runs."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_tasks.datalayer.selection import Key
from vllm_tasks.printable import printable

KEY_SHOWN = 100
"""Characters of a key in names and logs."""


def key_range(keys: Sequence[Key]) -> str:
    """`first..last` of the keys in a group, for people."""
    try:
        first, last = min(keys), max(keys)
    except (TypeError, ArithmeticError):  # of several types, as SQLite allows, or not a number
        first, last = min(keys, key=repr), max(keys, key=repr)
    if first == last:
        return shown_key(first)
    # What they have in common, such as the run of a validation, tells nothing.
    ends = [
        tuple(a for a, b in zip(key, other, strict=True) if a != b)
        for key, other in ((first, last), (last, first))
    ]
    return "..".join(map(shown_key, ends))


def shown_key(key: Key) -> str:
    """A key for people: the bare value of a single column, as a log may show it and not at any length."""
    text = str(key[0]) if len(key) == 1 else f"({', '.join(map(str, key))})"
    return printable(text if len(text) <= KEY_SHOWN else f"{text[:KEY_SHOWN]}…")
