"""SQLite: opened read-only for reads, which are kept short, because a reader blocks the writer."""

from __future__ import annotations

import re
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool, QueuePool

from vllm_tasks.datalayer.database import backends
from vllm_tasks.datalayer.database.backends import Backend, Column, Shape, TableName, Verbatim
from vllm_tasks.errors import InvalidCall, TablesUnavailable
from vllm_tasks.places import check_place

COUNT_TIMEOUT = 10.0
"""Seconds that a count may block the commits of an SQLite database without a write-ahead log."""
COUNTED = 50_000
"""Rows that are counted in one read."""
AFFINITIES = {
    "INTEGER": ("INT",),
    "TEXT": ("CHAR", "CLOB", "TEXT"),
    "BLOB": ("BLOB",),
    "REAL": ("REAL", "FLOA", "DOUB"),
}
"""Parts of type names by affinity, in the order in which SQLite looks for them."""
HASH = "vllm_tasks_hash"
"""Our own hash function, which assigns rows to shards: SQLite has none."""


def _hash(*key: bytes) -> int:
    return zlib.crc32(b"\x1f".join(key))


def affinity(kind: str) -> str:
    """SQLite's affinity of a declared type: https://www.sqlite.org/datatype3.html#determination_of_column_affinity"""
    kind = kind.upper()
    for found, parts in AFFINITIES.items():
        if any(part in kind for part in parts):
            return found
    return "NUMERIC" if kind else "BLOB"


class Sqlite(Backend):
    """Reads on read-only connections, and never for long: a reader would block our own writer."""

    keeps_outputs = leaves_results = True
    server_side = False
    nan = False
    numbered = re.compile(r"(.*):\d+", re.DOTALL)

    def __init__(self, url: URL) -> None:
        name = url.database or ""
        if name in ("", ":memory:") or name.startswith("file:") or url.query:
            raise InvalidCall(
                "an SQLite datalayer must be a plain file, as in sqlite:///file.db: a database in memory "
                "would be a separate one for each connection, and options are not supported"
            )
        self.path = Path(name).expanduser().absolute()
        check_place("the database", str(self.path))
        super().__init__(url.set(database=str(self.path)))
        self.reader = self._engine(poolclass=NullPool, creator=lambda: self._connect("ro"))

    def _engine(self, **more: Any) -> Engine:
        if more:
            return super()._engine(**more)
        engine = super()._engine(poolclass=QueuePool, creator=lambda: self._connect("rw"))
        # By the driver's default a transaction begins with its first write, so two writers could both read
        # before either writes. IMMEDIATE takes the write lock first.
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        return engine

    def _connect(self, mode: str) -> sqlite3.Connection:
        if not self.path.exists():
            raise InvalidCall(f"there is no database {str(self.path)!r}")
        if mode == "ro" and Path(f"{self.path}-journal").exists():
            # The journal may be left by a writer that was killed (`kill -9`). Its transaction must be rolled
            # back before anyone reads, which only a writable connection can do; any read on it does.
            with closing(self._opened("rw")) as writer, suppress(sqlite3.Error):
                writer.execute("SELECT 1 FROM sqlite_master").fetchone()
        connection = self._opened(mode)
        # Bytes that are not UTF-8 must fail their row, when its prompt is made, and not the query.
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        connection.create_function(HASH, -1, _hash, deterministic=True)
        return connection

    def _opened(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.as_uri()}?mode={mode}",
            uri=True,
            timeout=backends.WAIT,
            isolation_level=None,
            check_same_thread=False,
        )

    def hashed(self, columns: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[int]:
        # Values are passed as bytes: Python's sqlite3 fails over a text argument that is not UTF-8.
        return sa.Function(HASH, *(sa.cast(c, sa.LargeBinary) for c in columns), type_=sa.Integer())

    def is_temporary(self, error: DBAPIError) -> bool:
        code = getattr(error.orig, "sqlite_errorcode", None)
        if code is None:
            return False
        if code in (sqlite3.SQLITE_READONLY_ROLLBACK, sqlite3.SQLITE_READONLY_RECOVERY):
            return True  # a writer was killed a moment ago
        return code & 0xFF in {
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_LOCKED,
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_PROTOCOL,
            sqlite3.SQLITE_NOMEM,
        }

    def types(self, connection: Connection, source: sa.FromClause, names: Sequence[str]) -> list[Any]:
        query = sa.select(*(source.c[n].label(f"c{i}") for i, n in enumerate(names))).limit(0)
        sql = query.compile(connection, compile_kwargs={"literal_binds": True})
        connection.exec_driver_sql(f"CREATE TEMP TABLE _vllm_tasks_types AS {sql}")
        found = connection.exec_driver_sql("PRAGMA temp.table_info(_vllm_tasks_types)").all()
        connection.exec_driver_sql("DROP TABLE temp._vllm_tasks_types")
        return [Verbatim(row[2]) for row in found]

    def shape(self, connection: Connection, table: TableName) -> Shape:
        name = table.name
        there = sa.text("SELECT name FROM sqlite_master WHERE name = :name COLLATE NOCASE")
        if (found := connection.execute(there, {"name": name}).scalar()) not in (None, name):
            raise InvalidCall(
                f"there is a table {found!r} in {self.where()}, which is the same as {name!r} to SQLite: "
                "use the same case, or give another predict_id or name"
            )
        query = sa.text(
            'SELECT name, type, "notnull", dflt_value IS NOT NULL OR hidden FROM pragma_table_xinfo(:name)'
        )
        rows = connection.execute(query, {"name": name})
        return {name: Column(kind, not required, bool(has)) for name, kind, required, has in rows}

    def holds(self, there: str, needed: str) -> bool:
        return there == needed or affinity(there) == affinity(needed)

    def unique(self, connection: Connection, table: TableName) -> list[tuple[str, ...]]:
        given = {"name": table.name, "schema": table.schema or "main"}
        columns = sa.text("SELECT name, type, pk FROM pragma_table_info(:name, :schema)")
        key = [row for row in connection.execute(columns, given) if row[2]]
        found = [(key[0][0],)] if len(key) == 1 and key[0][1].upper() == "INTEGER" else []
        indexes = sa.text(
            "SELECT l.name, i.name FROM pragma_index_list(:name, :schema) l, "
            "pragma_index_info(l.name, :schema) i "
            'WHERE l."unique" AND NOT l.partial'
        )
        parts: dict[str, list[str | None]] = {}
        for index, column in connection.execute(indexes, given):
            parts.setdefault(index, []).append(column)
        return found + [tuple(c for c in part if c) for part in parts.values() if None not in part]

    def is_floating(self, kind: Any) -> bool:
        return bool(kind.spec == "REAL")

    def listed(
        self, connection: Connection, kinds: Sequence[Any], ids: Sequence[Sequence[Any]]
    ) -> sa.Select[Any]:
        columns = [sa.Column(f"i{n}", kind) for n, kind in enumerate(kinds)]
        table = sa.Table("_vllm_tasks_ids", sa.MetaData(), *columns, prefixes=["TEMPORARY"])
        table.create(connection, checkfirst=False)
        names = [c.name for c in columns]
        if ids:
            connection.execute(sa.insert(table), [dict(zip(names, key, strict=True)) for key in ids])
        return sa.select(*table.c)

    def counted(
        self, connection: Connection, source: sa.FromClause, table: TableName | None, query: sa.Select[Any]
    ) -> Iterator[Sequence[Any]]:
        # Without a write-ahead log a read blocks all commits: read in many short parts, or give up in time.
        rowid = table and self._rowid(connection, source, table)
        if rowid is None:
            yield self._counted_soon(connection, query)
            return
        first = connection.execute(sa.select(sa.func.min(rowid)).select_from(source)).scalar()
        following = sa.select(rowid).select_from(source).where(rowid >= sa.bindparam("first")).order_by(rowid)
        following = following.limit(1).offset(COUNTED)
        while first is not None:
            end = connection.execute(following, {"first": first}).scalar()
            part = query.where(rowid >= first)
            yield connection.execute(part if end is None else part.where(rowid < end)).one()
            first = end

    def _rowid(
        self, connection: Connection, source: sa.FromClause, table: TableName
    ) -> sa.ColumnElement[Any] | None:
        """SQLite's own number of each row of a table, None if it has none."""
        taken = {column.casefold() for column in self._columns(connection, *table)}
        alias = next((a for a in ("rowid", "oid", "_rowid_") if a not in taken), None)
        kind = sa.text("SELECT type FROM sqlite_master WHERE name = :name COLLATE NOCASE")
        if alias is None or connection.execute(kind, {"name": table.name}).scalar() != "table":
            return None
        rowid = sa.literal_column(f"s.{alias}", sa.Integer)
        try:
            connection.execute(sa.select(rowid).select_from(source).limit(0))
        except DBAPIError:  # a table WITHOUT ROWID
            return None
        return rowid

    def _columns(self, connection: Connection, name: str, schema: str | None) -> list[str]:
        query = sa.text("SELECT name FROM pragma_table_info(:name, :schema)")
        return list(connection.execute(query, {"name": name, "schema": schema or "main"}).scalars())

    def _counted_soon(self, connection: Connection, query: sa.Select[Any]) -> Sequence[Any]:
        if connection.exec_driver_sql("PRAGMA journal_mode").scalar() != "wal":
            end = time.monotonic() + COUNT_TIMEOUT
            driver: Any = connection.connection.driver_connection
            driver.set_progress_handler(lambda: time.monotonic() > end, 10_000)
        try:
            return connection.execute(query).one()
        except DBAPIError as e:
            if getattr(e.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_INTERRUPT:
                raise
            raise TablesUnavailable(
                f"{self.where()}: counting the rows of this select takes more than {COUNT_TIMEOUT:g} s, in "
                "which nothing could be committed (with PRAGMA journal_mode = WAL, both are possible)"
            ) from e
