"""A database that keeps the outputs of a source elsewhere: its key types in Arrow, and its done rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import duckdb
import pyarrow as pa
import sqlalchemy as sa

from vllm_tasks.datalayer.database.backends import Backend, TableName
from vllm_tasks.datalayer.database.keyed_table import UtcTime
from vllm_tasks.datalayer.database.writer import WAY_OUT
from vllm_tasks.datalayer.selection import OWN_COLUMNS, POSITION
from vllm_tasks.datalayer.sources.sql_types import key_array, stored_as
from vllm_tasks.errors import InvalidCall, TablesUnavailable

CHUNK = 50_000
"""Rows of the outputs held as Python objects at a time."""
STATE = {"_fingerprint": pa.string(), "_error": pa.string(), "_input_hash": pa.string()}
CREATED = pa.timestamp("us", "UTC")
VIEW = "_vllm_tasks_outputs"


def key_types(backend: Backend, where: str, name: str, key: Sequence[str]) -> dict[str, pa.DataType] | None:
    """See `Outputs.key_types`."""
    with backend.reading() as connection:
        table = backend.located(connection, name)
        shape = backend.shape(connection, table)
        if not shape:
            return None
        if missing := [column for column in OWN_COLUMNS if column not in shape]:
            raise InvalidCall(f"{where} is not an outputs table: it has no column {missing[0]!r}; {WAY_OUT}")
        there = [column for column in key if column in shape]
        kinds = backend.types(connection, _rows(table, shape), there)
        specs = backend.plain(connection, kinds)
        return dict(zip(there, map(stored_as, kinds, specs), strict=True))


def done(backend: Backend, cursor: duckdb.DuckDBPyConnection, name: str, key: pa.Schema) -> str:
    """See `Outputs.done`; rows are read while the query runs."""
    schema = pa.schema([(f"k{i}", field.type) for i, field in enumerate(key)])
    for column, kind in STATE.items():
        schema = schema.append(pa.field(column, kind))
    schema = schema.append(pa.field("_created_at", CREATED))
    batches = _batches(backend, name, key, schema)
    cursor.register(VIEW, pa.RecordBatchReader.from_batches(schema, batches))
    return f"FROM {VIEW}"


def _batches(backend: Backend, name: str, key: pa.Schema, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with backend.reading() as connection:
        table = backend.located(connection, name)
        shape = backend.shape(connection, table)
        if not shape:
            raise TablesUnavailable(f"the outputs {table.full!r} existed at the start and are missing now")
        rows = _rows(table, shape)
        # An error's message may be long, and only its presence is needed.
        failed = sa.case((rows.c["_error"].is_not(None), sa.literal("e")))
        columns = [backend.as_key(rows.c[field.name], field.type) for field in key]
        columns += [rows.c["_fingerprint"], failed, rows.c["_input_hash"], rows.c["_created_at"]]
        query = sa.select(*(c.label(f"_c{i}") for i, c in enumerate(columns)))
        if POSITION in shape:
            query = query.where(sa.func.coalesce(rows.c[POSITION], 0) == 0)
        streaming = connection.execution_options(yield_per=CHUNK)
        for page in streaming.execute(query).partitions():
            *found, created = zip(*page, strict=True)
            arrays = [key_array(values, field, {}) for values, field in zip(found, schema, strict=False)]
            arrays.append(pa.array([UtcTime.read(value) for value in created], CREATED))
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def column_types(dialect: str, key: pa.Schema) -> list[Any]:
    """The types of the key's columns in SQL; raises `InvalidCall` for one that cannot be kept exactly."""
    return [_column_type(dialect, field) for field in key]


def _column_type(dialect: str, field: pa.Field) -> Any:
    kind = field.type
    if pa.types.is_int64(kind):
        return sa.BigInteger()
    if pa.types.is_string(kind):
        return sa.Text()
    if dialect == "sqlite":
        raise InvalidCall(
            f"the key {field.name!r} is {kind}, but SQLite keeps only whole numbers and texts exactly; CAST "
            "it to text in a SELECT, or use a lake or PostgreSQL as db"
        )
    if pa.types.is_decimal(kind):
        return sa.Numeric(kind.precision, kind.scale)
    if pa.types.is_timestamp(kind):
        return sa.DateTime(timezone=kind.tz is not None)
    return {pa.bool_(): sa.Boolean(), pa.date32(): sa.Date(), pa.binary(): sa.LargeBinary()}[kind]


def _rows(table: TableName, shape: Iterable[str]) -> sa.FromClause:
    return table.clause(shape).alias("o")
