"""The differences between databases: connecting, read-only access, temporary errors, a table's shape."""

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
from vllm_tasks.places import check_place

WAIT = 30.0
"""Seconds that a connection waits for another one's lock."""
DRIVERS = {
    "postgresql": "pip install 'vllm-tasks[postgres]'",
    "mysql": "pip install 'vllm-tasks[mysql]', and begin the url with mysql+pymysql://",
    "mariadb": "pip install 'vllm-tasks[mysql]', and begin the url with mariadb+pymysql://",
}
NO_LOCAL_FILES: dict[str, dict[str, Any]] = {
    "mariadbconnector": {"local_infile": False},
    "mysqlconnector": {"allow_local_infile": False},
    "mysqldb": {"local_infile": False},
}
"""By driver: a server may ask it for files of this machine, unless it is told not to send any. pymysql sends
none by default."""
NO_URL = (
    "the datalayer's url is not a SQLAlchemy URL: dialect://user:password@host/database, "
    "special characters in the password percent-encoded, or sqlite:///file.db"
)
FILES = re.compile("ssl|file|cert|path")
"""Options of a URL that name files: of certificates, keys, passwords and other options."""


class TableName(NamedTuple):
    """The name of a table; without a schema, it is looked up in the database's default schema."""

    name: str
    schema: str | None = None

    @property
    def full(self) -> str:
        """The name as a caller writes it, with its schema."""
        return f"{self.schema}.{self.name}" if self.schema else self.name

    def clause(self, columns: Iterable[str] = ()) -> sa.TableClause:
        """The table with these columns, without types."""
        return sa.table(self.name, *map(sa.column, columns), schema=self.schema)


class Column(NamedTuple):
    """A column of an existing table."""

    kind: str
    """The name of its type, without length or collation."""
    nullable: bool = True
    default: bool = False
    """Whether a row that does not name it gets a value: a default, an identity or a computed one."""


Shape = dict[str, Column]
"""The columns of a table by name."""


class Verbatim(sa.types.UserDefinedType[Any]):
    """A column type as the database writes it; values pass unchanged from and to the driver."""

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
    """Any dialect as a source, by SQLAlchemy's own means; SQLite and PostgreSQL keep outputs, too."""

    keeps_outputs = False
    """Whether commits are tested to be exactly once, whatever kills them."""
    server_side = True
    """Whether a query is read as it runs, in a transaction; otherwise its rows are copied first."""
    lists = False
    """Whether rows can be found by a list of their keys; see `key_rows`."""
    leaves_results = False
    """Whether closing a result early is cheap; many drivers read the rest of it then."""
    nul = nan = True
    """Whether text may contain NUL and numbers may be NaN."""
    longest_key: int | None = None
    """Maximum bytes, compressed, of one value in the index of a key."""
    numbered: re.Pattern[str] | None = None
    """Pattern of a SELECT's column that is numbered because an earlier one has its name."""

    def __init__(self, url: URL) -> None:
        _check_options(url)
        self.url = url
        self.engine = self.reader = self._engine()
        if url.get_backend_name() in ("mysql", "mariadb"):
            sa.event.listen(self.reader, "connect", _set_up_mysql)

    def _engine(self, **more: Any) -> Engine:
        name = self.url.get_backend_name()
        try:
            engine = sa.create_engine(
                self.url,
                hide_parameters=True,
                pool_pre_ping=True,
                json_serializer=to_json,
                connect_args=NO_LOCAL_FILES.get(self.url.get_driver_name(), {}),
                **more,
            )
        except NoSuchModuleError:
            raise InvalidCall(
                f"{self.url.drivername!r} is not a dialect that SQLAlchemy knows here"
            ) from None
        except ImportError as e:
            install = DRIVERS.get(name, "install its Python driver")
            raise InvalidCall(f"the driver for {name!r} is missing ({e}): {install}") from e
        except (ArgumentError, TypeError, ValueError):
            raise InvalidCall(NO_URL) from None
        if engine.dialect.is_async:
            raise InvalidCall(f"{self.url.drivername!r} is an asynchronous driver; name a synchronous one")
        return engine

    def where(self) -> str:
        """The URL without the parts that may be secret: the password and the query."""
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
        """Translate the driver's errors into ours."""
        try:
            yield
        except DBAPIError as e:
            raise self.translated(e) from e

    def translated(self, error: DBAPIError) -> InvalidCall | TablesUnavailable:
        """The error for the caller: `TablesUnavailable` if it is temporary, else `InvalidCall`."""
        said = " ".join(str(error.orig).split())[:500]
        if error.connection_invalidated or self.is_temporary(error):
            return TablesUnavailable(f"{self.where()}: {said}")
        return InvalidCall(f"{self.where()} refuses: {said}")

    def is_temporary(self, error: DBAPIError) -> bool:
        """Whether the same statement may succeed later."""
        return isinstance(error, (OperationalError, InterfaceError))

    def hashed(self, columns: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[int]:
        """A hash of these columns, a whole number of at least 0, which assigns rows to shards."""
        raise NotImplementedError("only for databases that keep outputs")

    def is_conflict(self, error: DBAPIError) -> bool:
        """Whether the error is a conflict with another transaction."""
        return isinstance(error, sa.exc.IntegrityError)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection whose statements cannot write, if the database can guarantee that."""
        with self.translating(), self.reader.connect() as connection:
            yield connection

    @contextmanager
    def writing(self, table: str) -> Iterator[Connection]:
        """A transaction, our only one at a time on tables of the name `table`; errors are the driver's."""
        with self.engine.begin() as connection:
            yield connection

    def types(self, connection: Connection, source: sa.FromClause, names: Sequence[str]) -> list[Any]:
        """The types of a source's columns, as the outputs keep them."""
        inspector = sa.inspect(connection)
        table = source.element if isinstance(source, sa.Alias) else None
        if not isinstance(table, sa.TableClause):  # the types of a SELECT are unknown before it runs
            return [sa.types.NullType()] * len(names)
        found = {c["name"]: c["type"] for c in inspector.get_columns(table.name, table.schema)}
        return [found[name] for name in names]

    def located(self, connection: Connection, name: str, *, dots: bool = False) -> TableName:
        """The name and schema under which our table `name` is or would be created.

        If the database has schemas, a dot separates the schema from the table; raises `InvalidCall` if there
        is no such schema, unless names may contain `dots`.
        """
        return TableName(name)

    def shape(self, connection: Connection, table: TableName) -> Shape:
        """The columns of one of our tables, empty if it does not exist."""
        raise NotImplementedError("only for databases that keep outputs")

    def holds(self, there: str, needed: str) -> bool:
        """Whether a column of the type `there` holds every value of the type `needed`, and can find it."""
        return there == needed

    def vector_type(self, connection: Connection) -> str | None:
        """The type that an extension of this database has for vectors; None if it has none."""
        return None

    def may_update(self, connection: Connection, table: TableName) -> bool:
        """Whether rows of a table may be updated in place."""
        return True

    def unique(self, connection: Connection, table: TableName) -> list[tuple[str, ...]]:
        """Sets of columns that are unique by an index, each in the index's order."""
        inspector = sa.inspect(connection)
        keys = [inspector.get_pk_constraint(*table)["constrained_columns"]]
        keys += [c["column_names"] for c in inspector.get_unique_constraints(*table)]
        return [tuple(key) for key in keys if key]

    def plain(self, connection: Connection, kinds: Sequence[Any]) -> list[str]:
        """The types' names in lower case, without schema or collation; for a domain, its base type's name."""
        return [
            ""
            if isinstance(kind, sa.types.NullType)
            else kind.compile(connection.dialect).partition(" COLLATE ")[0].lower()
            for kind in kinds
        ]

    def is_floating(self, kind: Any) -> bool:
        """Whether a column type is of floating-point numbers."""
        return isinstance(kind, sa.Float)

    def listed(
        self, connection: Connection, kinds: Sequence[Any], ids: Sequence[Sequence[Any]]
    ) -> sa.Select[Any]:
        """`ids` as rows of a query."""
        raise NotImplementedError("only for databases that keep outputs")

    def counted(
        self, connection: Connection, source: sa.FromClause, table: TableName | None, query: sa.Select[Any]
    ) -> Iterator[Sequence[Any]]:
        """The results of `query`, which counts rows of `source`: one, or one for each part of the source."""
        yield connection.execute(query).one()

    def as_key(self, column: sa.ColumnElement[Any], kind: Any) -> sa.ColumnElement[Any]:
        """The column with its values as outputs keep them in Arrow's type `kind`."""
        return column

    def packed(self, column: sa.ColumnElement[Any], kind: pa.DataType) -> list[sa.ColumnElement[Any]]:
        """Aggregates that pack a column of keys, kept as `kind`, into a few values; empty if there are none.
        For int64, the big-endian bytes of all values. For text, two values: the length of each in bytes, as
        4 big-endian bytes, and all texts in UTF-8, concatenated."""
        return []

    def key_rows(self, kinds: Sequence[Any], keys: Sequence[Sequence[Any]]) -> sa.TableValuedAlias:
        """`keys` as rows with their number, from 1, in a last column, if the database `lists`."""
        raise NotImplementedError("only for databases that list keys")

    def bound(self, columns: Sequence[sa.ColumnElement[Any]]) -> list[sa.ColumnElement[Any]]:
        """The values of a row that `after` needs to find its position."""
        return list(columns)

    def after(
        self, columns: Sequence[sa.ColumnElement[Any]], kinds: Sequence[Any], bound: Sequence[Any]
    ) -> sa.ColumnElement[bool]:
        """The condition on rows after the one with this `bound`, in the order of these columns."""
        # Written without row comparison: not every database has it, or uses an index for it.
        condition: sa.ColumnElement[bool] = sa.false()
        for column, value in zip(reversed(columns), map(_literal, reversed(bound)), strict=True):
            condition = sa.or_(column > value, sa.and_(column == value, condition))
        return condition

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self.reader.dispose()


def _literal(value: Any) -> Any:
    """A timedelta, as MySQL's TIME, as text: pymysql writes negative ones wrongly."""
    if not isinstance(value, timedelta):
        return value
    micros = abs(value) // timedelta(microseconds=1)
    sign = "-" if value < timedelta(0) else ""
    return (
        f"{sign}{micros // 3_600_000_000}:{micros // 60_000_000 % 60:02d}:{micros % 60_000_000 / 1e6:09.6f}"
    )


def _set_up_mysql(connection: Any, _: Any) -> None:
    """Make the session read-only, and its zone UTC so that a time is always the same value."""
    with closing(connection.cursor()) as cursor:
        cursor.execute("SET SESSION TRANSACTION READ ONLY")
        cursor.execute("SET time_zone = '+00:00'")


def _check_options(url: URL) -> None:
    """Refuse options of a URL with which a server, or its owner, gets files of this machine."""
    for name, value in url.query.items():
        if "local_infile" in name:
            raise InvalidCall(
                f"the datalayer's url has {name}, with which the server may read any file of this machine: "
                "leave it out"
            )
        for each in (value,) if isinstance(value, str) else value:
            if FILES.search(name) and ("/" in each or each.startswith("~")):
                check_place(f"the file of {name} in the datalayer's url", each)
