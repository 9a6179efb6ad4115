"""PostgreSQL: read in READ ONLY transactions, written under an advisory lock."""

from __future__ import annotations

import re
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
from vllm_tasks.datalayer.values import from_json
from vllm_tasks.errors import InvalidCall

DEFAULT = '"default"'
"""The name of a PostgreSQL database's own collation."""
WIDER = {
    "integer": ("smallint",),
    "bigint": ("smallint", "integer"),
    "text": ("character varying",),
    "character varying": ("text",),
    "vector": ("real[]",),
}
"""Types whose columns hold all values of narrower types and can be compared with them by an index."""
VECTOR = """
    SELECT t.oid FROM pg_type t
    JOIN pg_depend d ON d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.deptype = 'e'
    JOIN pg_extension e ON e.oid = d.refobjid AND e.extname = 'vector'
    WHERE t.typname = 'vector' AND pg_type_is_visible(t.oid)
"""
"""The type `vector` of pgvector, if the extension is in this database and in a schema that is searched."""
ARRAYS = """
    WITH RECURSIVE own(type, held) AS (
    SELECT t.oid, t.oid FROM pg_type t LEFT JOIN pg_class c ON c.oid = t.typrelid
    WHERE t.oid >= 16384 AND t.typarray <> 0 AND coalesce(c.relkind, 'c') = 'c'
    UNION ALL SELECT type, typbasetype FROM own JOIN pg_type ON oid = held AND typtype = 'd')
    SELECT held.oid, type.typarray, type.typdelim FROM own
    JOIN pg_type held ON held.oid = own.held AND held.typtype <> 'd' JOIN pg_type type ON type.oid = own.type
"""
"""Arrays of types that are not built in: enums, domains, composites, extensions' types. Of a domain, the type
beneath it, which its values have. The types of tables' rows are left out, as there may be thousands."""

RANGES = [
    f"{of}{kind}" for of in ("int4", "int8", "num", "date", "ts", "tstz") for kind in ("range", "multirange")
]
TEXTS = ["inet", "cidr", *RANGES]
"""Types whose values arrive as PostgreSQL's text."""
MONTHS = re.compile(rb"\b(mons?|years?)\b")
"""What an interval has that a `timedelta` cannot say."""


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
    """Parts of the server's message when it refuses a connection permanently; libpq has no code for it."""

    READING = """
        SELECT set_config('idle_in_transaction_session_timeout', '0', true),
            CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
                THEN set_config('transaction_timeout', '0', true) END,
            set_config('TimeZone', 'UTC', true), set_config('DateStyle', 'ISO', true),
            set_config('IntervalStyle', 'postgres', true)
    """
    """No timeout ends the transaction while rows are spooled. Times are read in UTC, so that their Python
    value, and so the stored hash of the input, does not depend on the session's zone."""

    def __init__(self, url: URL) -> None:
        super().__init__(url)
        self.reader = self._engine()
        sa.event.listen(self.reader, "connect", _set_up_reader)

    def _state(self, error: DBAPIError) -> str | None:
        return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)

    def hashed(self, columns: Sequence[sa.ColumnElement[Any]]) -> sa.ColumnElement[int]:
        # A text made from columns of two collations can be hashed only with an explicit collation.
        texts = sa.func.concat_ws("\x1f", *(sa.collate(sa.cast(c, sa.Text), "C") for c in columns))
        # The sign bit is masked: abs() would overflow for the least bigint.
        return sa.func.hashtextextended(texts, 0).op("&")(sa.literal(2**63 - 1, sa.BigInteger()))

    def is_temporary(self, error: DBAPIError) -> bool:
        state = self._state(error)
        if state is None:
            said = str(error.orig)
            refused = "FATAL" in said and any(no in said for no in self.NEVER)
            return super().is_temporary(error) and not refused
        # Classes: connection, rollback, resources, operator intervention, system error. Codes: lock timeout,
        # idle timeout, transaction timeout.
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
            # The lock serialises concurrent writers of one table: without it, a commit could wait for another
            # one's key in the middle of its transaction.
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{backends.WAIT:.3f}s'")
            lock = sa.text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
            connection.execute(lock, {"name": table})
            yield connection

    def types(self, connection: Connection, source: sa.FromClause, names: Sequence[str]) -> list[Any]:
        one = sa.select(sa.literal(1).label("one")).subquery("one")

        def one_row(*columns: sa.ColumnElement[Any]) -> Sequence[Any]:
            # An outer join that matches no row: types and collations are known without reading the source.
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
        exists, has_schema = connection.execute(query, {"name": name, "schema": schema}).one()
        if not exists and has_schema:
            return TableName(rest, schema)
        if not exists and not dots and not name.startswith("_"):  # our names have the dots of a predict_id
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

    def vector_type(self, connection: Connection) -> str | None:
        return "vector" if connection.exec_driver_sql(VECTOR).first() else None

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
            # A parent of inherited tables returns their rows, but its index does not cover them.
            "AND (c.relkind = 'p' OR NOT c.relhassubclass) GROUP BY x.indexrelid "
            # With a nondeterministic collation, an index of another collation has other equal texts.
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

    def is_floating(self, kind: Any) -> bool:
        return kind.spec in ("real", "double precision")

    def listed(
        self, connection: Connection, kinds: Sequence[Any], ids: Sequence[Sequence[Any]]
    ) -> sa.Select[Any]:
        return sa.select(*list(self.key_rows(kinds, ids).c)[:-1])

    def key_rows(self, kinds: Sequence[Any], keys: Sequence[Sequence[Any]]) -> sa.TableValuedAlias:
        # The server parses the texts itself, and its error names a value that is not of the key's type.
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
        # The server's own text of a value is read back without loss; a Python value might not be.
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


def _json(data: str | bytes) -> Any:
    text = data if isinstance(data, str) else data.decode()
    try:
        return from_json(text)
    except RecursionError:
        return text


def _set_up_reader(connection: Any, _: Any) -> None:
    """Turn prepared statements off: adding a column to a table would invalidate a prepared statement.

    Times that Python does not have (infinity, before Christ, after 9999) arrive as PostgreSQL's text: they
    must fail their row, and not the query. So do intervals with months or years, which have no fixed number
    of days. Numbers in JSON keep their digits. Ranges and addresses arrive as text, because no other source
    has such types. Vectors of pgvector arrive as arrays of numbers do, and arrays of any type as lists.
    """
    connection.prepare_threshold = None
    from psycopg import DataError, NotSupportedError
    from psycopg.adapt import Loader
    from psycopg.types import datetime as loaders
    from psycopg.types.array import ArrayLoader
    from psycopg.types.json import set_json_loads
    from psycopg.types.string import TextLoader

    set_json_loads(_json, connection)

    def lenient(loader: type[Any]) -> type[Any]:
        class Lenient(loader):  # type: ignore[misc]
            def load(self, data: Any) -> Any:
                try:
                    if loader is loaders.IntervalLoader and MONTHS.search(bytes(data)):
                        raise NotSupportedError
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

    for name in TEXTS:
        connection.adapters.register_loader(name, TextLoader)

    class Vector(Loader):
        def load(self, data: Any) -> list[float]:
            return list(map(float, bytes(data)[1:-1].split(b",")))

    for (oid,) in connection.execute(VECTOR):
        connection.adapters.register_loader(oid, Vector)
    for of, oid, sign in connection.execute(ARRAYS):
        array = type("Array", (ArrayLoader,), {"base_oid": of, "delimiter": sign.encode()})
        connection.adapters.register_loader(oid, array)
    connection.rollback()
