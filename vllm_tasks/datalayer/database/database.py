"""A SQLAlchemy database: its tables and SELECTs are sources, and each `predict_id` has an outputs table."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from typing import Any

import duckdb
import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from vllm_tasks.datalayer import put
from vllm_tasks.datalayer.database import home as database_home
from vllm_tasks.datalayer.database.backends import Backend
from vllm_tasks.datalayer.database.copied import copy_of, pages_of
from vllm_tasks.datalayer.database.declared import declared, typed
from vllm_tasks.datalayer.database.dialects import backend
from vllm_tasks.datalayer.database.keyed_table import KINDS, KeyedTable, refuse_long_names
from vllm_tasks.datalayer.database.outputs import outputs_table
from vllm_tasks.datalayer.database.relation import Relation, named_table
from vllm_tasks.datalayer.database.selected import SelectedRows
from vllm_tasks.datalayer.database.writer import DatabaseWriter, refuse_outputs, refuse_shape
from vllm_tasks.datalayer.elsewhere import NoRows
from vllm_tasks.datalayer.lake.delta import quoted
from vllm_tasks.datalayer.selection import (
    PAGE,
    OutputTable,
    Row,
    Selection,
    Shard,
    SourceRow,
    Writer,
)
from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.storable import is_text
from vllm_tasks.datalayer.workspace import MEMORY, Workspace
from vllm_tasks.errors import InvalidCall


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
            chosen = self._selected(connection, selection)
            kinds = chosen.source.kinds(connection, selection.key)
            chosen.refuse_bad_ids(connection, kinds)
            chosen.source.refuse_bad_keys(connection, selection.key)
            table = self._backend.located(connection, selection.outputs)
            if shape := self._backend.shape(connection, table):
                refuse_shape(self._backend, table, shape, selection.key, kinds)

    def rows(self, selection: Selection, size: int) -> Iterator[list[SourceRow]]:
        with self._backend.reading() as connection:
            chosen = self._selected(connection, selection)
            types = declared(connection, chosen.source.table, selection.columns)
        keys = len(selection.key)
        values = slice(keys, keys + len(selection.columns))
        with closing(chosen.pages(size)) as found:
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
            chosen = self._selected(connection, selection)
            source, joined = chosen.source, chosen.joined(connection)
            selected = sa.func.sum(sa.case((joined.condition, 1), else_=0))
            query = joined.query.add_columns(sa.func.count(), selected)
            # A few ids of an indexed key are found fast; otherwise the table is counted in parts.
            few = selection.ids is not None and source.index(connection, selection.key)
            table = None if few else source.table
            parts = list(self._backend.counted(connection, source.rows, table, query))
            return sum(part[0] for part in parts), sum(int(part[1] or 0) for part in parts)

    def writer(self, selection: Selection, table: OutputTable) -> Writer:
        with self._backend.reading() as connection:
            kinds = self._selected(connection, selection).source.kinds(connection, selection.key)
        return DatabaseWriter(self._backend, table, selection.key, kinds)

    def check_outputs(self, selection: Selection, table: OutputTable) -> None:
        with self._backend.reading() as connection:
            kinds = self._selected(connection, selection).source.kinds(connection, selection.key)
        refuse_outputs(self._backend, table, selection.key, kinds)

    def unreadable(self) -> Unreadable:
        """No rows: every row of a database has a key."""
        return Unreadable()

    def key_types(self, name: str, key: Sequence[str]) -> dict[str, pa.DataType] | None:
        return database_home.key_types(self._backend, self.where(name), name, key)

    def done(self, cursor: duckdb.DuckDBPyConnection, name: str, key: pa.Schema) -> str:
        return database_home.done(self._backend, cursor, name, key)

    def writer_of(
        self, types: pa.Schema, key: Sequence[str], table: OutputTable, shard: Shard | None
    ) -> Writer:
        """See `Home.writer_of`; a database finds others' keys by itself, whatever the shard."""
        if not types.names:
            return NoRows(self._backend.where())
        kinds = database_home.column_types(self._backend.engine.dialect.name, types)
        return DatabaseWriter(self._backend, table, key, kinds)

    def check_outputs_of(self, types: pa.Schema, key: Sequence[str], table: OutputTable) -> None:
        if types.names:
            kinds = database_home.column_types(self._backend.engine.dialect.name, types)
            refuse_outputs(self._backend, table, key, kinds)

    def outputs(self, name: str) -> pa.Table:
        with self._backend.reading() as connection:
            table = self._backend.located(connection, name, dots=True)
            if not (shape := self._backend.shape(connection, table)):
                raise InvalidCall(f"there is no table {name!r} in {self._backend.where()}")
            return outputs_table(self._backend, connection, table, shape)

    def read(self, select: str, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
        with self._backend.reading() as connection:
            source = Relation.of(self._backend, connection, select, columns)
            names = list(dict.fromkeys(source.columns if columns is None else columns))
            types = declared(connection, source.table, names)
            with closing(self._all_rows(connection, source, names)) as pages:
                for page in pages:
                    yield [dict(zip(names, map(typed, row, types), strict=True)) for row in page]

    def stored(self, name: str, columns: str, where: str) -> list[Row]:
        if not self.has(name):
            return []
        with self._backend.reading() as connection:
            place = self._backend.located(connection, name, dots=True)
        table = ".".join(quoted(part) for part in (place.schema, place.name) if part)
        select = f"SELECT {columns} FROM {table} WHERE {where}"  # noqa: S608 - the names are quoted
        return [row for page in self.read(select) for row in page]

    def has(self, name: str) -> bool:
        with self._backend.reading() as connection:
            return is_text(name) and named_table(connection, name) is not None

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

    def _selected(self, connection: Connection, selection: Selection) -> SelectedRows:
        wanted = (*selection.key, *selection.columns)
        source = Relation.of(self._backend, connection, selection.select, wanted)
        return SelectedRows(self._backend, source, selection)

    def _all_rows(
        self, connection: Connection, source: Relation, names: Sequence[str]
    ) -> Generator[Sequence[Any], None, None]:
        """Pages of these columns of all rows."""
        query = source.query(*(source.rows.c[name].label(f"c{i}") for i, name in enumerate(names)))
        if self._backend.server_side:
            with connection.execution_options(yield_per=PAGE).execute(query) as result:
                yield from result.partitions()
            return
        copy = copy_of(connection, query, self._backend.types(connection, source.rows, names))
        yield from pages_of(connection, copy, sa.select(*list(copy.c)[1:]), PAGE)
