"""What differs between databases: connecting, reading only, telling what may pass, a table's shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError

from vllm_tasks.datalayer.storable import to_json
from vllm_tasks.errors import InvalidCall, TablesUnavailable

WAIT = 30.0
"""Seconds that a database waits for another's lock."""
DRIVERS = {
    "postgresql": "pip install 'vllm-tasks[postgres]'",
    "mysql": "pip install pymysql",
    "mariadb": "pip install pymysql",
}
NO_URL = (
    "the datalayer's url is no SQLAlchemy URL: dialect://user:password@host/database, "
    "special characters in the password percent-encoded, or sqlite:///file.db"
)


class TableName(NamedTuple):
    """Where a table is; no schema is the one that the database looks into by itself."""

    name: str
    schema: str | None = None

    @property
    def full(self) -> str:
        """The name as a caller writes it."""
        return f"{self.schema}.{self.name}" if self.schema else self.name

    def clause(self, columns: Iterable[str] = ()) -> sa.TableClause:
        """The table with these columns, of no particular type."""
        return sa.table(self.name, *map(sa.column, columns), schema=self.schema)


class Column(NamedTuple):
    """A column of a table that is there."""

    kind: str
    """Its type's name, without length or collation."""
    nullable: bool = True
    default: bool = False
    """A row that does not name it has a value there: a default, an identity, or one that is computed."""


Shape = dict[str, Column]
"""The columns of a table by name."""


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


class Backend:
    """Any dialect as a source, by SQLAlchemy's own means; SQLite and PostgreSQL keep outputs too."""

    keeps_outputs = False
    """Commits are tested to be exactly once, whatever kills them."""
    server_side = True
    """A query is read as it runs, in a transaction; else it is copied aside first."""
    lists = False
    """Rows are found by a list of their keys; see `key_rows`."""
    leaves_results = False
    """A result need not be read to its end: many drivers do it themselves when it is closed before."""
    nul = nan = True
    """Text may hold the character 0, numbers may be NaN."""
    longest_key: int | None = None
    """Bytes, compressed, that one value in the index of a key may have."""
    numbered: re.Pattern[str] | None = None
    """What a SELECT's column is called when another one before it has its name."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.engine = self.reader = self._engine()
        if url.get_backend_name() in ("mysql", "mariadb"):
            sa.event.listen(self.reader, "connect", _set_up_mysql)

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
    def translating(self) -> Iterator[None]:
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
        raise NotImplementedError("of databases that keep outputs")

    def is_conflict(self, error: DBAPIError) -> bool:
        """Whether another transaction was in the way."""
        return isinstance(error, sa.exc.IntegrityError)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection whose statements cannot write, where the database can promise that."""
        with self.translating(), self.reader.connect() as connection:
            yield connection

    @contextmanager
    def writing(self, table: str) -> Iterator[Connection]:
        """One transaction, the only one of ours on tables of the name `table`; errors are raw."""
        with self.engine.begin() as connection:
            yield connection

    def types(self, connection: Connection, source: sa.FromClause, names: Sequence[str]) -> list[Any]:
        """The types of a source's columns, as outputs keep them."""
        inspector = sa.inspect(connection)
        table = source.element if isinstance(source, sa.Alias) else None
        if not isinstance(table, sa.TableClause):  # of a SELECT nothing is known before it runs
            return [sa.types.NullType()] * len(names)
        found = {c["name"]: c["type"] for c in inspector.get_columns(table.name, table.schema)}
        return [found[name] for name in names]

    def located(self, connection: Connection, name: str, *, dots: bool = False) -> TableName:
        """Where the table `name` of ours is, or would be made.

        A name with a dot is that of a schema and a table where there are schemas; raises `InvalidCall` when
        this one is not there, unless names may have `dots` of their own.
        """
        return TableName(name)

    def shape(self, connection: Connection, table: TableName) -> Shape:
        """The columns of a table of ours, empty when it is not there."""
        raise NotImplementedError("of databases that keep outputs")

    def holds(self, there: str, needed: str) -> bool:
        """Whether a column of the type `there` takes each value of the type `needed`, and finds it again."""
        return there == needed

    def may_update(self, connection: Connection, table: TableName) -> bool:
        """Whether rows of a table may be changed in their place."""
        return True

    def unique(self, connection: Connection, table: TableName) -> list[tuple[str, ...]]:
        """Columns, in their index's order, of which no two rows have the same values."""
        inspector = sa.inspect(connection)
        keys = [inspector.get_pk_constraint(*table)["constrained_columns"]]
        keys += [c["column_names"] for c in inspector.get_unique_constraints(*table)]
        return [tuple(key) for key in keys if key]

    def plain(self, connection: Connection, kinds: Sequence[Any]) -> list[str]:
        """The types' names in small letters, without a schema or collation; a domain's is that beneath it."""
        return [
            ""
            if isinstance(kind, sa.types.NullType)
            else kind.compile(connection.dialect).partition(" COLLATE ")[0].lower()
            for kind in kinds
        ]

    def floating(self, kind: Any) -> bool:
        """Whether a column type holds floating-point numbers."""
        return isinstance(kind, sa.Float)

    def listed(
        self, connection: Connection, kinds: Sequence[Any], ids: Sequence[Sequence[Any]]
    ) -> sa.Select[Any]:
        """`ids` as rows of a query."""
        raise NotImplementedError("of databases that keep outputs")

    def counted(
        self, connection: Connection, source: sa.FromClause, table: TableName | None, query: sa.Select[Any]
    ) -> Iterator[Sequence[Any]]:
        """The rows of `query`, which counts the rows of `source`: one, or one for each part of the source."""
        yield connection.execute(query).one()

    def as_key(self, column: sa.ColumnElement[Any], kind: Any) -> sa.ColumnElement[Any]:
        """A column whose values are kept as the type `kind` of Arrow."""
        return column

    def packed(self, column: sa.ColumnElement[Any], kind: pa.DataType) -> list[sa.ColumnElement[Any]]:
        """Aggregates that make a few values of a whole column of keys, kept as `kind`; empty where there are
        none. Of int64: its big-endian bytes. Of text: the length of each in bytes, of 4 bytes themselves,
        big-endian; and all texts in UTF-8, one behind the other."""
        return []

    def key_rows(self, kinds: Sequence[Any], keys: Sequence[Sequence[Any]]) -> sa.TableValuedAlias:
        """`keys` as rows with their number, from 1, in a last column; where the database `lists`."""
        raise NotImplementedError("of databases that list")

    def bound(self, columns: Sequence[sa.ColumnElement[Any]]) -> list[sa.ColumnElement[Any]]:
        """What `after` takes of a row to know where it stands."""
        return list(columns)

    def after(
        self, columns: Sequence[sa.ColumnElement[Any]], kinds: Sequence[Any], bound: Sequence[Any]
    ) -> sa.ColumnElement[bool]:
        """Rows that come later, in the order of these columns, than the one with this `bound`."""
        # Spelled out: not every database compares rows, nor finds the place in an index where it does.
        condition: sa.ColumnElement[bool] = sa.false()
        for column, value in zip(reversed(columns), map(_literal, reversed(bound)), strict=True):
            condition = sa.or_(column > value, sa.and_(column == value, condition))
        return condition

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self.reader.dispose()


def _literal(value: Any) -> Any:
    """A span of time, MySQL's TIME, as its text: pymysql writes another one for those before zero."""
    if not isinstance(value, timedelta):
        return value
    micros = abs(value) // timedelta(microseconds=1)
    sign = "-" if value < timedelta(0) else ""
    return (
        f"{sign}{micros // 3_600_000_000}:{micros // 60_000_000 % 60:02d}:{micros % 60_000_000 / 1e6:09.6f}"
    )


def _set_up_mysql(connection: Any, _: Any) -> None:
    """Nothing is written, and a time is the same value whatever the zone of the session is."""
    with closing(connection.cursor()) as cursor:
        cursor.execute("SET SESSION TRANSACTION READ ONLY")
        cursor.execute("SET time_zone = '+00:00'")
