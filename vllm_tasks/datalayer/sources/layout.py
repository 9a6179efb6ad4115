"""The memory that Arrow rows take as Python values, and conversion of Arrow's newer layouts to older ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

VALUE_BYTES = 32
"""Bytes of a Python value besides its content: one bit in Arrow is an object in Python."""


def split(batch: pa.RecordBatch, most: int) -> Iterator[pa.RecordBatch]:
    """`batch` in slices of about `most` bytes as Python values, or of one row."""
    if batch.num_rows <= 1 or sum(map(size, batch.columns)) <= most:
        yield batch
        return
    half = batch.num_rows // 2
    yield from split(batch.slice(0, half), most)
    yield from split(batch.slice(half), most)


def size(column: pa.Array) -> int:
    """Approximate bytes that the values of `column` take in Python. A value in a dictionary counts once for
    each row that has it."""
    kind = column.type
    own = VALUE_BYTES * len(column)
    if isinstance(kind, pa.BaseExtensionType):
        return size(column.storage)
    if pa.types.is_dictionary(kind):
        return own + _repeated(column)
    if pa.types.is_struct(kind):
        return own + sum(size(child) for child in column.flatten())
    if pa.types.is_map(kind):
        entries = column.offsets.to_numpy()
        return own + sum(
            size(child) for child in column.values.slice(entries[0], entries[-1] - entries[0]).flatten()
        )
    if pa.types.is_nested(kind) and not pa.types.is_union(kind):  # all kinds of lists
        return own + size(column.flatten())
    return own + int(column.nbytes)


def _repeated(column: pa.DictionaryArray) -> int:
    if not _has_lengths(column.dictionary.type):
        return 0
    lengths = pc.binary_length(column.dictionary)
    return pc.sum(lengths.take(column.indices.cast(pa.int64()))).as_py() or 0


def _has_lengths(kind: pa.DataType) -> bool:
    t = pa.types
    return bool(t.is_string(kind) or t.is_large_string(kind) or t.is_binary(kind) or t.is_large_binary(kind))


def no_rows(schema: pa.Schema) -> pa.RecordBatch:
    """A batch without rows; unlike `from_pylist`, also for types that Arrow makes from no Python value."""
    return pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema)


def familiar(batch: pa.RecordBatch) -> pa.RecordBatch:
    """`batch` without string views and run-end encoding: Arrow's `take` and `binary_length` have no kernels
    for them yet (pyarrow 26)."""
    kinds = [_familiar(field.type) for field in batch.schema]
    if kinds == batch.schema.types:
        return batch
    columns = [_cast(column, kind) for column, kind in zip(batch.columns, kinds, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _cast(column: Any, kind: pa.DataType) -> Any:
    if column.type == kind:
        return column
    if pa.types.is_run_end_encoded(column.type):
        return _cast(pc.run_end_decode(column), kind)
    return column.cast(kind)


def _familiar(kind: pa.DataType) -> pa.DataType:
    t = pa.types
    if t.is_string_view(kind):
        return pa.large_string()
    if t.is_binary_view(kind):
        return pa.large_binary()
    if t.is_run_end_encoded(kind):
        return _familiar(kind.value_type)
    if t.is_decimal256(kind) and kind.precision <= 38:
        return pa.decimal128(kind.precision, kind.scale)
    if t.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _familiar(kind.value_type), kind.ordered)
    if t.is_struct(kind):
        return pa.struct([field.with_type(_familiar(field.type)) for field in kind.fields])
    if t.is_map(kind):
        return pa.map_(
            kind.key_field.with_type(_familiar(kind.key_type)),
            kind.item_field.with_type(_familiar(kind.item_type)),
        )
    if t.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_familiar(kind.value_type)), kind.list_size)
    if t.is_list(kind):
        return pa.list_(kind.value_field.with_type(_familiar(kind.value_type)))
    if t.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_familiar(kind.value_type)))
    return kind
