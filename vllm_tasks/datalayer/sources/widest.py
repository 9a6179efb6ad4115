"""The common type of keys for files that store them in several types."""

from __future__ import annotations

import pyarrow as pa

from vllm_tasks.errors import InvalidCall

DIGITS = 38
"""Maximum digits of a decimal."""


def widest(column: str, one: tuple[str, pa.DataType], other: tuple[str, pa.DataType]) -> pa.DataType:
    """The type that holds the keys of both files, each given as its name and `keys.key_type`; raises
    `InvalidCall` if values of the two types cannot be compared exactly."""
    if one[1] == other[1]:
        return one[1]
    digits = [_digits(kind) for _, kind in (one, other)]
    if None not in digits:
        before, behind = (max(each) for each in zip(*filter(None, digits), strict=True))
        if before + behind <= DIGITS:
            return pa.decimal128(before + behind, behind)
    raise InvalidCall(
        f"the key {column!r} is of the type {one[1]} in {one[0]} and {other[1]} in {other[0]}, which have no "
        "common type; select files of one type, or CAST it in a SELECT"
    )


def _digits(kind: pa.DataType) -> tuple[int, int] | None:
    """The digits of a number before and after its point; None for a type that is not an exact number."""
    if pa.types.is_int64(kind):
        return 19, 0
    if pa.types.is_decimal(kind):
        return kind.precision - kind.scale, kind.scale
    return None
