"""A source in pieces as a typed Arrow stream, for a SELECT over it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from typing import Any

import pyarrow as pa

from vllm_tasks.datalayer.sources.layout import familiar, no_rows
from vllm_tasks.datalayer.sources.pieces import BATCH_ROWS, Pieces, read
from vllm_tasks.datalayer.storage_errors import plain
from vllm_tasks.errors import InvalidCall


class ColumnStream:
    """The columns of a source as a stream that may be opened repeatedly; each time the files are read."""

    def __init__(self, source: Pieces, columns: Sequence[str], without: Collection[str] = ()) -> None:
        """`without` names columns that are not read and are NULL. Raises `InvalidCall` if the files have
        types of a column that no single type can hold."""
        self._source = source
        self._columns = [name for name in columns if name not in without]
        self.schema = pa.schema([*_schema(source, self._columns), *((name, pa.null()) for name in without)])

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        reader = pa.RecordBatchReader.from_batches(self.schema, self._batches())
        return reader.__arrow_c_stream__(requested_schema)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with closing(self._source.reading(BATCH_ROWS)) as reading:
            for piece in self._source.pieces():
                for batch in read(reading, piece, self._columns):
                    yield self._typed(batch)

    def _typed(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        names = set(batch.schema.names)
        columns = [
            _cast(batch[field.name], field) if field.name in names else pa.nulls(batch.num_rows, field.type)
            for field in self.schema
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)


def _schema(source: Pieces, columns: Sequence[str]) -> pa.Schema:
    wanted = set(columns)
    schemas = [familiar(no_rows(_some(schema, wanted))).schema for _, schema in source.schemas()]
    try:
        found = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as e:
        raise InvalidCall(f"the files have types of a column that cannot be combined: {plain(e):.300}") from e
    return pa.schema([found.field(name) for name in columns if name in found.names])


def _cast(column: pa.Array, field: pa.Field) -> pa.Array:
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid as e:
        raise InvalidCall(
            f"the column {field.name!r:.100} is {column.type} in one file and {field.type} in a SELECT, "
            f"which changes a value ({plain(e):.200}); name the table itself instead, or leave the column out"
        ) from e


def _some(schema: pa.Schema, wanted: set[str]) -> pa.Schema:
    return pa.schema([field for field in schema if field.name in wanted])
