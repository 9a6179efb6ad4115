"""A SQLAlchemy database: sources are its tables and SELECTs, outputs one table for each `predict_id`."""

from __future__ import annotations

import datetime as dt
import json
import logging
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from vllm_tasks.datalayer import put
from vllm_tasks.datalayer.backends import Backend, backend
from vllm_tasks.datalayer.database_writer import WAY_OUT, DatabaseWriter, made
from vllm_tasks.datalayer.keyed_table import (
    KINDS,
    KeyedTable,
    UtcTime,
    refuse_differences,
    refuse_long_names,
    shape_of,
)
from vllm_tasks.datalayer.selection import (
    OWN_COLUMNS,
    PAGE,
    POSITION,
    OutputTable,
    Row,
    Selection,
    SourceRow,
    Writer,
)
from vllm_tasks.datalayer.storable import is_text
from vllm_tasks.errors import InvalidCall, near

logger = logging.getLogger(__name__)

# The first loop gives nothing back, so that the time grows with the length of the text and no faster.
STATEMENT = re.compile(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*+(?:select|with)\b", re.IGNORECASE | re.DOTALL)
TIMESTAMP = pa.timestamp("us", "UTC")
ARROW = {
    "smallint": pa.int16(),
    "integer": pa.int32(),
    "bigint": pa.int64(),
    "BIGINT": pa.int64(),
    "double precision": pa.float64(),
    "DOUBLE": pa.float64(),
    "DOUBLE PRECISION": pa.float64(),
    "boolean": pa.bool_(),
    "BOOLEAN": pa.bool_(),
    "bytea": pa.binary(),
    "BLOB": pa.binary(),
    "date": pa.date32(),
    "timestamp without time zone": pa.timestamp("us"),
    "timestamp with time zone": TIMESTAMP,
    "DATETIME": TIMESTAMP,
}
"""By the name of the column's type, PostgreSQL's in small and SQLite's in capital letters."""
ID_TYPES: dict[str, type] = {
    **dict.fromkeys(("INT", "smallint", "integer", "bigint"), int),
    **dict.fromkeys(("TEXT", "text", "character varying", "bpchar"), str),
}
"""What an id of such a column is; of other types the database reads it."""
NO_KEYS = ("json", "jsonb", "xml", "hstore", "point", "interval")
"""Types whose values are not hashable, have no equality, or are equal and unlike."""
BOOLEANS = ("boolean", "BOOLEAN", "BOOL", "NUM")
"""`NUM` is what SQLite makes of a type that it does not know, BOOLEAN among them."""


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("DATETIME", "TIMESTAMP"), dt.datetime.fromisoformat),
    "DATE": dt.date.fromisoformat,
    **dict.fromkeys(("JSON", "JSONB"), partial(json.loads, parse_constant=_no_number)),
}
"""What SQLite's text is, by the type that the column was declared with."""
CHUNK = 50_000
"""Rows of the outputs that are Python objects at a time, on their way to Arrow."""


@dataclass(frozen=True)
class Source:
    """What `select` names."""

    rows: sa.FromClause
    columns: tuple[str, ...]
    table: tuple[str, str | None] | None
    """Name and schema, when it is a table or view."""

    def query(self, *columns: sa.ColumnElement[Any]) -> sa.Select[Any]:
        # A statement with a parameter takes the protocol in which PostgreSQL refuses to run two of them,
        # so that text that breaks out of the subquery runs not at all.
        return sa.select(*columns).select_from(self.rows).where(sa.literal(1) == 1)


class Database:
    """`Tables` of SQLite, PostgreSQL, and, untested, of other databases that SQLAlchemy knows.

    Reads are read-only where the database can promise it. On PostgreSQL one transaction streams; on
    SQLite, where a long read would hold up our own writer, the selected keys (of a SELECT or of a table
    without a unique index the rows) are first copied to a temporary table, which is then read by pages.
    """

    def __init__(self, url: str) -> None:
        self._backend: Backend = backend(url)

    def check(self, selection: Selection) -> None:
        with self._backend.reading() as connection:
            source = self._source_of(connection, selection)
            kinds = self._kinds(connection, source, selection.key)
            self._refuse_bad_ids(connection, selection, kinds)
            self._refuse_bad_keys(connection, source, selection.key)
            if there := self._backend.shape(connection, selection.outputs):
                table = OutputTable(selection.outputs, ())
                expected = shape_of(made(table, selection.key, kinds, there), connection.dialect)
                known = {n: s for n, s in there.items() if n in expected or not s[1]}
                refuse_differences(selection.outputs, known, expected, WAY_OUT)

    def rows(self, selection: Selection, size: int) -> Iterator[list[SourceRow]]:
        with self._backend.reading() as connection:
            source = self._source_of(connection, selection)
            keys = len(selection.key)
            with closing(self._selected(connection, source, selection, size)) as pages:
                for page in pages:
                    yield [SourceRow(tuple(r[:keys]), tuple(r[keys:-2]), bool(r[-2]), r[-1]) for r in page]

    def count(self, selection: Selection) -> tuple[int, int]:
        with self._backend.reading() as connection:
            source = self._source_of(connection, selection)
            joined = self._joined(connection, source, selection)
            chosen = sa.func.sum(sa.case((joined.condition, 1), else_=0))
            query = joined.query.add_columns(sa.func.count(), chosen)
            # Some ids of an indexed key are found soon; else the table is counted in parts.
            few = selection.ids is not None and self._indexed(connection, source, selection.key)
            table = None if few else source.table
            parts = list(self._backend.counted(connection, source.rows, table, query))
            return sum(part[0] for part in parts), sum(int(part[1] or 0) for part in parts)

    def writer(self, selection: Selection, table: OutputTable) -> Writer:
        with self._backend.reading() as connection:
            source = self._source_of(connection, selection)
            kinds = self._kinds(connection, source, selection.key)
        return DatabaseWriter(self._backend, table, selection.key, kinds)

    def outputs(self, name: str) -> pa.Table:
        with self._backend.reading() as connection:
            shape = self._backend.shape(connection, name)
            if not shape:
                raise InvalidCall(f"there is no table {name!r} in {self._backend.where()}")
            kinds = {column: _arrow(connection, name, column, of) for column, (of, _) in shape.items()}
            schema = pa.schema(list(kinds.items()))
            table = sa.table(name, *map(sa.column, kinds))
            columns = [
                sa.cast(c, sa.Text).label(c.name) if _as_text(shape[c.name][0], connection) else c
                for c in table.c
            ]
            streaming = connection.execution_options(yield_per=CHUNK)
            batches = [
                pa.record_batch(
                    [
                        _array(values, kind)
                        for values, kind in zip(zip(*rows, strict=True), kinds.values(), strict=True)
                    ],
                    schema=schema,
                )
                for rows in streaming.execute(sa.select(*columns)).partitions()
            ]
        return pa.Table.from_batches(batches, schema)

    def read(self, select: str, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
        with self._backend.reading() as connection:
            source = self._source(connection, select, columns)
            names = list(dict.fromkeys(source.columns if columns is None else columns))
            declared = self._declared(connection, source, names)
            with closing(self._whole(connection, source, names)) as pages:
                for page in pages:
                    yield [
                        {n: _value(v, kind) for n, v, kind in zip(names, row, declared, strict=True)}
                        for row in page
                    ]

    def has(self, name: str) -> bool:
        with self._backend.reading() as connection:
            return is_text(name) and self._table(connection, name) is not None

    def put(self, name: str, rows: pa.Table, key: Sequence[str]) -> None:
        new = put.checked(name, rows, key)
        refuse_long_names((name, *new.column_names), self._backend.engine.dialect)
        columns = [
            sa.Column(f.name, KINDS[put.KINDS[f.type]], nullable=f.name not in key, autoincrement=False)
            for f in new.schema
        ]
        table = sa.Table(name, sa.MetaData(), *columns, sa.PrimaryKeyConstraint(*key))
        keyed = KeyedTable(self._backend, table, key, json=())
        listed: list[Row] = new.to_pylist()
        for row in listed:
            if problem := keyed.unstorable(row):
                raise InvalidCall(f"{name!r}: the key {keyed.key_of(row)!r:.200}: {problem}")
        keyed.replace(listed, (), make_or=put.WAY_OUT)

    def where(self, name: str) -> str:
        return f"table {name} in {self._backend.where()}"

    def close(self) -> None:
        self._backend.close()

    # ------------------------------------------------------------------ the source

    def _source_of(self, connection: Connection, selection: Selection) -> Source:
        return self._source(connection, selection.select, (*selection.key, *selection.columns))

    def _source(self, connection: Connection, select: str, wanted: Sequence[str] | None) -> Source:
        """What `select` names; raises `InvalidCall` unless it has each wanted column once, or all."""
        select = select.strip()
        if not is_text(select):
            raise InvalidCall(f"select={select[:200]!r} has half a character (a lone surrogate)")
        table = self._table(connection, select)
        if table:
            clause: sa.TableClause | sa.TextClause = sa.table(table[0], schema=table[1])
        elif STATEMENT.match(select):
            if not self._backend.statements:
                raise InvalidCall(f"in {self._backend.where()}, select a table or view, not a statement")
            # Every colon is escaped: a colon and a name would be a parameter of SQLAlchemy's.
            clause = sa.text(select.rstrip("; \t\r\n").replace(":", "\\:") + "\n")
        else:
            inspector = sa.inspect(connection)
            there = [*inspector.get_table_names(), *inspector.get_view_names()]
            raise InvalidCall(
                f"select={select[:200]!r} is no table or view of {self._backend.where()} and no SELECT"
                f"{_near(select, there)}"
            )
        columns = tuple(self._columns(connection, clause))
        wanted = columns if wanted is None else wanted
        twice = sorted({c for c in columns if columns.count(c) > 1} & {*wanted})
        if twice:
            raise InvalidCall(f"the select has more than one column {twice[0]!r}; name it in the SELECT")
        for name in wanted:
            if name not in columns:
                raise InvalidCall(f"{select[:200]!r} has no column {name!r}{_near(name, columns)}")
        return Source(_rows(clause, columns), columns, table)

    def _table(self, connection: Connection, select: str) -> tuple[str, str | None] | None:
        inspector = sa.inspect(connection)
        schema, dot, name = select.partition(".")
        if len(select) > 200 or "\0" in select or not select:
            return None
        if inspector.has_table(select):
            return select, None
        return (name, schema) if dot and inspector.has_table(name, schema) else None

    def _columns(self, connection: Connection, clause: sa.TableClause | sa.TextClause) -> Sequence[str]:
        rows = _rows(clause, ())
        query = sa.select(sa.text("*")).select_from(rows).where(sa.literal(1) == 1).limit(0)
        try:
            names = list(connection.execute(query).keys())
        except DBAPIError as e:
            error = self._backend.translated(e)
            if isinstance(error, InvalidCall) and isinstance(clause, sa.TextClause):
                raise InvalidCall(f"select must be exactly one SELECT statement that runs: {error}") from e
            raise error from e
        if isinstance(clause, sa.TextClause) and (numbered := self._backend.numbered):
            return [match[1] if (match := numbered.fullmatch(n)) and match[1] in names else n for n in names]
        return names

    def _kinds(self, connection: Connection, source: Source, key: Sequence[str]) -> list[Any]:
        kinds = self._backend.types(connection, source.rows, key)
        for name, kind, spec in zip(key, kinds, self._backend.plain(connection, kinds), strict=True):
            if self._backend.floating(kind) or spec in ("real", "double precision"):
                raise InvalidCall(
                    f"the key {name!r} is a floating-point number, which does not identify a row: equal "
                    "numbers may be stored unequal; select it as text or a whole number"
                )
            if spec.endswith(("]", "multirange")) or spec in NO_KEYS:
                raise InvalidCall(f"the key {name!r} is of the type {spec}, which does not identify a row")
        return kinds

    def _refuse_bad_keys(self, connection: Connection, source: Source, key: Sequence[str]) -> None:
        columns = [source.rows.c[name] for name in key]
        if not self._indexed(connection, source, key):
            logger.info("no unique index on %s says that keys are unique: counting them", ", ".join(key))
            groups = source.query(*columns, sa.func.count().label("n")).group_by(*columns)
            groups = groups.where(*(c.is_not(None) for c in columns))
            twice = groups.having(sa.func.count() > 1).subquery("twice")
            some = sa.select(*twice.c, sa.func.count().over(), sa.func.sum(twice.c.n).over()).limit(1)
            if row := connection.execute(some).first():
                raise InvalidCall(
                    f"the key {', '.join(key)} is not unique: {row[-2]} keys stand in {row[-1]} rows, for "
                    f"example {_shown(key, row)} in {row[-3]}; give a primary_id that identifies a row"
                )
        null = sa.or_(*(c.is_(None) for c in columns))
        if empty := connection.execute(source.query(sa.func.count()).where(null)).scalar():
            row = connection.execute(source.query(*columns).where(null).limit(1)).first()
            raise InvalidCall(
                f"the key {', '.join(key)} is NULL in {empty} rows"
                + (f", for example {_shown(key, row)}" if row is not None and len(key) > 1 else "")
                + "; leave them out with a WHERE, or give another primary_id"
            )

    def _refuse_bad_ids(self, connection: Connection, selection: Selection, kinds: Sequence[Any]) -> None:
        specs = [kind.compile(connection.dialect).partition(" COLLATE ")[0] for kind in kinds]
        for key in selection.ids or ():
            if len(key) != len(kinds) or not all(map(_fits, key, specs)):
                told = ", ".join(f"{name} ({spec})" for name, spec in zip(selection.key, specs, strict=True))
                raise InvalidCall(f"ids: {key!r:.200} is no value of the key {told}")

    # ------------------------------------------------------------------ the selected rows

    def _joined(self, connection: Connection, source: Source, selection: Selection) -> Joined:
        shape = self._backend.shape(connection, selection.outputs)
        query = source.query()
        if selection.ids is not None:
            kinds = self._kinds(connection, source, selection.key)
            self._refuse_bad_ids(connection, selection, kinds)
            ids = self._backend.listed(kinds, list(dict.fromkeys(selection.ids)), connection)
            columns = [source.rows.c[name] for name in selection.key]
            query = query.where((columns[0] if len(columns) == 1 else sa.tuple_(*columns)).in_(ids))
        if selection.shard is not None:
            index, count = selection.shard
            query = query.where(
                self._backend.hashed([source.rows.c[n] for n in selection.key]) % count == index
            )
        if not shape:
            none = selection.refresh == "failed"
            return Joined(query, sa.false() if none else sa.true(), sa.literal(0), sa.null())
        done = sa.table(selection.outputs, *map(sa.column, shape)).alias("o")
        # The outputs' column first: SQLite compares by the collation of the left one.
        on = [done.c[name] == source.rows.c[name] for name in selection.key]
        if POSITION in shape:
            on.append(sa.func.coalesce(done.c[POSITION], 0) == 0)
        other = done.c["_fingerprint"].is_distinct_from(selection.fingerprint)
        condition: sa.ColumnElement[bool] = sa.true()
        if selection.refresh == "missing":
            condition = other
        elif selection.refresh == "failed":
            condition = done.c["_error"].is_not(None)
        if selection.since and selection.refresh in ("failed", "all"):
            created = sa.type_coerce(done.c["_created_at"], UtcTime())
            condition = sa.and_(condition, sa.or_(other, created < selection.since))
        return Joined(
            query.select_from(source.rows.outerjoin(done, sa.and_(*on))),
            condition,
            sa.case((done.c[selection.key[0]].is_not(None), 1), else_=0),
            sa.case((done.c["_fingerprint"] == selection.fingerprint, done.c["_input_hash"])),
        )

    def _selected(
        self, connection: Connection, source: Source, selection: Selection, size: int
    ) -> Generator[Sequence[Any], None, None]:
        """Pages of key, values, `redo`, `input_hash`."""
        names = (*selection.key, *selection.columns)
        joined = self._joined(connection, source, selection)
        if self._backend.server_side:
            return _streamed(connection, joined.selected(source, names), size)
        indexed = self._indexed(connection, source, selection.key)
        copied = selection.key if indexed else names
        kinds = [*self._backend.types(connection, source.rows, copied), sa.Integer(), sa.Text()]
        copy = _copied(connection, joined.selected(source, copied), kinds)
        page = sa.select(*list(copy.c)[1:])
        if indexed:
            on = [source.rows.c[name] == copy.c[i + 1] for i, name in enumerate(selection.key)]
            wanted = [source.rows.c[name].label(f"v{i}") for i, name in enumerate(names)]
            page = sa.select(*wanted, *list(copy.c)[-2:])
            page = page.select_from(copy.join(source.rows, sa.and_(*on)))
        return _pages(connection, copy, page, size)

    def _whole(
        self, connection: Connection, source: Source, names: Sequence[str]
    ) -> Generator[Sequence[Any], None, None]:
        """Pages of these columns of all rows."""
        query = source.query(*(source.rows.c[name].label(f"c{i}") for i, name in enumerate(names)))
        if self._backend.server_side:
            return _streamed(connection, query, PAGE)
        copy = _copied(connection, query, self._backend.types(connection, source.rows, names))
        return _pages(connection, copy, sa.select(*list(copy.c)[1:]), PAGE)

    def _declared(self, connection: Connection, source: Source, names: Sequence[str]) -> list[str]:
        """The types that SQLite's columns were declared with, without lengths; else none is told."""
        if source.table is None or connection.dialect.name != "sqlite":
            return [""] * len(names)
        name, schema = source.table
        query = sa.text("SELECT name, type FROM pragma_table_xinfo(:name, :schema)")
        found = connection.execute(query, {"name": name, "schema": schema or "main"}).all()
        kinds = {column: kind.partition("(")[0].strip().upper() for column, kind in found}
        return [kinds.get(name, "") for name in names]

    def _indexed(self, connection: Connection, source: Source, key: Sequence[str]) -> bool:
        """Whether an index says that keys are unique."""
        if source.table is None:
            return False
        return any(unique <= set(key) for unique in self._backend.unique(connection, *source.table))


@dataclass(frozen=True)
class Joined:
    """The source (with the ids) beside its outputs."""

    query: sa.Select[Any]
    condition: sa.ColumnElement[bool]
    """Which rows are selected."""
    redo: sa.ColumnElement[Any]
    input_hash: sa.ColumnElement[Any]

    def selected(self, source: Source, names: Sequence[str]) -> sa.Select[Any]:
        """The selected rows: these columns, `redo`, `input_hash`."""
        wanted = [source.rows.c[name].label(f"c{i}") for i, name in enumerate(names)]
        extra = (self.redo.label("redo"), self.input_hash.label("input_hash"))
        return self.query.add_columns(*wanted, *extra).where(self.condition)


def _streamed(
    connection: Connection, query: sa.Select[Any], size: int
) -> Generator[Sequence[Any], None, None]:
    """Pages of a query whose cursor is on the server."""
    with connection.execution_options(yield_per=size).execute(query) as result:
        yield from result.partitions()


def _copied(connection: Connection, query: sa.Select[Any], kinds: Sequence[Any]) -> sa.Table:
    """A temporary copy, so that nothing is locked between two pages: `n` from 1, then the query's columns."""
    copy = sa.Table(
        "_vllm_tasks_selected",
        sa.MetaData(),
        sa.Column("n", sa.Integer, primary_key=True),
        *(sa.Column(f"c{i}", kind) for i, kind in enumerate(kinds)),
        prefixes=["TEMPORARY"],
    )
    copy.create(connection, checkfirst=False)
    filled = copy.insert().from_select([c.name for c in copy.c][1:], query, include_defaults=False)
    connection.execute(filled)
    return copy


def _pages(
    connection: Connection, copy: sa.Table, query: sa.Select[Any], size: int
) -> Generator[Sequence[Any], None, None]:
    """Pages of a query that joins each row of a copy with one row."""
    total = connection.execute(sa.select(sa.func.max(copy.c.n))).scalar() or 0
    page = query.where(copy.c.n > sa.bindparam("after"), copy.c.n <= sa.bindparam("last"))
    for after in range(0, total, size):
        yield connection.execute(page, {"after": after, "last": after + size}).all()


def _rows(clause: sa.TableClause | sa.TextClause, columns: Sequence[str]) -> sa.FromClause:
    if isinstance(clause, sa.TextClause):
        return clause.columns(*map(sa.column, columns)).subquery("s")
    return sa.table(clause.name, *map(sa.column, columns), schema=clause.schema).alias("s")


def _fits(value: Any, spec: str) -> bool:
    """Whether a value may be an id of a column of this type."""
    if isinstance(value, bool):
        return spec in BOOLEANS
    if isinstance(value, str) and not is_text(value):
        return False
    return value is not None and isinstance(value, ID_TYPES.get(spec, object))


def _near(name: str, names: Sequence[str]) -> str:
    there = ", ".join(map(repr, list(names)[:20])) + (", ..." if len(names) > 20 else "")
    return f"{near(name, names)}; there is {there or 'nothing'}"


def _shown(key: Sequence[str], row: Sequence[Any]) -> str:
    return ", ".join(f"{name}={value!r:.100}" for name, value in zip(key, row, strict=False))


def _arrow(connection: Connection, name: str, column: str, kind: str) -> pa.DataType:
    """What a column's values are in Arrow; whatever is not listed is shown as text."""
    if kind in ARROW:
        if kind.startswith(("date", "timestamp")) and column not in OWN_COLUMNS:
            return pa.string() if _out_of_range(connection, name, column) else ARROW[kind]
        return ARROW[kind]
    if connection.dialect.name == "sqlite" and kind in ("INT", "NUM", ""):
        # Any value may stand in a column of SQLite's.
        c = sa.table(name, sa.column(column)).c[column]
        found = set(connection.execute(sa.select(sa.func.typeof(c)).distinct()).scalars())
        if found == {"blob"}:
            return pa.binary()
        return pa.int64() if found == {"integer"} or (kind == "INT" and not found) else pa.string()
    return pa.string()


def _out_of_range(connection: Connection, name: str, column: str) -> bool:
    """Whether PostgreSQL has times in this column that are no Python value: the driver gives their text."""
    c = sa.table(name, sa.column(column)).c[column]
    outside = sa.or_(c < sa.text("'0001-01-02'"), c > sa.text("'9999-12-30'"))
    return connection.execute(sa.select(sa.true()).where(outside).limit(1)).first() is not None


def _as_text(kind: str, connection: Connection) -> bool:
    """Whether the database is asked for the text of a column, as the driver's value may be something else."""
    return connection.dialect.name == "postgresql" and kind not in ARROW and ID_TYPES.get(kind) is not str


def _value(value: Any, declared: str) -> Any:
    """A value of SQLite's as the column's declared type has it; any other one may stand there, and stays."""
    if declared in ("BOOLEAN", "BOOL") and value in (0, 1):
        return bool(value)
    if declared in READ and isinstance(value, str):
        try:
            return READ[declared](value)
        except (ValueError, RecursionError):
            return value
    return value


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if kind == pa.string():
        values = [v if v is None or isinstance(v, str) else str(v) for v in values]
    elif kind == pa.bool_():
        values = [None if v is None else bool(v) for v in values]
    elif kind == TIMESTAMP:
        values = [UtcTime.read(v) for v in values]
    return pa.array(values, kind)
