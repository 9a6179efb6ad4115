"""The columns of a call over a table, and the records that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_tasks.calls.prompt_func import Signature
from vllm_tasks.datalayer.arguments import named_columns
from vllm_tasks.errors import InvalidCall

Columns = str | Sequence[str] | Mapping[str, str | int]
"""A column, several columns, or a mapping from columns to arguments (names or positions)."""


def records(X: Columns, signature: Signature) -> tuple[tuple[str, ...], Callable[[Sequence[Any]], Any]]:  # noqa: N803
    """Return the columns that `X` names, and a function from their values to a record for `signature`."""
    if isinstance(X, Mapping):
        columns, arguments = named_columns("X", tuple(X)), tuple(X.values())
    else:
        columns = named_columns("X", X)
        arguments = tuple(range(len(columns))) if signature != "**kwargs" else columns
    by_position = [i for i, a in enumerate(arguments) if isinstance(a, int)]
    by_position.sort(key=lambda i: arguments[i])
    by_name = {str(a): i for i, a in enumerate(arguments) if not isinstance(a, int)}
    if len(by_position) + len(by_name) < len(arguments):
        raise InvalidCall(f"X={X!r} gives two columns to one argument")
    if [arguments[i] for i in by_position] != list(range(len(by_position))):
        raise InvalidCall(f"X={X!r}: positions must be 0, 1, ... without a gap")
    if signature == "singleton":
        if len(columns) != 1:
            raise InvalidCall(
                f"X={X!r} names {len(columns)} columns, but with signature='singleton' a record is a single "
                "value; use signature='**kwargs' (fields by name) or '*args' (fields by position)"
            )
        return columns, lambda values: values[0]
    if signature == "*args":
        if by_name:
            raise InvalidCall(f"X={X!r}: signature='*args' takes positions, not the names {sorted(by_name)}")
        return columns, lambda values: tuple(values[i] for i in by_position)
    if signature == "**kwargs":
        if by_position:
            raise InvalidCall(f"X={X!r}: signature='**kwargs' takes names of arguments, not positions")
        return columns, lambda values: {name: values[i] for name, i in by_name.items()}
    return columns, lambda values: (
        tuple(values[i] for i in by_position),
        {name: values[i] for name, i in by_name.items()},
    )
