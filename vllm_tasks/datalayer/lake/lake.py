"""A lake: a folder or an fsspec URL whose files are sources and whose outputs are Delta tables."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import duckdb
import pyarrow as pa
from deltalake import DeltaTable

from vllm_tasks.datalayer.all_rows import read
from vllm_tasks.datalayer.elsewhere import ByJoin, NoRows
from vllm_tasks.datalayer.join import Join
from vllm_tasks.datalayer.lake.delta import (
    ANOTHER,
    dataset,
    find_table,
    fitting_table,
    make_table,
    quoted,
    refuse_unwritable_folder,
    table_schema,
    writer_properties,
)
from vllm_tasks.datalayer.lake.delta_shape import arrow_schema, beyond_plain, refuse_unwritable
from vllm_tasks.datalayer.lake.delta_writer import DeltaWriter
from vllm_tasks.datalayer.put import WAY_OUT, checked
from vllm_tasks.datalayer.selection import (
    OWN_COLUMNS,
    PAGE,
    POSITION,
    OutputTable,
    Row,
    Selection,
    Shard,
    Writer,
)
from vllm_tasks.datalayer.sources import Source
from vllm_tasks.datalayer.sources.delta import queryable
from vllm_tasks.datalayer.sources.files import Files, exactly
from vllm_tasks.datalayer.sources.readers import Readers
from vllm_tasks.datalayer.storage_errors import storage_errors
from vllm_tasks.datalayer.values import python
from vllm_tasks.datalayer.workspace import MEMORY, Workspace, literal
from vllm_tasks.errors import InvalidCall, TablesUnavailable, near
from vllm_tasks.places import check_place
from vllm_tasks.settings import site_settings

OUTPUTS = "_vllm_tasks_outputs"
"""The view of a table of ours in DuckDB."""


class Lake(ByJoin):
    """`Tables` of a folder or an fsspec URL; as `Outputs`, it keeps the outputs of any source."""

    def __init__(self, url: str, read: Mapping[str, Any] | None = None) -> None:
        """`read` says by table how its files are read; see `ReadOptions`."""
        self._files = Files(url)
        self._url = self._files.uri(self._files.root)
        self._display = self._files.display(self._files.root)
        self._readers = Readers(self._files, read or {})
        self.workspace = self._files.workspace(MEMORY)
        self._sources: dict[str, Source] = {}

    # ------------------------------------------------------------------ `Tables`

    def outputs(self, name: str) -> pa.Table:
        found = find_table(self._at(name))
        if found is None:
            hint = near(name, list(self._files.tables()))
            raise InvalidCall(f"there are no outputs {name!r} in {self._display!r}{hint}")
        with storage_errors(f"cannot read {self.where(name)}"):
            return dataset(found).to_table()

    def read(self, select: str, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
        source = self._readers.source(select)
        try:
            yield from read(source, select, columns, PAGE)
        finally:
            source.close()

    def stored(self, name: str, columns: str, where: str) -> list[Row]:
        url = self._at(name)
        if (found := find_table(url)) is None:
            return []
        with self._selecting.cursor(f"cannot read {self.where(name)}") as cursor:
            self._attach(cursor, url, found)
            select = f"SELECT {columns} FROM {OUTPUTS} WHERE {where}"  # noqa: S608 - ours
            rows = cursor.sql(select).to_arrow_table()
        values = zip(*map(python, rows.columns), strict=True)
        return [dict(zip(rows.column_names, row, strict=True)) for row in values]

    def has(self, name: str) -> bool:
        return self._files.has(name)

    def put(self, name: str, rows: pa.Table, key: Sequence[str]) -> None:
        url = self._at(name)
        new = checked(name, rows, key)
        delta = make_table(url, new.schema, len(key), way_out=WAY_OUT)
        schema = pa.schema([new.schema.field(column) for column in _names(delta)])
        cursor = self.workspace.connection().cursor()
        properties = writer_properties(None, schema, len(key))
        writer = DeltaWriter(url, schema, key, properties, delta, cursor, redo_complete=False)
        try:
            writer.replace(new.select(schema.names), new.select(list(key)).slice(0, 0))
        finally:
            writer.close()

    def read_from(self, name: str) -> str:
        return self.where(name)

    def where(self, name: str) -> str:
        return f"{self._display}/{name}"

    def close(self) -> None:
        for source in self._sources.values():
            source.close()
        if "_selecting" in self.__dict__:
            self._selecting.close()
        self.workspace.close()

    # ------------------------------------------------------------------ `Outputs` of any source

    def source(self, select: str) -> Source:
        """The source that `select` names, found only once: `rows` reads the files that `check` has seen."""
        if (source := self._sources.get(select)) is None:
            source = self._sources[select] = self._readers.source(select)
        return source

    def key_types(self, name: str, key: Sequence[str]) -> dict[str, pa.DataType] | None:
        found = find_table(self._at(name))
        if found is None:
            return None
        refuse_unwritable(found, "give another predict_id")
        there = {field.name: field.type for field in arrow_schema(found)}
        if missing := [column for column in OWN_COLUMNS if column not in there]:
            raise InvalidCall(
                f"{self.where(name)!r} is not an outputs table: it has no column {missing[0]!r}; give "
                "another predict_id"
            )
        return {column: there[column] for column in key if column in there}

    def done(self, cursor: duckdb.DuckDBPyConnection, name: str, key: pa.Schema) -> str:
        url = self._at(name)
        found = find_table(url)
        if found is None:
            raise TablesUnavailable(
                f"the outputs {self.where(name)!r} existed at the start and are missing now"
            )
        self._attach(cursor, url, found)
        keys = ", ".join(f"{quoted(column)} AS k{i}" for i, column in enumerate(key.names))
        once = f" WHERE coalesce({POSITION}, 0) = 0" if POSITION in _names(found) else ""
        columns = f"{keys}, _fingerprint, _error, _input_hash, _created_at"
        return f"SELECT {columns} FROM {OUTPUTS}{once}"  # noqa: S608 - the names are quoted

    def writer_of(
        self, types: pa.Schema, key: Sequence[str], table: OutputTable, shard: Shard | None
    ) -> Writer:
        """See `Home.writer_of`."""
        url, schema = self._at(table.name), self._schema_of(types, key, table)
        if schema is None:
            # A table created without knowing the types of its keys would keep wrong ones for ever.
            return NoRows(self._display)
        properties = writer_properties(table.compression, schema, len(key))
        delta = make_table(url, schema, len(key), table.partition_by)
        cursor = self.workspace.connection().cursor()
        return DeltaWriter(url, schema, key, properties, delta, cursor, shard)

    def check_outputs_of(self, types: pa.Schema, key: Sequence[str], table: OutputTable) -> None:
        """See `Home.check_outputs_of`."""
        url, schema = self._at(table.name), self._schema_of(types, key, table)
        if schema is not None:
            writer_properties(table.compression, schema, len(key))
            fitting_table(url, schema, len(key), table.partition_by, ANOTHER)
        refuse_unwritable_folder(url)

    def _schema_of(self, types: pa.Schema, key: Sequence[str], table: OutputTable) -> pa.Schema | None:
        """The columns of outputs with a key of these `types`; None if neither they nor outputs are there."""
        if not types.names:
            there = self.key_types(table.name, key)
            if there is None:
                return None
            types = pa.schema(list(there.items()))
        return table_schema({field.name: field.type for field in types}, table)

    # ------------------------------------------------------------------

    @cached_property
    def _selecting(self) -> Workspace:
        """The workspace of `stored`, which has more memory than the one of joins."""
        self.workspace.connection()  # so that a late thread opens none
        return self._files.workspace(site_settings().select_memory)

    def _joined(self, selection: Selection) -> Join:
        self.workspace.connection()  # before the files are read, so that a late thread reads nothing
        return Join(self.source(selection.select), self, selection, self.workspace)

    def _at(self, name: str) -> str:
        """The URL of the outputs `name`; raises `InvalidCall` for a name that leaves the lake."""
        if name in ("", ".", "..") or set(name) & set("/\\"):
            raise InvalidCall(
                f"{name!r} cannot name a table; give another predict_id or name, without / and \\"
            )
        url = f"{self._url}/{name}"
        if self._files.local and os.path.islink(url):
            check_place("the outputs behind the link", os.path.realpath(url))
        return url

    def _attach(self, cursor: duckdb.DuckDBPyConnection, url: str, outputs: DeltaTable) -> None:
        """Register outputs with `cursor` as the view `OUTPUTS`."""
        # The URIs are percent-encoded, so only the file names, which contain a UUID, are taken from them.
        files = [f"{url}/{uri.rsplit('/', 1)[-1]}" for uri in outputs.file_uris()]
        linked = os.path.islink(url)  # to a folder where DuckDB must not open files
        plain = files and not (outputs.metadata().partition_columns or beyond_plain(outputs))
        if self._files.local and not linked and plain:
            # DuckDB's own reader takes 230 MB less than pyarrow for 9 M rows. Files written before a column
            # was added lack it: hence union_by_name.
            listed = ", ".join(literal(exactly(file)) for file in files)
            read = f"read_parquet([{listed}], union_by_name = true, hive_partitioning = false)"
            cursor.execute(f"CREATE OR REPLACE TEMP VIEW {OUTPUTS} AS FROM {read}")
        else:
            cursor.register(OUTPUTS, queryable(outputs))


def _names(table: DeltaTable) -> list[str]:
    return [field.name for field in table.schema().fields]
