"""Reads the outputs table of a database into Arrow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from vllm_tasks.datalayer import vectors
from vllm_tasks.datalayer.database.backends import Backend, Shape, TableName, Verbatim
from vllm_tasks.datalayer.database.keyed_table import UtcTime
from vllm_tasks.datalayer.lake.columns import JSON
from vllm_tasks.datalayer.selection import OWN_COLUMNS

TIMESTAMP = pa.timestamp("us", "UTC")
POSTGRES = {
    "smallint": pa.int16(),
    "integer": pa.int32(),
    "bigint": pa.int64(),
    "double precision": pa.float64(),
    "boolean": pa.bool_(),
    "bytea": pa.binary(),
    "date": pa.date32(),
    "timestamp without time zone": pa.timestamp("us"),
    "timestamp with time zone": TIMESTAMP,
    "real[]": vectors.VECTOR,
    "vector": vectors.VECTOR,
}
"""Arrow types by the name of the column's type; types that are not listed are read as text."""
TEXTS = ("text", "character varying", "bpchar")
"""Types of PostgreSQL whose values the driver returns as text."""
SQLITE = {
    "BIGINT": (pa.int64(), {"integer"}),
    "DOUBLE": (pa.float64(), {"real", "integer"}),
    "BOOLEAN": (pa.bool_(), {"integer"}),
    "BLOB": (pa.binary(), {"blob"}),
    vectors.BLOB: (vectors.VECTOR, {"blob"}),
}
"""Arrow types by the type that we declare, with the storage classes that SQLite may have in such a column."""
OUR_TIME = "____-__-__ __:__:__.______+00:00"
"""A time as `UtcTime` writes it to SQLite; columns added by others may have other texts."""
CHUNK = 50_000
"""Rows held as Python objects at a time."""


def outputs_table(backend: Backend, connection: Connection, table: TableName, shape: Shape) -> pa.Table:
    """The complete table. JSON is text, marked as in a lake; SQLite does not know which texts are JSON."""
    specs = [column.kind for column in shape.values()]
    if connection.dialect.name == "postgresql":  # the key may be of a domain
        specs = backend.plain(connection, list(map(Verbatim, specs)))
    named = dict(zip(shape, specs, strict=True))
    kinds = {name: _arrow(connection, table, name, spec) for name, spec in named.items()}
    schema = pa.schema(
        pa.field(name, kind, metadata=JSON if named[name] == "jsonb" else None)
        for name, kind in kinds.items()
    )
    columns = [
        sa.cast(c, sa.Text).label(c.name) if _as_text(named[c.name], connection) else c
        for c in table.clause(kinds).c
    ]
    streaming = connection.execution_options(yield_per=CHUNK)
    batches = [
        pa.record_batch(list(map(_array, zip(*rows, strict=True), kinds.values())), schema=schema)
        for rows in streaming.execute(sa.select(*columns)).partitions()
    ]
    return pa.Table.from_batches(batches, schema)


def _arrow(connection: Connection, table: TableName, column: str, kind: str) -> pa.DataType:
    if connection.dialect.name == "sqlite":
        return _in_sqlite(connection, table, column, kind)
    if kind.startswith(("date", "timestamp")) and column not in OWN_COLUMNS:
        return pa.string() if _out_of_range(connection, table, column) else POSTGRES.get(kind, pa.string())
    return POSTGRES.get(kind, pa.string())


def _in_sqlite(connection: Connection, table: TableName, column: str, kind: str) -> pa.DataType:
    """The declared type if all values have it; SQLite allows any value in any column."""
    c = table.clause([column]).c[column]
    if kind == "DATETIME":
        other = sa.select(sa.true()).where(c.not_like(OUR_TIME)).limit(1)
        return pa.string() if connection.execute(other).first() else TIMESTAMP
    query = sa.select(sa.func.typeof(c)).distinct()
    found = {*connection.execute(query).scalars()} - {"null"}
    if kind in SQLITE and found <= SQLITE[kind][1]:
        return SQLITE[kind][0]
    if found:
        same = {"integer": pa.int64(), "real": pa.float64(), "blob": pa.binary()}
        return same.get(found.pop(), pa.string()) if len(found) == 1 else pa.string()
    return pa.int64() if kind in ("INT", "INTEGER") else pa.string()


def _out_of_range(connection: Connection, table: TableName, column: str) -> bool:
    """Whether a column of PostgreSQL has times that Python lacks; the driver returns those as text."""
    c = table.clause([column]).c[column]
    outside = sa.or_(c < sa.text("'0001-01-02'"), c > sa.text("'9999-12-30'"))
    return connection.execute(sa.select(sa.true()).where(outside).limit(1)).first() is not None


def _as_text(kind: str, connection: Connection) -> bool:
    """Whether a column is cast to text in the query, because the driver's value may be another."""
    return connection.dialect.name == "postgresql" and kind not in POSTGRES and kind not in TEXTS


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if kind == pa.string():
        values = [v if v is None or isinstance(v, str) else str(v) for v in values]
    elif kind == pa.bool_():
        values = [None if v is None else bool(v) for v in values]
    elif kind == TIMESTAMP:
        values = [UtcTime.read(v) for v in values]
    elif kind == vectors.VECTOR:
        values = [vectors.of_bytes(v) if isinstance(v, bytes) else v for v in values]
    return pa.array(values, kind)
