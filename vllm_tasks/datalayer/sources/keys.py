"""Keys of rows in Arrow: which types identify a row, and what they are stored as."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vllm_tasks.errors import InvalidCall

UTC_TIME = pa.timestamp("us", "UTC")


def key_type(column: str, kind: pa.DataType) -> pa.DataType:
    """What a key column of the type `kind` is stored as; raises `InvalidCall` for what identifies no row."""
    if (stored := _stored(kind)) is not None:
        return stored
    raise InvalidCall(
        f"the column {column!r} is of the type {str(kind)[:100]}, which cannot be a key, as equal values are "
        "not surely the same; give another primary_id, or CAST it to VARCHAR in a SELECT"
    )


def _stored(kind: pa.DataType) -> pa.DataType | None:
    t = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return pa.string() if kind.extension_name in ("arrow.json", "arrow.uuid") else None
    if t.is_dictionary(kind):
        return _stored(kind.value_type)
    if t.is_uint64(kind):
        return pa.decimal128(20, 0)
    if t.is_integer(kind):
        return pa.int64()
    if t.is_decimal(kind) and kind.precision <= 38:
        return pa.decimal128(kind.precision, kind.scale)
    if t.is_timestamp(kind):
        return pa.timestamp("us") if kind.tz is None else UTC_TIME
    if t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind):
        return pa.string()
    if t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind) or t.is_fixed_size_binary(kind):
        return pa.binary()
    if t.is_date(kind):
        return pa.date32()
    return pa.bool_() if t.is_boolean(kind) else None


def cast_keys(found: pa.Table, key: pa.Schema) -> tuple[pa.Table, dict[int, str]]:
    """The columns of `found` in the types of `key`, and why rows of these numbers have none there (NULL)."""
    columns, wrong = [], {}
    for field in key:
        column, misfits = _cast(found[field.name].combine_chunks(), field)
        columns.append(column)
        wrong.update(misfits)
    return pa.table(columns, schema=key), wrong


def _cast(column: pa.Array, field: pa.Field) -> tuple[pa.Array, dict[int, str]]:
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if isinstance(column.type, pa.BaseExtensionType):
        uuid = column.type.extension_name == "arrow.uuid"
        column = pa.array(map(_text, column.to_pylist()), pa.string()) if uuid else column.storage
    if column.type == field.type:
        return column, {}
    try:
        return _plain(column, field.type), {}
    except pa.ArrowInvalid:
        return _one_by_one(column, field)


def _plain(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_integer(column.type) and pa.types.is_decimal(kind):
        # Arrow asks for room for every number of 64 bits, also where all that are there fit.
        column = pc.cast(column, pa.decimal256(76, kind.scale))
    # Nanoseconds are cut: a key is kept with microseconds.
    return pc.cast(column, kind, safe=not pa.types.is_timestamp(column.type))


def _one_by_one(column: pa.Array, field: pa.Field) -> tuple[pa.Array, dict[int, str]]:
    values, wrong = [], {}
    for i, value in enumerate(column):
        try:
            values.append(_plain(pa.array([value.as_py()], column.type), field.type)[0].as_py())
        except (pa.ArrowInvalid, ValueError, OverflowError):
            values.append(None)
            wrong[i] = f"{field.name}={str(value)[:100]} is no {field.type}, as the outputs have it"
    return pa.array(values, field.type), wrong


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def known(keys: pa.Table) -> np.ndarray:
    """The numbers of the rows of which no part of the key is NULL."""
    valid = np.ones(keys.num_rows, dtype=bool)
    for column in keys.columns:
        valid &= column.is_valid().to_numpy()
    return np.flatnonzero(valid)


def listed(keys: pa.Table, rows: Sequence[int]) -> list[tuple[object, ...]]:
    """The keys of these rows as tuples of Python values."""
    columns = [column.to_pylist() for column in keys.take(pa.array(rows, pa.int64())).columns]
    return list(zip(*columns, strict=True))
