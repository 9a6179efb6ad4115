"""A table of a database whose rows are replaced by key in transactions: its types, shape and statements."""

from __future__ import annotations

import random
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import DBAPIError

from vllm_tasks.datalayer import vectors
from vllm_tasks.datalayer.database.backends import Backend, Column, Shape, TableName, Verbatim
from vllm_tasks.datalayer.selection import POSITION, Key, Row
from vllm_tasks.datalayer.storable import HALF_A_CHARACTER, INT64, is_text, to_json
from vllm_tasks.errors import InvalidCall

ATTEMPTS = 10
ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""An escaped NUL in JSON; an even number of backslashes before it belong to the text."""

UTC_TEXT = "%(year)04d-%(month)02d-%(day)02d %(hour)02d:%(minute)02d:%(second)02d.%(microsecond)06d+00:00"


class UtcTime(sa.TypeDecorator[datetime]):
    """Aware datetimes, stored in UTC where the database keeps no zone; SQLite's text ends with +00:00."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "sqlite":
            return sqlite.DATETIME(storage_format=UTC_TEXT)  # type: ignore[no-untyped-call]  # SQLAlchemy's
        return self.impl_instance

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc if dialect.name == "postgresql" else utc.replace(tzinfo=None)

    @staticmethod
    def read(value: Any) -> datetime | None:
        """The datetime of a value that the driver returned for such a column."""
        if value is None:
            return None
        found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)


class JsonText(sa.TypeDecorator[Any]):
    """JSON as text, NULL for None. A column of the type JSON would alter numbers in SQLite."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else to_json(value)


class Vector(sa.TypeDecorator[list[float]]):
    """A list of numbers of 32 bits: bytes in SQLite, an array in PostgreSQL, where the server casts it if the
    column is a `vector` of pgvector."""

    impl = sa.LargeBinary
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.ARRAY(sa.REAL))
        return Verbatim(vectors.BLOB)

    def process_bind_param(self, value: list[float] | None, dialect: Dialect) -> Any:
        return value if value is None or dialect.name == "postgresql" else vectors.to_bytes(value)


KINDS: dict[str, Any] = {
    "str": sa.Text(),
    "int": sa.BigInteger(),
    "float": sa.Double(),
    "bool": sa.Boolean(),
    "json": JsonText().with_variant(JSONB(none_as_null=True), "postgresql"),
    "bytes": sa.LargeBinary(),
    "timestamp": UtcTime(),
    "vector": Vector(),
}


def shape_of(table: sa.Table, dialect: Dialect) -> Shape:
    """The shape that the table will have once it is created."""
    shape = {}
    for column in table.c:
        spec = column.type.compile(dialect).partition(" COLLATE ")[0]
        if dialect.name == "postgresql" and not isinstance(column.type, Verbatim):
            spec = spec.lower()
        shape[column.name] = Column(spec, bool(column.nullable))
    return shape


def refuse_differences(
    backend: Backend, name: str, there: Shape, expected: Shape, way_out: str, *, exactly: bool = False
) -> None:
    """Raise `InvalidCall` unless the existing table can hold all values of the expected one.

    Others may have added columns (unless `exactly`), indexes and triggers, or widened types.
    """
    wrong = []
    for column, needed in expected.items():
        found = there.get(column)
        if found is None:
            wrong.append(f"it has no column {column!r}, which would be {needed.kind or 'any type'}")
        elif not backend.holds(found.kind, needed.kind):
            wrong.append(f"{column!r} is {found.kind or 'any type'}, would be {needed.kind or 'any type'}")
        elif needed.nullable and not found.nullable:
            wrong.append(f"{column!r} is NOT NULL, but has no value when a row fails")
    for column in there.keys() - expected.keys():
        if exactly:
            wrong.append(f"it has a column {column!r}, which it should not have")
        elif column == POSITION:
            wrong.append(f"it has a column {column!r} of flattened outputs, which it should not have")
        elif not there[column].nullable and not there[column].default:
            wrong.append(f"{column!r} is NOT NULL without a DEFAULT, so that no new row can be written")
    if wrong:
        raise InvalidCall(f"the table {name!r} exists with another shape: {'; '.join(wrong)}; {way_out}")


def refuse_long_names(names: Iterable[str], dialect: Dialect) -> None:
    """Raise `InvalidCall` for a name that the database would truncate."""
    for name in names:
        if len(name.encode()) > dialect.max_identifier_length:
            raise InvalidCall(
                f"{name!r} has more than the {dialect.max_identifier_length} bytes that a name may have here"
            )


class KeyedTable:
    """The statements that replace rows of `table`, which has each `key` once.

    All keys are replaced, including those that the caller does not know to exist: a concurrent writer may
    have committed them meanwhile, or this process itself when an acknowledgement was lost.

    `in_place`: an existing row is updated, so that columns added by others keep their values; the key must
    have a unique index. Otherwise the row is deleted before the new one is inserted.
    """

    def __init__(
        self,
        backend: Backend,
        table: sa.Table,
        key: Sequence[str],
        json: Collection[str],
        *,
        in_place: bool = False,
    ) -> None:
        self._backend = backend
        self._table = table
        self._key = tuple(key)
        self._json = json
        # Column names may have characters that parameter names may not have.
        binds = {name: sa.bindparam(f"b{i}", type_=c.type) for i, (name, c) in enumerate(table.c.items())}
        self._binds = {name: bind.key for name, bind in binds.items()}
        self._in_place = in_place
        self._insert = self._upsert(binds) if in_place else sa.insert(table).values(binds)
        self._delete = sa.delete(table).where(*(table.c[name] == binds[name] for name in key))

    def key_of(self, row: Row) -> Key:
        return tuple(row[name] for name in self._key)

    def unstorable(self, row: Row) -> str | None:
        """Why the table could not hold this row, naming the column; None when it can."""
        for name, value in row.items():
            if value is not None and (problem := self._problem(name, value)):
                return f"column {name!r}: {problem}"
        return None

    def replace(
        self,
        rows: Sequence[Row],
        redo: Collection[Key],
        make_or: str | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Write `rows` in one transaction, replacing all rows with their keys and those in `redo`.

        `before` is called first, when no other writer of ours can commit any more; see `Writer.commit`.
        `make_or`: create the table in that transaction unless it exists; if it exists with another shape,
        raise `InvalidCall` with this way out.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._backend.writing(self._table.name) as connection:
                    if before is not None:
                        before()
                    if make_or is not None:
                        self._make(connection, make_or)
                    return self._write(connection, rows, redo)
            except DBAPIError as e:
                if attempt == ATTEMPTS or not self._backend.is_conflict(e):
                    raise self._backend.translated(e) from e
            time.sleep(random.random() * 0.05 * attempt)
        return None

    def _upsert(self, binds: Mapping[str, Any]) -> sa.Insert:
        dialects: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
        insert = dialects[self._backend.engine.dialect.name](self._table).values(binds)
        names = [c.name for c in self._table.c]
        new = {name: insert.excluded[name] for name in names if name not in self._key}
        made: sa.Insert = insert.on_conflict_do_update(index_elements=list(self._key), set_=new)
        return made

    def _write(self, connection: Connection, rows: Sequence[Row], redo: Collection[Key]) -> None:
        written = set(map(self.key_of, rows))
        removed = {*redo} - written if self._in_place else {*redo, *written}
        if keys := sorted(removed, key=repr):
            names = [self._binds[name] for name in self._key]
            connection.execute(self._delete, [dict(zip(names, key, strict=True)) for key in keys])
        if rows:
            binds = self._binds.items()
            connection.execute(self._insert, [{bind: row[name] for name, bind in binds} for row in rows])

    def _make(self, connection: Connection, way_out: str) -> None:
        place = TableName(self._table.name, self._table.schema)
        if there := self._backend.shape(connection, place):
            expected = shape_of(self._table, connection.dialect)
            # Rows are replaced completely here: values in columns that others added would be lost.
            refuse_differences(self._backend, place.full, there, expected, way_out, exactly=True)
        else:
            self._table.create(connection, checkfirst=False)

    def _problem(self, name: str, value: Any) -> str | None:
        limit = self._backend.longest_key
        if limit and name in self._key and isinstance(value, (str, bytes)) and 4 * len(value) > limit:
            raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
            # The index compresses, but less well than zlib: a value that it can hold is never refused here.
            if len(raw) > limit and len(zlib.compress(raw, 9)) > limit:
                return f"{len(raw):,} bytes are too long for the index of a key, which holds about {limit:,}"
        if name in self._json:
            try:
                value = to_json(value)
            except (TypeError, ValueError, RecursionError) as e:
                return f"cannot be JSON: {e}"
            if not self._backend.nul and "\\u0000" in value and ESCAPED_NUL.search(value):
                return "the character 0 cannot be stored"
        if isinstance(value, str):
            if not self._backend.nul and "\0" in value:
                return "the character 0 cannot be stored"
            if not is_text(value):
                return HALF_A_CHARACTER
        elif isinstance(value, int) and value not in INT64 and name not in self._key:
            return "the number has more than 64 bits"
        elif isinstance(value, float) and value != value and not self._backend.nan:
            return "NaN cannot be stored"
        return None
