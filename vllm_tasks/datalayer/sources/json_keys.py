"""Keys of JSON objects in Arrow: a value of another kind than its column is not a key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from vllm_tasks.datalayer.sources.json_fields import KINDS, WIDE, kind_name
from vllm_tasks.datalayer.sources.keys import cast_keys
from vllm_tasks.datalayer.storable import is_text

NONE = type(None)


def json_keys(rows: Sequence[Sequence[Any]], key: pa.Schema) -> tuple[pa.Table, dict[int, str]]:
    """The keys (in the order of `key`) in its types, and by row number why some have none (NULL)."""
    columns, wrong = [], {}
    for place, field in enumerate(key):
        column, misfits = _column([row[place] for row in rows], field)
        columns.append(column)
        wrong.update(misfits)
    keys, misfits = cast_keys(pa.table(columns, names=key.names), key)
    return keys, {**misfits, **wrong}


def _column(values: list[Any], field: pa.Field) -> tuple[pa.Array, dict[int, str]]:
    kind, stored = _kind(field.type)
    if set(map(type, values)) <= {kind, NONE}:
        try:
            return pa.array(values, stored), {}
        except (pa.ArrowInvalid, UnicodeEncodeError, OverflowError):
            pass  # a value that is too large, or a lone surrogate
    wrong = {row: why for row, value in enumerate(values) if (why := _misfit(value, kind, field))}
    return pa.array([None if row in wrong else value for row, value in enumerate(values)], stored), wrong


def _kind(stored: pa.DataType) -> tuple[type, pa.DataType]:
    """The Python type of JSON values that are stored in this type, and an Arrow type that holds them all."""
    if pa.types.is_boolean(stored):
        return bool, pa.bool_()
    if pa.types.is_integer(stored) or pa.types.is_decimal(stored):
        return int, WIDE
    return str, pa.string()


def _misfit(value: object, kind: type, field: pa.Field) -> str | None:
    name = field.name[:50]
    if value is None:
        return None
    if type(value) is not kind:
        return (
            f"{name!r} is {kind_name(type(value))}, the keys are of the kind: {KINDS[kind]}; "
            "SELECT ... CAST(column AS VARCHAR) converts all to text"
        )
    if isinstance(value, str):
        return None if is_text(value) else f"{name!r} has half a character"
    return f"{name!r} has more than 38 digits" if isinstance(value, int) and abs(value) >= 10**38 else None
