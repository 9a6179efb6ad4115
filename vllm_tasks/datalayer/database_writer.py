"""The outputs table of a database: made once with the source's own key types, written in transactions."""

from __future__ import annotations

import random
import re
import time
import zlib
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError

from vllm_tasks.datalayer.backends import Backend
from vllm_tasks.datalayer.selection import OWN_COLUMNS, POSITION, Key, OutputTable, Row
from vllm_tasks.datalayer.storable import HALF_A_CHARACTER, INT64, is_text, last_outputs, to_json
from vllm_tasks.errors import InvalidCall

TRIES = 10
ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""In JSON: an even number of backslashes before it are backslashes of the text."""

Shape = Mapping[str, tuple[str, bool]]
"""Type and whether NULL may stand there, by column."""


class UtcTime(sa.TypeDecorator[datetime]):
    """Aware datetimes, in UTC where the database keeps no zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        utc = value.astimezone(UTC)
        return utc if dialect.name == "postgresql" else utc.replace(tzinfo=None)

    @staticmethod
    def read(value: Any) -> datetime | None:
        """A value of such a column as the driver gives it."""
        if value is None:
            return None
        found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)


class JsonText(sa.TypeDecorator[Any]):
    """JSON as text, NULL for None. (A column of the type JSON would turn numbers about in SQLite.)"""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else to_json(value)


KINDS: dict[str, Any] = {
    "str": sa.Text(),
    "int": sa.BigInteger(),
    "float": sa.Double(),
    "bool": sa.Boolean(),
    "json": JsonText().with_variant(JSONB(none_as_null=True), "postgresql"),
    "bytes": sa.LargeBinary(),
    "timestamp": UtcTime(),
}


def made(table: OutputTable, key: Sequence[str], key_kinds: Sequence[Any]) -> sa.Table:
    """The table as SQLAlchemy makes it."""
    columns = [sa.Column(name, kind, nullable=False) for name, kind in zip(key, key_kinds, strict=True)]
    columns += [sa.Column(column.name, KINDS[column.kind]) for column in table.columns]
    if table.flatten:
        columns.append(sa.Column(POSITION, KINDS["int"]))
    columns += [sa.Column(name, KINDS[kind]) for name, kind in OWN_COLUMNS.items()]
    result = sa.Table(table.name, sa.MetaData(), *columns)
    if table.flatten:
        # An empty list is one row without a position. At 0 any two outcomes of a key meet.
        position = sa.func.coalesce(result.c[POSITION], sa.literal_column("0"))
        name = "_key_" + sha256(table.name.encode()).hexdigest()[:16]
        sa.Index(name, *(result.c[k] for k in key), position, unique=True)
    else:
        result.append_constraint(sa.PrimaryKeyConstraint(*key))
    return result


def shape_of(table: OutputTable, key: Sequence[str], key_kinds: Sequence[Any], dialect: Dialect) -> Shape:
    """The shape that the table has once it is made."""
    shape = {}
    for column in made(table, key, key_kinds).c:
        spec = column.type.compile(dialect).partition(" COLLATE ")[0]
        if dialect.name == "postgresql" and column.name not in key:
            spec = spec.lower()
        shape[column.name] = (spec, bool(column.nullable))
    return shape


def refuse_differences(name: str, there: Shape, expected: Shape) -> None:
    """Raise `InvalidCall` unless the outputs table that is there is the one expected."""

    def told(shape: Shape, column: str) -> str:
        if column not in shape:
            return "no such column"
        return f"{shape[column][0] or 'any type'}{'' if shape[column][1] else ', part of the key'}"

    wrong = [c for c in {**expected, **there} if there.get(c) != expected.get(c)]
    if wrong:
        differences = "; ".join(f"{c!r} is {told(there, c)}, would be {told(expected, c)}" for c in wrong)
        raise InvalidCall(
            f"the outputs table {name!r} is there with another shape: {differences}. "
            "Give another predict_id, or drop that table if its answers are not needed"
        )


class DatabaseWriter:
    """`Writer` of one outputs table.

    A commit deletes all its keys before it inserts them, also those that nobody said are there: a rival
    may have committed them meanwhile, or this writer itself, when an acknowledgement was lost. (That
    costs less than to run into the unique key and to begin again.) Of a key that is in one commit twice,
    as its row came up twice when the source changed under the run, the later outcome is kept, whole.
    """

    def __init__(
        self, backend: Backend, table: OutputTable, key: Sequence[str], key_kinds: Sequence[Any]
    ) -> None:
        self._backend = backend
        self._key = tuple(key)
        self._kinds = {column.name: str(column.kind) for column in table.columns}
        self._refuse_names(table)
        self._table = made(table, key, key_kinds)
        self._create(table, key_kinds)
        binds = {
            name: sa.bindparam(f"b{i}", type_=c.type) for i, (name, c) in enumerate(self._table.c.items())
        }
        self._binds = {name: bind.key for name, bind in binds.items()}
        self._insert = sa.insert(self._table).values(binds)
        self._delete = sa.delete(self._table).where(*(self._table.c[name] == binds[name] for name in key))

    def commit(self, rows: Sequence[Row], redo: Collection[Key]) -> None:
        for row in rows:
            if problem := self.unstorable(row):
                raise ValueError(f"the key {self._key_of(row)!r:.200}: {problem}")
        latest = last_outputs(rows, self._key)
        for attempt in range(1, TRIES + 1):
            try:
                return self._write(latest, redo)
            except DBAPIError as e:
                if attempt == TRIES or not self._backend.rival(e):
                    raise self._backend.translated(e) from e
            time.sleep(random.random() * 0.05 * attempt)
        return None

    def unstorable(self, row: Row) -> str | None:
        """See `Writer.unstorable`; `commit` raises ValueError for such a row, before anything is sent."""
        for name, value in row.items():
            if value is not None and (problem := self._problem(name, value)):
                return f"column {name!r}: {problem}"
        return None

    def close(self) -> None:
        pass

    def _problem(self, name: str, value: Any) -> str | None:
        limit = self._backend.longest_key
        if limit and name in self._key and isinstance(value, (str, bytes)) and 4 * len(value) > limit:
            raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
            # The index compresses, though less well than this: what it can hold is never refused here.
            if len(raw) > limit and len(zlib.compress(raw, 9)) > limit:
                return f"{len(raw):,} bytes are too long for the index of a key, which holds about {limit:,}"
        if self._kinds.get(name) == "json":
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

    def _key_of(self, row: Row) -> Key:
        return tuple(row[name] for name in self._key)

    def _write(self, rows: Sequence[Row], redo: Collection[Key]) -> None:
        with self._backend.writing(self._table.name) as connection:
            if keys := sorted({*redo, *map(self._key_of, rows)}, key=repr):
                names = [self._binds[name] for name in self._key]
                connection.execute(self._delete, [dict(zip(names, key, strict=True)) for key in keys])
            if rows:
                binds = self._binds.items()
                connection.execute(self._insert, [{bind: row[name] for name, bind in binds} for row in rows])

    def _refuse_names(self, table: OutputTable) -> None:
        if table.partition_by or table.compression:
            raise InvalidCall("partition_by and compression are of a lake; a database takes neither")
        names = [*self._key, *self._kinds, POSITION, *OWN_COLUMNS]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidCall(
                f"the outputs would have more than one column {twice[0]!r} (of the key "
                f"{', '.join(self._key)}, the output's columns and our own); rename it in a SELECT or in "
                "the output_schema"
            )
        longest = self._backend.engine.dialect.max_identifier_length
        for name in (table.name, *self._kinds):
            if len(name.encode()) > longest:
                raise InvalidCall(f"{name!r} has more than the {longest} bytes that a name may have here")

    def _create(self, table: OutputTable, key_kinds: Sequence[Any]) -> None:
        if not self._shape():
            try:
                with self._backend.engine.begin() as connection:
                    self._table.create(connection, checkfirst=False)
            except DBAPIError as e:
                if not self._shape():  # no rival made it
                    raise self._backend.translated(e) from e
        expected = shape_of(table, self._key, key_kinds, self._backend.engine.dialect)
        refuse_differences(table.name, self._shape(), expected)

    def _shape(self) -> Shape:
        with self._backend.reading() as connection:
            return self._backend.shape(connection, self._table.name)
