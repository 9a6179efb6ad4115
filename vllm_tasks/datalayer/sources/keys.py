"""Keys of rows in Arrow: which types identify a row, and what they are stored as."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vllm_tasks.datalayer.values import python
from vllm_tasks.errors import InvalidCall

UTC_TIME = pa.timestamp("us", "UTC")
_OF_EXTENSIONS = {"arrow.bool8": pa.bool_(), "arrow.json": pa.string(), "arrow.uuid": pa.string()}


def key_type(column: str, kind: pa.DataType) -> pa.DataType:
    """The type in which keys of the type `kind` are stored; `InvalidCall` if they identify no row."""
    if (stored := _stored(kind)) is not None:
        return stored
    raise InvalidCall(
        f"the column {column!r} is of the type {str(kind)[:100]}, which cannot be a key, as equal values may "
        "differ; give another primary_id, or CAST it to VARCHAR in a SELECT"
    )


def _stored(kind: pa.DataType) -> pa.DataType | None:
    t = pa.types
    if isinstance(kind, pa.OpaqueType) and kind.type_name in ("hugeint", "uhugeint"):
        return pa.decimal128(38, 0)
    if isinstance(kind, pa.BaseExtensionType):
        return _OF_EXTENSIONS.get(str(kind.extension_name))
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
    """The columns of `found` in the types of `key`, and by row number why some do not fit (NULL)."""
    columns, wrong = [], {}
    for field in key:
        column, misfits = _cast(found[field.name].combine_chunks(), field)
        columns.append(column)
        wrong.update(misfits)
    return pa.table(columns, schema=key), wrong


def fitting(found: pa.Table, key: pa.Schema) -> pa.Table:
    """As `cast_keys`, but without the rows whose key does not fit."""
    keys, wrong = cast_keys(found, key)
    if wrong:
        keys = keys.take(pa.array([i for i in range(keys.num_rows) if i not in wrong], pa.int64()))
    return keys


def _cast(column: pa.Array, field: pa.Field) -> tuple[pa.Array, dict[int, str]]:
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if isinstance(column.type, pa.OpaqueType):  # DuckDB's whole numbers of 128 bits
        return _wide_numbers(column, field)
    if isinstance(column.type, pa.BaseExtensionType):
        uuid = column.type.extension_name == "arrow.uuid"
        column = pa.array(map(_text, column.to_pylist()), pa.string()) if uuid else column.storage
    return _in_halves(column, field)


def _wide_numbers(column: pa.Array, field: pa.Field) -> tuple[pa.Array, dict[int, str]]:
    numbers = python(column)
    wrong = {
        i: f"{field.name}={n} has more than 38 digits"
        for i, n in enumerate(numbers)
        if n is not None and abs(n) >= 10**38
    }
    kept = [None if i in wrong else n for i, n in enumerate(numbers)]
    return pa.array(kept, pa.decimal128(38, 0)).cast(field.type), wrong


def _valid(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """`column` as `kind`; raises `ArrowInvalid` if a value does not fit."""
    if column.type != kind:
        if pa.types.is_integer(column.type) and pa.types.is_decimal(kind):
            # Arrow requires digits for any number of 64 bits, even if all actual values fit.
            column = pc.cast(column, pa.decimal256(76, kind.scale))
        # Nanoseconds are truncated: a key has microseconds.
        column = pc.cast(column, kind, safe=not pa.types.is_timestamp(column.type))
    column.validate(full=True)  # files may have bytes that are not UTF-8 as text
    return column


def _in_halves(column: pa.Array, field: pa.Field, first: int = 0) -> tuple[pa.Array, dict[int, str]]:
    """As `_cast`, with NULL for values that do not fit; `first` is the number of the first row."""
    try:
        return _valid(column, field.type), {}
    except pa.ArrowInvalid:
        if len(column) == 1:
            wrong = f"{field.name}={_display(column[0])} is not of type {field.type}, as the outputs have it"
            return pa.nulls(1, field.type), {first: wrong}
    half = len(column) // 2
    before, wrong_before = _in_halves(column.slice(0, half), field, first)
    behind, wrong_behind = _in_halves(column.slice(half), field, first + half)
    return pa.concat_arrays([before, behind]), wrong_before | wrong_behind


def _display(value: pa.Scalar) -> str:
    try:
        return str(value)[:100]
    except (ValueError, OverflowError):  # bytes that are not text, or a date that Python lacks
        return f"a value of the type {value.type}"


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def known(keys: pa.Table) -> np.ndarray:
    """The numbers of the rows whose key has no NULL."""
    valid = np.ones(keys.num_rows, dtype=bool)
    for column in keys.columns:
        valid &= column.is_valid().to_numpy()
    return np.flatnonzero(valid)


def listed(keys: pa.Table, rows: Sequence[int] | np.ndarray) -> list[tuple[object, ...]]:
    """The keys of these rows as tuples of Python values."""
    columns = [column.to_pylist() for column in keys.take(pa.array(rows, pa.int64())).columns]
    return list(zip(*columns, strict=True))
