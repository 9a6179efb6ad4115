"""The one type of keys for files that store them in several."""

from __future__ import annotations

import pyarrow as pa

from vllm_tasks.errors import InvalidCall

DIGITS = 38
"""Of a decimal at most."""


def widest(column: str, one: tuple[str, pa.DataType], other: tuple[str, pa.DataType]) -> pa.DataType:
    """The type that holds the keys of both files, each given as its name and `keys.key_type`; raises
    `InvalidCall` where values of the two types are never surely the same."""
    if one[1] == other[1]:
        return one[1]
    digits = [_digits(kind) for _, kind in (one, other)]
    if None not in digits:
        before, behind = (max(each) for each in zip(*filter(None, digits), strict=True))
        if before + behind <= DIGITS:
            return pa.decimal128(before + behind, behind)
    raise InvalidCall(
        f"the key {column!r} is of the type {one[1]} in {one[0]} and {other[1]} in {other[0]}, which have no "
        "type in common; select files of one type, or CAST it in a SELECT"
    )


def _digits(kind: pa.DataType) -> tuple[int, int] | None:
    """How many digits a number has before and behind its point; None for what is no exact number."""
    if pa.types.is_int64(kind):
        return 19, 0
    if pa.types.is_decimal(kind):
        return kind.precision - kind.scale, kind.scale
    return None
