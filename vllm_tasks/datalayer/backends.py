"""What differs between databases: connecting, reading only, telling what may pass, a table's shape."""

from __future__ import annotations

import re
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, OID
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool, QueuePool

from vllm_tasks.datalayer.storable import to_json
from vllm_tasks.errors import InvalidCall, TablesUnavailable
from vllm_tasks.places import check_place

DEFAULT = '"default"'
"""The name of a PostgreSQL database's own collation."""
WAIT = 30.0
"""Seconds that a database waits for another's lock."""
PATIENCE = 10.0
"""Seconds that a count may hold up the commits of an SQLite database without a write-ahead log."""
COUNTED = 50_000
"""Rows that SQLite counts in one read."""
HASH = "vllm_tasks_hash"
"""SQLite has no function that tells shards apart; this one is ours."""
DRIVERS = {
    "postgresql": "pip install 'vllm-tasks[postgres]'",
    "mysql": "pip install pymysql",
    "mariadb": "pip install pymysql",
}
NO_URL = (
    "the datalayer's url is no SQLAlchemy URL: dialect://user:password@host/database, "
    "special characters in the password percent-encoded, or sqlite:///file.db"
)


class Verbatim(sa.types.UserDefinedType[Any]):
    """A column type as the database writes it; values pass as the driver gives and takes them."""

    cache_ok = True

    def __init__(self, spec: str) -> None:
        self.spec = spec

    @property
    def bare(self) -> str:
        """The type without its collation."""
        return self.spec.partition(" COLLATE ")[0]

    def get_col_spec(self, **_: Any) -> str:
        return self.spec


def backend(url: str) -> Backend:
    """Connects to nothing yet; raises `InvalidCall`, which never shows the password."""
    try:
        made = sa.make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidCall(NO_URL) from None
    if made.get_backend_name() == "sqlite":
        return Sqlite(made)
    if made.drivername in ("postgresql", "postgres"):
        made = made.set(drivername="postgresql+psycopg")
    if made.get_backend_name() != "postgresql":
        return Backend(made)
    if made.drivername != "postgresql+psycopg":
        # Others send a statement with its parameters filled in, and the server runs two as gladly as one.
        raise InvalidCall(
            f"{made.drivername!r}: PostgreSQL is read by psycopg alone; write postgresql://, or "
            "postgresql+psycopg:// (pip install 'vllm-tasks[postgres]')"
        )
    return Postgres(made)


def _hash(*key: bytes) -> int:
    return zlib.crc32(b"\x1f".join(key))


class Backend:
    """Any dialect, by SQLAlchemy's own means: only SQLite and PostgreSQL are tested."""

    server_side = False
    """A read may stay open while the writer writes; else it is copied aside first."""
    nul = nan = True
    """Text may hold the character 0, numbers may be NaN."""
    longest_key: int | None = None
    """Bytes, compressed, that one value in the index of a key may have."""
    statements = False
    """A SELECT may be a source: nothing that it says can end our statement and begin another."""
    numbered: re.Pattern[str] | None = None
    """What a SELECT's column is called when another one before it has its name."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.engine = self.reader = self._engine()

    def _engine(self, **more: Any) -> Engine:
        name = self.url.get_backend_name()
        try:
            engine = sa.create_engine(
                self.url, hide_parameters=True, pool_pre_ping=True, json_serializer=to_json, **more
            )
        except NoSuchModuleError:
            raise InvalidCall(f"{self.url.drivername!r} is no dialect that SQLAlchemy knows here") from None
        except ImportError as e:
            install = DRIVERS.get(name, "install its Python driver")
            raise InvalidCall(f"the driver for {name!r} is missing ({e}): {install}") from e
        except (ArgumentError, TypeError, ValueError):
            raise InvalidCall(NO_URL) from None
        if engine.dialect.is_async:
            raise InvalidCall(f"{self.url.drivername!r} is an asynchronous driver; name a synchronous one")
        return engine

    def where(self) -> str:
        """The URL without what may be secret: the password and the query."""
        bare = URL.create(
            self.url.get_backend_name(),
            self.url.username,
            None,
            self.url.host,
            self.url.port,
            self.url.database,
        )
        return bare.render_as_string()

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turn the driver's errors into ours."""
        try:
            yield
        except DBAPIError as e:
            raise self.translated(e) from e

    def translated(self, error: DBAPIError) -> InvalidCall | TablesUnavailable:
        """The error for the caller: what may pass, and what will not."""
        said = " ".join(str(error.orig).split())[:500]
        if error.connection_invalidated or self.passing(error):
            return TablesUnavailable(f"{self.where()}: {said}")
        return InvalidCall(f"{self.where()} refuses: {said}")

    def passing(self, error: DBAPIError) -> bool:
        """Whether the same statement may succeed later."""
        return isinstance(error, (OperationalError, InterfaceError))

    def hashed(self, columns: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[int]:
        """A whole number of at least 0 that follows from the values of these columns: tells shards apart."""
        raise InvalidCall(f"shards are not known in {self.where()}: SQLite, PostgreSQL and lakes have them")

    def rival(self, error: DBAPIError) -> bool:
        """Whether another transaction was in the way."""
        return isinstance(error, sa.exc.IntegrityError)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection whose statements cannot write, where the database can promise that."""
        with self.told(), self.reader.connect() as connection:
            yield connection

    @contextmanager
    def writing(self, table: str) -> Iterator[Connection]:
        """One transaction, and on SQLite and PostgreSQL the only one of ours on `table`; errors are raw."""
        with self.engine.begin() as connection:
            yield connection

    def types(self, connection: Connection, source: sa.FromClause, names: Sequence[str]) -> list[Any]:
        """The types of a source's columns, as outputs keep them."""
        inspector = sa.inspect(connection)
        table = source.element if isinstance(source, sa.Alias) else None
        assert isinstance(table, sa.TableClause), "where there are no statements"
        found = {c["name"]: c["type"] for c in inspector.get_columns(table.name, table.schema)}
        return [found[name] for name in names]

    def shape(self, connection: Connection, name: str) -> dict[str, tuple[str, bool]]:
        """Type and whether NULL may stand there, by column; empty when there is no table `name`."""
        inspector = sa.inspect(connection)
        if not inspector.has_table(name):
            return {}
        return {
            c["name"]: (c["type"].compile(connection.dialect), c["nullable"])
            for c in inspector.get_columns(name)
        }

    def unique(self, connection: Connection, name: str, schema: str | None) -> list[set[str]]:
        """Sets of columns of which no two rows have the same values."""
        inspector = sa.inspect(connection)
        keys = [inspector.get_pk_constraint(name, schema)["constrained_columns"]]
        keys += [c["column_names"] for c in inspector.get_unique_constraints(name, schema)]
        return [set(key) for key in keys if key]

    def plain(self, connection: Connection, kinds: Sequence[Any]) -> list[str]:
        """The types' names in small letters, without a schema or collation; a domain's is that beneath it."""
        return [kind.compile(connection.dialect).partition(" COLLATE ")[0].lower() for kind in kinds]

    def floating(self, kind: Any) -> bool:
        """Whether a column type holds floating-point numbers."""
        return isinstance(kind, sa.Float)

    def listed(
        self, kinds: Sequence[Any], ids: Sequence[Sequence[Any]], connection: Connection
    ) -> sa.Select[Any]:
        """`ids` as rows of a query."""
        columns = [sa.Column(f"i{n}", kind) for n, kind in enumerate(kinds)]
        table = sa.Table("_vllm_tasks_ids", sa.MetaData(), *columns, prefixes=["TEMPORARY"])
        table.create(connection, checkfirst=False)
        names = [c.name for c in columns]
        if ids:
            connection.execute(sa.insert(table), [dict(zip(names, key, strict=True)) for key in ids])
        return sa.select(*table.c)

    def counted(
        self,
        connection: Connection,
        source: sa.FromClause,
        table: tuple[str, str | None] | None,
        query: sa.Select[Any],
    ) -> Iterator[Sequence[Any]]:
        """The rows of `query`, which counts the rows of `source`: one, or one for each part of the source."""
        yield connection.execute(query).one()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self.reader.dispose()


class Sqlite(Backend):
    """Reads on connections opened read-only, and never for long: a reader would hold up our own writer."""

    nan = False
    statements = True
    numbered = re.compile(r"(.*):\d+", re.DOTALL)

    def __init__(self, url: URL) -> None:
        name = url.database or ""
        if name in ("", ":memory:") or name.startswith("file:") or url.query:
            raise InvalidCall(
                "an SQLite datalayer is a plain file, as in sqlite:///file.db: a database in memory "
                "would be another one for each connection, and options are not taken"
            )
        self.path = Path(name).expanduser().absolute()
        check_place("the database", str(self.path))
        super().__init__(url.set(database=str(self.path)))
        self.reader = self._engine(poolclass=NullPool, creator=lambda: self._connect("ro"))

    def _engine(self, **more: Any) -> Engine:
        if more:
            return super()._engine(**more)
        engine = super()._engine(poolclass=QueuePool, creator=lambda: self._connect("rw"))
        # The driver's own idea of when a transaction begins would let two of them read before they write.
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        return engine

    def _connect(self, mode: str) -> sqlite3.Connection:
        if not self.path.exists():
            raise InvalidCall(f"there is no database {str(self.path)!r}")
        if mode == "ro" and Path(f"{self.path}-journal").exists():
            # Of a writer that was killed, perhaps: its transaction must be rolled back before anyone
            # reads, which a connection that may not write cannot do. Any read does it.
            with closing(self._opened("rw")) as writer, suppress(sqlite3.Error):
                writer.execute("SELECT 1 FROM sqlite_master").fetchone()
        connection = self._opened(mode)
        # Bytes that are no UTF-8 fail the row that has them, where its prompt is made, and not the query.
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        connection.create_function(HASH, -1, _hash, deterministic=True)
        return connection

    def _opened(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.as_uri()}?mode={mode}",
            uri=True,
            timeout=WAIT,
            isolation_level=None,
            check_same_thread=False,
        )

    def hashed(self, columns: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[int]:
        # The bytes of the text: Python's sqlite3 fails over an argument that is no UTF-8, as a BLOB may be.
        return sa.Function(HASH, *(sa.cast(c, sa.LargeBinary) for c in columns), type_=sa.Integer())

    def passing(self, error: DBAPIError) -> bool:
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

    def shape(self, connection: Connection, name: str) -> dict[str, tuple[str, bool]]:
        there = sa.text("SELECT name FROM sqlite_master WHERE name = :name COLLATE NOCASE")
        if (found := connection.execute(there, {"name": name}).scalar()) not in (None, name):
            raise InvalidCall(
                f"there is a table {found!r} in {self.where()}, which SQLite does not tell from {name!r}: "
                "write it in the same way, or give another predict_id or name"
            )
        query = sa.text('SELECT name, type, "notnull" FROM pragma_table_info(:name)')
        return {row[0]: (row[1], not row[2]) for row in connection.execute(query, {"name": name})}

    def unique(self, connection: Connection, name: str, schema: str | None) -> list[set[str]]:
        given = {"name": name, "schema": schema or "main"}
        columns = sa.text("SELECT name, type, pk FROM pragma_table_info(:name, :schema)")
        key = [row for row in connection.execute(columns, given) if row[2]]
        found = [{row[0] for row in key}] if len(key) == 1 and key[0][1].upper() == "INTEGER" else []
        indexes = sa.text(
            "SELECT l.name, i.name FROM pragma_index_list(:name, :schema) l, "
            "pragma_index_info(l.name, :schema) i "
            'WHERE l."unique" AND NOT l.partial'
        )
        parts: dict[str, set[str | None]] = {}
        for index, column in connection.execute(indexes, given):
            parts.setdefault(index, set()).add(column)
        return found + [{c for c in part if c} for part in parts.values() if None not in part]

    def floating(self, kind: Any) -> bool:
        return bool(kind.spec == "REAL")

    def counted(
        self,
        connection: Connection,
        source: sa.FromClause,
        table: tuple[str, str | None] | None,
        query: sa.Select[Any],
    ) -> Iterator[Sequence[Any]]:
        # Without a write-ahead log no commit passes a read: many short ones, or one that gives up.
        rowid = table and self._rowid(connection, source, *table)
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
        self, connection: Connection, source: sa.FromClause, name: str, schema: str | None
    ) -> sa.ColumnElement[Any] | None:
        """The number that SQLite itself gives each row of a table."""
        taken = {column.casefold() for column in self._columns(connection, name, schema)}
        alias = next((a for a in ("rowid", "oid", "_rowid_") if a not in taken), None)
        kind = sa.text("SELECT type FROM sqlite_master WHERE name = :name COLLATE NOCASE")
        if alias is None or connection.execute(kind, {"name": name}).scalar() != "table":
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
            end = time.monotonic() + PATIENCE
            driver: Any = connection.connection.driver_connection
            driver.set_progress_handler(lambda: time.monotonic() > end, 10_000)
        try:
            return connection.execute(query).one()
        except DBAPIError as e:
            if getattr(e.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_INTERRUPT:
                raise
            raise TablesUnavailable(
                f"{self.where()}: to count the rows of this select takes more than {PATIENCE:g} s, in which "
                "nothing could be committed (PRAGMA journal_mode = WAL lets both go on)"
            ) from e


class Postgres(Backend):
    """Reads in READ ONLY transactions through server-side cursors."""

    server_side = True
    nul = False
    longest_key = 2700
    statements = True

    NEVER = (
        "password authentication failed",
        "does not exist",
        "no pg_hba.conf entry",
        "no password supplied",
    )
    """What the server says to a new connection that it will refuse tomorrow too; libpq gives no code then."""

    READING = """
        SELECT set_config('idle_in_transaction_session_timeout', '0', true),
            CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
                THEN set_config('transaction_timeout', '0', true) END,
            set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO', true),
            set_config('IntervalStyle', 'postgres', true)
    """
    """Between two pages the cursor waits for the model, for as long as that takes. And a time is the same
    Python value (its hash is kept) whatever the zone of the session is."""

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self.reader = self._engine()
        sa.event.listen(self.reader, "connect", _read_what_python_has_not)

    def _state(self, error: DBAPIError) -> str | None:
        return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)

    def hashed(self, columns: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[int]:
        texts = sa.func.concat_ws("\x1f", *(sa.cast(c, sa.Text) for c in columns))
        # Without its sign bit: the least bigint has no absolute value.
        return sa.func.hashtextextended(texts, 0).op("&")(sa.literal(2**63 - 1, sa.BigInteger()))

    def passing(self, error: DBAPIError) -> bool:
        state = self._state(error)
        if state is None:
            said = str(error.orig)
            return super().passing(error) and not ("FATAL" in said and any(no in said for no in self.NEVER))
        # connection, rollback, resources, operator's intervention, system error; lock, idle and
        # transaction timeout
        return state[:2] in ("08", "40", "53", "57", "58") or state in ("55P03", "25P03", "25P04")

    def rival(self, error: DBAPIError) -> bool:
        return self._state(error) in ("23505", "40001", "40P01")

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self.told(), self.reader.connect() as connection:
            connection = connection.execution_options(postgresql_readonly=True)
            connection.exec_driver_sql(self.READING)
            yield connection

    @contextmanager
    def writing(self, table: str) -> Iterator[Connection]:
        with self.engine.begin() as connection:
            # Rivals on one table come one after the other: none waits for a key in the midst of a commit.
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{WAIT:.3f}s'")
            lock = sa.text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
            connection.execute(lock, {"name": table})
            yield connection

    def types(self, connection: Connection, source: sa.FromClause, names: Sequence[str]) -> list[Any]:
        one = sa.select(sa.literal(1).label("one")).subquery("one")

        def told(*columns: sa.ColumnElement[Any]) -> Sequence[Any]:
            # A row beside none of the source's: what is asked here is known without reading it.
            query = sa.select(*columns).select_from(one.outerjoin(source, sa.false()))
            return connection.execute(query).one()

        oids = [sa.cast(sa.func.pg_typeof(source.c[name]), OID) for name in names]
        types = told(*(sa.func.format_type(oid, -1) for oid in oids))
        pg_type = sa.table("pg_type", sa.column("oid"), sa.column("typcollation"), schema="pg_catalog")
        collatable = told(
            *(sa.select(pg_type.c.typcollation).where(pg_type.c.oid == oid).scalar_subquery() for oid in oids)
        )
        texts = [name for name, collation in zip(names, collatable, strict=True) if collation]
        collations = told(*(sa.func.pg_collation_for(source.c[n]) for n in texts)) if texts else ()
        own = {n: f" COLLATE {c}" for n, c in zip(texts, collations, strict=True) if c not in (None, DEFAULT)}
        return [Verbatim(spec + own.get(name, "")) for name, spec in zip(names, types, strict=True)]

    def shape(self, connection: Connection, name: str) -> dict[str, tuple[str, bool]]:
        query = sa.text(
            "SELECT attname, format_type(atttypid, -1), NOT attnotnull FROM pg_attribute "
            "WHERE attrelid = to_regclass(quote_ident(:name)) AND attnum > 0 AND NOT attisdropped "
            "ORDER BY attnum"
        )
        return {row[0]: (row[1], row[2]) for row in connection.execute(query, {"name": name})}

    def unique(self, connection: Connection, name: str, schema: str | None) -> list[set[str]]:
        query = sa.text(
            "SELECT array_agg(a.attname::text) FROM pg_index x JOIN pg_class c ON c.oid = x.indrelid "
            "JOIN pg_attribute a ON a.attrelid = x.indrelid "
            "AND a.attnum = ANY (x.indkey[0 : x.indnkeyatts - 1]) "
            "WHERE x.indrelid = to_regclass(:name) AND x.indisunique AND x.indisvalid AND x.indimmediate "
            "AND x.indpred IS NULL AND x.indexprs IS NULL "
            # A parent of inherited tables shows their rows, which its index does not know.
            "AND (c.relkind = 'p' OR NOT c.relhassubclass) GROUP BY x.indexrelid"
        )
        quote = connection.dialect.identifier_preparer.quote_identifier
        whole = ".".join(quote(part).replace("%%", "%") for part in (schema, name) if part)
        return [set(row[0]) for row in connection.execute(query, {"name": whole})]

    def plain(self, connection: Connection, kinds: Sequence[Any]) -> list[str]:
        query = sa.text(
            "WITH RECURSIVE beneath(n, oid) AS ("
            "SELECT n, to_regtype(spec)::oid "
            "FROM unnest(CAST(:specs AS text[])) WITH ORDINALITY AS given(spec, n) "
            "UNION ALL SELECT n, typbasetype FROM beneath NATURAL JOIN pg_type WHERE typtype = 'd') "
            "SELECT CASE WHEN typcategory = 'A' THEN format_type(oid, -1) "
            "WHEN typnamespace = 'pg_catalog'::regnamespace THEN format_type(oid, -1) ELSE typname END "
            "FROM beneath NATURAL JOIN pg_type WHERE typtype <> 'd' ORDER BY n"
        )
        return list(connection.execute(query, {"specs": [kind.bare for kind in kinds]}).scalars())

    def floating(self, kind: Any) -> bool:
        return kind.spec in ("real", "double precision")

    def listed(
        self, kinds: Sequence[Any], ids: Sequence[Sequence[Any]], connection: Connection
    ) -> sa.Select[Any]:
        # Text that the server reads: it names what is no value of the key's type.
        arrays = [
            sa.cast(sa.cast([_text(key[n]) for key in ids], ARRAY(sa.Text)), ARRAY(Verbatim(kind.bare)))
            for n, kind in enumerate(kinds)
        ]
        names: list[Any] = [sa.column(f"i{n}") for n in range(len(kinds))]
        return sa.select(*sa.func.unnest(*arrays).table_valued(*names, name="ids").render_derived().c)


def _text(value: Any) -> str:
    return "\\x" + value.hex() if isinstance(value, bytes) else str(value)


def _read_what_python_has_not(connection: Any, _: Any) -> None:
    """Times that are no Python value (infinity, before Christ, after 9999) arrive as PostgreSQL's text.

    They are a matter of the row that has them, and not of the query.
    """
    from psycopg import DataError, NotSupportedError
    from psycopg.types import datetime as loaders

    def lenient(loader: type[Any]) -> type[Any]:
        class Lenient(loader):  # type: ignore[misc]
            def load(self, data: Any) -> Any:
                try:
                    return super().load(data)
                except (DataError, NotSupportedError):
                    return bytes(data).decode()

        return Lenient

    for name, loader in (
        ("date", loaders.DateLoader),
        ("time", loaders.TimeLoader),
        ("timetz", loaders.TimetzLoader),
        ("timestamp", loaders.TimestampLoader),
        ("timestamptz", loaders.TimestamptzLoader),
        ("interval", loaders.IntervalLoader),
    ):
        connection.adapters.register_loader(name, lenient(loader))
