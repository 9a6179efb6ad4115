"""PostgreSQL: read in READ ONLY transactions, written under an advisory lock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, BYTEA, OID
from sqlalchemy.engine import URL, Connection
from sqlalchemy.exc import DBAPIError

from vllm_tasks.datalayer.database import backends
from vllm_tasks.datalayer.database.backends import Backend, Column, Shape, TableName, Verbatim
from vllm_tasks.errors import InvalidCall

DEFAULT = '"default"'
"""The name of a PostgreSQL database's own collation."""
WIDER = {
    "integer": ("smallint",),
    "bigint": ("smallint", "integer"),
    "text": ("character varying",),
    "character varying": ("text",),
}
"""Types whose columns hold all values of other types, and compare with them by an index."""


class Postgres(Backend):
    """Reads in READ ONLY transactions through server-side cursors."""

    keeps_outputs = leaves_results = lists = True
    nul = False
    longest_key = 2700

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
    """Writing what was read aside may take a moment. And a time is the same Python value (its hash is kept)
    whatever the zone of the session is."""

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self.reader = self._engine()
        sa.event.listen(self.reader, "connect", _set_up_reader)

    def _state(self, error: DBAPIError) -> str | None:
        return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)

    def hashed(self, columns: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[int]:
        # Without a collation of its own, a text of columns that have two different ones cannot be hashed.
        texts = sa.func.concat_ws("\x1f", *(sa.collate(sa.cast(c, sa.Text), "C") for c in columns))
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

    def is_conflict(self, error: DBAPIError) -> bool:
        return self._state(error) in ("23505", "40001", "40P01")

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        with self.translating(), self.reader.connect() as connection:
            connection = connection.execution_options(postgresql_readonly=True)
            connection.exec_driver_sql(self.READING)
            yield connection

    @contextmanager
    def writing(self, table: str) -> Iterator[Connection]:
        with self.engine.begin() as connection:
            # Rivals on one table come one after the other: none waits for a key in the midst of a commit.
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{backends.WAIT:.3f}s'")
            lock = sa.text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
            connection.execute(lock, {"name": table})
            yield connection

    def types(self, connection: Connection, source: sa.FromClause, names: Sequence[str]) -> list[Any]:
        one = sa.select(sa.literal(1).label("one")).subquery("one")

        def one_row(*columns: sa.ColumnElement[Any]) -> Sequence[Any]:
            # A row beside none of the source's: what is asked here is known without reading it.
            query = sa.select(*columns).select_from(one.outerjoin(source, sa.false()))
            return connection.execute(query).one()

        oids = [sa.cast(sa.func.pg_typeof(source.c[name]), OID) for name in names]
        types = one_row(*(sa.func.format_type(oid, -1) for oid in oids))
        pg_type = sa.table("pg_type", sa.column("oid"), sa.column("typcollation"), schema="pg_catalog")
        collatable = one_row(
            *(sa.select(pg_type.c.typcollation).where(pg_type.c.oid == oid).scalar_subquery() for oid in oids)
        )
        texts = [name for name, collation in zip(names, collatable, strict=True) if collation]
        collations = one_row(*(sa.func.pg_collation_for(source.c[n]) for n in texts)) if texts else ()
        own = {n: f" COLLATE {c}" for n, c in zip(texts, collations, strict=True) if c not in (None, DEFAULT)}
        return [Verbatim(spec + own.get(name, "")) for name, spec in zip(names, types, strict=True)]

    def located(self, connection: Connection, name: str, *, dots: bool = False) -> TableName:
        schema, dot, rest = name.partition(".")
        if not dot:
            return TableName(name)
        query = sa.text(
            "SELECT to_regclass(quote_ident(:name)) IS NOT NULL, "
            "to_regnamespace(quote_ident(:schema)) IS NOT NULL"
        )
        whole, has_schema = connection.execute(query, {"name": name, "schema": schema}).one()
        if not whole and has_schema:
            return TableName(rest, schema)
        if not whole and not dots and not name.startswith("_"):  # ours have dots, as a predict_id may
            raise InvalidCall(
                f"there is no schema {schema!r} in {self.where()} for the table {name!r}: create it, or "
                "give a name without a dot"
            )
        return TableName(name)

    def shape(self, connection: Connection, table: TableName) -> Shape:
        query = sa.text(
            "SELECT attname, format_type(atttypid, -1), NOT attnotnull, "
            "atthasdef OR attidentity <> '' FROM pg_attribute "
            "WHERE attrelid = to_regclass(:table) AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
        )
        rows = connection.execute(query, {"table": _quoted(connection, table)})
        return {row[0]: Column(*row[1:]) for row in rows}

    def holds(self, there: str, needed: str) -> bool:
        return there == needed or needed in WIDER.get(there, ())

    def may_update(self, connection: Connection, table: TableName) -> bool:
        query = sa.text("SELECT has_table_privilege(to_regclass(:table), 'UPDATE')")
        return bool(connection.execute(query, {"table": _quoted(connection, table)}).scalar())

    def unique(self, connection: Connection, table: TableName) -> list[tuple[str, ...]]:
        query = sa.text(
            "SELECT array_agg(a.attname::text ORDER BY k.n) FROM pg_index x "
            "JOIN pg_class c ON c.oid = x.indrelid "
            "CROSS JOIN LATERAL unnest("
            "x.indkey[0 : x.indnkeyatts - 1]::int2[], x.indcollation[0 : x.indnkeyatts - 1]::oid[]) "
            "WITH ORDINALITY k(attnum, coll, n) "
            "JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = k.attnum "
            "LEFT JOIN pg_collation l ON l.oid = a.attcollation "
            "WHERE x.indrelid = to_regclass(:name) AND x.indisunique AND x.indisvalid AND x.indimmediate "
            "AND x.indpred IS NULL AND x.indexprs IS NULL "
            # A parent of inherited tables shows their rows, which its index does not know.
            "AND (c.relkind = 'p' OR NOT c.relhassubclass) GROUP BY x.indexrelid "
            # Where equal texts may be written differently, an index of another collation knows others.
            "HAVING bool_and(k.coll = a.attcollation OR coalesce(l.collisdeterministic, true))"
        )
        found = connection.execute(query, {"name": _quoted(connection, table)})
        return [tuple(row[0]) for row in found]

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
        self, connection: Connection, kinds: Sequence[Any], ids: Sequence[Sequence[Any]]
    ) -> sa.Select[Any]:
        return sa.select(*list(self.key_rows(kinds, ids).c)[:-1])

    def key_rows(self, kinds: Sequence[Any], keys: Sequence[Sequence[Any]]) -> sa.TableValuedAlias:
        # Text that the server reads: it names what is no value of the key's type.
        arrays = [
            sa.cast(sa.cast([_text(key[n]) for key in keys], ARRAY(sa.Text)), ARRAY(Verbatim(kind.bare)))
            for n, kind in enumerate(kinds)
        ]
        names: list[Any] = [sa.column(f"i{n}") for n in range(len(kinds))]
        table = sa.func.unnest(*arrays).table_valued(*names, name="ids", with_ordinality="n")
        return table.render_derived()

    def packed(self, column: sa.ColumnElement[Any], kind: pa.DataType) -> list[sa.ColumnElement[Any]]:
        nothing: Any = sa.literal_column("CAST('' AS bytea)", BYTEA)
        if pa.types.is_int64(kind):
            return [
                sa.func.string_agg(sa.func.int8send(sa.cast(column, sa.BigInteger)), nothing, type_=BYTEA())
            ]
        if not pa.types.is_string(kind):
            return []
        text = sa.func.convert_to(column, "UTF8", type_=BYTEA())
        lengths = sa.func.int4send(sa.func.octet_length(text))
        return [sa.func.string_agg(part, nothing, type_=BYTEA()) for part in (lengths, text)]

    def as_key(self, column: sa.ColumnElement[Any], kind: Any) -> sa.ColumnElement[Any]:
        return sa.cast(column, sa.Text) if pa.types.is_string(kind) else column

    def bound(self, columns: Sequence[sa.ColumnElement[Any]]) -> list[sa.ColumnElement[Any]]:
        # The server's own text of a value is what it reads without loss, whatever Python makes of it.
        return [sa.cast(column, sa.Text) for column in columns]

    def after(
        self, columns: Sequence[sa.ColumnElement[Any]], kinds: Sequence[Any], bound: Sequence[Any]
    ) -> sa.ColumnElement[bool]:
        values = [
            sa.cast(sa.cast(value, sa.Text), Verbatim(kind.bare))
            for value, kind in zip(bound, kinds, strict=True)
        ]
        return columns[0] > values[0] if len(columns) == 1 else sa.tuple_(*columns) > sa.tuple_(*values)


def _quoted(connection: Connection, table: TableName) -> str:
    quote = connection.dialect.identifier_preparer.quote_identifier
    return ".".join(quote(part).replace("%%", "%") for part in (table.schema, table.name) if part)


def _text(value: Any) -> str:
    return "\\x" + value.hex() if isinstance(value, bytes) else str(value)


def _set_up_reader(connection: Any, _: Any) -> None:
    """Nothing is prepared, for a column that is added to a table would spoil a statement that is.

    Times that are no Python value (infinity, before Christ, after 9999) arrive as PostgreSQL's text.

    They are a matter of the row that has them, and not of the query.
    """
    connection.prepare_threshold = None
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
