"""A SQLAlchemy database: its tables and SELECTs are sources, and each `predict_id` has an outputs table."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import duckdb
import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from vllm_tasks.datalayer import put
from vllm_tasks.datalayer.database import home as database_home
from vllm_tasks.datalayer.database.backends import Backend
from vllm_tasks.datalayer.database.declared import declared, typed
from vllm_tasks.datalayer.database.dialects import backend
from vllm_tasks.datalayer.database.keyed_table import KINDS, KeyedTable, UtcTime, refuse_long_names
from vllm_tasks.datalayer.database.outputs import outputs_table
from vllm_tasks.datalayer.database.relation import Relation, named_table
from vllm_tasks.datalayer.database.writer import DatabaseWriter, refuse_shape
from vllm_tasks.datalayer.elsewhere import NoRows
from vllm_tasks.datalayer.lake.delta import quoted
from vllm_tasks.datalayer.selection import PAGE, POSITION, OutputTable, Row, Selection, SourceRow, Writer
from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.spool import spools
from vllm_tasks.datalayer.storable import is_text
from vllm_tasks.datalayer.workspace import MEMORY, Workspace
from vllm_tasks.errors import InvalidCall

ID_TYPES: dict[str, type] = {
    **dict.fromkeys(("INT", "smallint", "integer", "bigint"), int),
    **dict.fromkeys(("TEXT", "text", "character varying", "bpchar"), str),
}
"""Python type of an id by the type of its column; ids of other columns are parsed by the database."""
BOOLEANS = ("boolean", "BOOLEAN", "BOOL", "NUM")
"""SQLite reports types that it does not know, including BOOLEAN, as `NUM`."""


class Database:
    """`Tables` of SQLite and PostgreSQL.

    Reads are read-only, and no transaction is open while a reader waits for the model. PostgreSQL's rows are
    spooled to a file in the order of the keys, some megabytes at a time. SQLite's selected keys (or rows, for
    a SELECT or a table without a unique index) are first copied to a temporary table, which is then read in
    pages.
    """

    def __init__(self, url: str) -> None:
        self._backend: Backend = backend(url)
        if not self._backend.keeps_outputs:
            raise InvalidCall(
                f"{self._backend.where()} cannot keep outputs: SQLite, PostgreSQL and lakes are tested to "
                "process each row exactly once; MariaDB, MySQL and others are not. Read from it with "
                "source=..., and use a lake, an SQLite file or PostgreSQL as db=..."
            )

    def check(self, selection: Selection) -> None:
        with self._backend.reading() as connection:
            source = self._source(connection, selection)
            kinds = source.kinds(connection, selection.key)
            self._refuse_bad_ids(connection, selection, kinds)
            source.refuse_bad_keys(connection, selection.key)
            table = self._backend.located(connection, selection.outputs)
            if shape := self._backend.shape(connection, table):
                refuse_shape(self._backend, table, shape, selection.key, kinds)

    def rows(self, selection: Selection, size: int) -> Iterator[list[SourceRow]]:
        with self._backend.reading() as connection:
            source = self._source(connection, selection)
            types = declared(connection, source.table, selection.columns)
        pages = self._spooled if self._backend.server_side else self._copied
        keys = len(selection.key)
        values = slice(keys, keys + len(selection.columns))
        with closing(pages(source, selection, size)) as found:
            for page in found:
                yield [
                    SourceRow(
                        tuple(r[:keys]),
                        tuple(map(typed, r[values], types)),
                        bool(r[values.stop]),
                        r[values.stop + 1],
                    )
                    for r in page
                ]

    def count(self, selection: Selection) -> tuple[int, int]:
        with self._backend.reading() as connection:
            source = self._source(connection, selection)
            joined = self._joined(connection, source, selection)
            chosen = sa.func.sum(sa.case((joined.condition, 1), else_=0))
            query = joined.query.add_columns(sa.func.count(), chosen)
            # A few ids of an indexed key are found fast; otherwise the table is counted in parts.
            few = selection.ids is not None and source.index(connection, selection.key)
            table = None if few else source.table
            parts = list(self._backend.counted(connection, source.rows, table, query))
            return sum(part[0] for part in parts), sum(int(part[1] or 0) for part in parts)

    def writer(self, selection: Selection, table: OutputTable) -> Writer:
        with self._backend.reading() as connection:
            kinds = self._source(connection, selection).kinds(connection, selection.key)
        return DatabaseWriter(self._backend, table, selection.key, kinds)

    def unreadable(self) -> Unreadable:
        """No rows: every row of a database has a key."""
        return Unreadable()

    def key_types(self, name: str, key: Sequence[str]) -> dict[str, pa.DataType] | None:
        return database_home.key_types(self._backend, self.where(name), name, key)

    def done(self, cursor: duckdb.DuckDBPyConnection, name: str, key: pa.Schema) -> str:
        return database_home.done(self._backend, cursor, name, key)

    def writer_of(self, types: pa.Schema, key: Sequence[str], table: OutputTable) -> Writer:
        if not types.names:
            return NoRows(self._backend.where())
        kinds = database_home.column_types(self._backend.engine.dialect.name, types)
        return DatabaseWriter(self._backend, table, key, kinds)

    def outputs(self, name: str) -> pa.Table:
        with self._backend.reading() as connection:
            table = self._backend.located(connection, name, dots=True)
            if not (shape := self._backend.shape(connection, table)):
                raise InvalidCall(f"there is no table {name!r} in {self._backend.where()}")
            return outputs_table(connection, table, shape)

    def read(self, select: str, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
        with self._backend.reading() as connection:
            source = Relation.of(self._backend, connection, select, columns)
            names = list(dict.fromkeys(source.columns if columns is None else columns))
            types = declared(connection, source.table, names)
            with closing(self._all_rows(connection, source, names)) as pages:
                for page in pages:
                    yield [dict(zip(names, map(typed, row, types), strict=True)) for row in page]

    def has(self, name: str) -> bool:
        with self._backend.reading() as connection:
            return is_text(name) and named_table(connection, name) is not None

    def quoted(self, name: str) -> str:
        with self._backend.reading() as connection:
            place = self._backend.located(connection, name, dots=True)
        return ".".join(quoted(part) for part in (place.schema, place.name) if part)

    def put(self, name: str, rows: pa.Table, key: Sequence[str]) -> None:
        new = put.checked(name, rows, key)
        with self._backend.reading() as connection:
            place = self._backend.located(connection, name, dots=True)
        refuse_long_names((place.name, *new.column_names), self._backend.engine.dialect)
        columns = [
            sa.Column(f.name, KINDS[put.KINDS[f.type]], nullable=f.name not in key, autoincrement=False)
            for f in new.schema
        ]
        table = sa.Table(
            place.name, sa.MetaData(), *columns, sa.PrimaryKeyConstraint(*key), schema=place.schema
        )
        keyed = KeyedTable(self._backend, table, key, json=())
        listed: list[Row] = new.to_pylist()
        for row in listed:
            if problem := keyed.unstorable(row):
                raise InvalidCall(f"{name!r}: the key {keyed.key_of(row)!r:.200}: {problem}")
        keyed.replace(listed, (), make_or=put.WAY_OUT)

    def read_from(self, name: str) -> str:
        return self.where(name)

    def where(self, name: str) -> str:
        return f"table {name} in {self._backend.where()}"

    def close(self) -> None:
        self._backend.close()
        if "workspace" in self.__dict__:
            self.workspace.close()

    @cached_property
    def workspace(self) -> Workspace:
        """See `Home.workspace`."""
        return Workspace(MEMORY)

    # ------------------------------------------------------------------ the selected rows

    def _source(self, connection: Connection, selection: Selection) -> Relation:
        wanted = (*selection.key, *selection.columns)
        return Relation.of(self._backend, connection, selection.select, wanted)

    def _refuse_bad_ids(self, connection: Connection, selection: Selection, kinds: Sequence[Any]) -> None:
        specs = [kind.compile(connection.dialect).partition(" COLLATE ")[0] for kind in kinds]
        for key in selection.ids or ():
            if len(key) != len(kinds) or not all(map(_fits, key, specs)):
                types = ", ".join(f"{name} ({spec})" for name, spec in zip(selection.key, specs, strict=True))
                raise InvalidCall(f"ids: {key!r:.200} is no value of the key {types}")

    def _joined(
        self,
        connection: Connection,
        source: Relation,
        selection: Selection,
        after: tuple[Sequence[str], Sequence[Any], Sequence[Any]] | None = None,
    ) -> Joined:
        """`after`: columns, their types, and the values of the row after which to begin."""
        table = self._backend.located(connection, selection.outputs)
        shape = self._backend.shape(connection, table)
        query = self._chosen(connection, source, selection)
        if after:
            names, *place = after
            query = query.where(self._backend.after([source.rows.c[name] for name in names], *place))
        if not shape:
            none = selection.refresh == "failed"
            return Joined(query, sa.false() if none else sa.true(), sa.literal(0), sa.null())
        done = table.clause(shape).alias("o")
        # The outputs' column is on the left: SQLite compares by the collation of the left one.
        on = [done.c[name] == source.rows.c[name] for name in selection.key]
        if POSITION in shape:
            on.append(sa.func.coalesce(done.c[POSITION], 0) == 0)
        if after:  # the server does not infer this condition, and would scan all earlier outputs
            on.append(self._backend.after([done.c[name] for name in names], *place))
        return Joined(
            query.select_from(source.rows.outerjoin(done, sa.and_(*on))),
            _condition(done, selection),
            sa.case((done.c[selection.key[0]].is_not(None), 1), else_=0),
            sa.case((done.c["_fingerprint"] == selection.fingerprint, done.c["_input_hash"])),
        )

    def _chosen(self, connection: Connection, source: Relation, selection: Selection) -> sa.Select[Any]:
        """The rows of the source that `ids` and `shard` select."""
        query = source.query()
        columns = [source.rows.c[name] for name in selection.key]
        if selection.ids is not None:
            kinds = source.kinds(connection, selection.key)
            self._refuse_bad_ids(connection, selection, kinds)
            ids = self._backend.listed(connection, kinds, list(dict.fromkeys(selection.ids)))
            query = query.where((columns[0] if len(columns) == 1 else sa.tuple_(*columns)).in_(ids))
        if selection.shard is not None:
            index, count = selection.shard
            query = query.where(self._backend.hashed(columns) % count == index)
        return query

    def _spooled(
        self, source: Relation, selection: Selection, size: int
    ) -> Generator[Sequence[Any], None, None]:
        """Pages of key, values, `redo`, `input_hash`, in the order of the key, by way of a spool file."""
        names = (*selection.key, *selection.columns)
        with self._backend.reading() as connection:
            order = source.index(connection, selection.key) or selection.key
            kinds = source.kinds(connection, order)
        columns = [source.rows.c[name] for name in order]
        place = self._backend.bound(columns)

        def query(connection: Connection, after: Sequence[Any] | None) -> sa.Select[Any]:
            behind = None if after is None else (order, kinds, after)
            joined = self._joined(connection, source, selection, behind)
            bound = [c.label(f"_after{i}") for i, c in enumerate(place)]
            return joined.selected(source, names).add_columns(*bound).order_by(*columns)

        for spool in spools(self._backend, query, len(order), size):
            yield from spool.pages()

    def _copied(
        self, source: Relation, selection: Selection, size: int
    ) -> Generator[Sequence[Any], None, None]:
        """Pages of key, values, `redo`, `input_hash`, by way of a copy of the keys or the rows."""
        names = (*selection.key, *selection.columns)
        with self._backend.reading() as connection:
            source.kinds(
                connection, selection.key
            )  # refuses types that identify no row: `check` may not have run
            joined = self._joined(connection, source, selection)
            indexed = source.index(connection, selection.key)
            copied = selection.key if indexed else names
            types = [*self._backend.types(connection, source.rows, copied), sa.Integer(), sa.Text()]
            copy = _copy(connection, joined.selected(source, copied), types)
            page = sa.select(*list(copy.c)[1:])
            if indexed:
                on = [source.rows.c[name] == copy.c[i + 1] for i, name in enumerate(selection.key)]
                wanted = [source.rows.c[name].label(f"v{i}") for i, name in enumerate(names)]
                page = sa.select(*wanted, *list(copy.c)[-2:])
                page = page.select_from(copy.join(source.rows, sa.and_(*on)))
            yield from _pages(connection, copy, page, size)

    def _all_rows(
        self, connection: Connection, source: Relation, names: Sequence[str]
    ) -> Generator[Sequence[Any], None, None]:
        """Pages of these columns of all rows."""
        query = source.query(*(source.rows.c[name].label(f"c{i}") for i, name in enumerate(names)))
        if self._backend.server_side:
            with connection.execution_options(yield_per=PAGE).execute(query) as result:
                yield from result.partitions()
            return
        copy = _copy(connection, query, self._backend.types(connection, source.rows, names))
        yield from _pages(connection, copy, sa.select(*list(copy.c)[1:]), PAGE)


@dataclass(frozen=True)
class Joined:
    """The source (with the ids), joined with its outputs."""

    query: sa.Select[Any]
    condition: sa.ColumnElement[bool]
    """Selects rows."""
    redo: sa.ColumnElement[Any]
    input_hash: sa.ColumnElement[Any]

    def selected(self, source: Relation, names: Sequence[str]) -> sa.Select[Any]:
        """A query of the selected rows: these columns, `redo`, `input_hash`."""
        wanted = [source.rows.c[name].label(f"c{i}") for i, name in enumerate(names)]
        extra = (self.redo.label("redo"), self.input_hash.label("input_hash"))
        return self.query.add_columns(*wanted, *extra).where(self.condition)


def _condition(done: sa.FromClause, selection: Selection) -> sa.ColumnElement[bool]:
    """The condition on a source row, joined with its output, that selects it."""
    other = done.c["_fingerprint"].is_distinct_from(selection.fingerprint)
    condition: sa.ColumnElement[bool] = sa.true()
    if selection.refresh == "missing":
        condition = other
    elif selection.refresh == "failed":
        condition = done.c["_error"].is_not(None)
    if selection.since and selection.refresh in ("failed", "all"):
        created = sa.type_coerce(done.c["_created_at"], UtcTime())
        condition = sa.and_(condition, sa.or_(other, created < selection.since))
    return condition


def _copy(connection: Connection, query: sa.Select[Any], kinds: Sequence[Any]) -> sa.Table:
    """A temporary copy, with `n` from 1 and the query's columns; no lock is held between two pages of it."""
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


def _fits(value: Any, spec: str) -> bool:
    """Whether a value may be an id of a column of this type."""
    if isinstance(value, bool):
        return spec in BOOLEANS
    if isinstance(value, str) and not is_text(value):
        return False
    return value is not None and isinstance(value, ID_TYPES.get(spec, object))
