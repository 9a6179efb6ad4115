"""Finds the reader of a `select` in a lake: one for the table's format, or a SELECT over several tables."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Any

import duckdb

from vllm_tasks.datalayer.lake.delta import open_table, quoted
from vllm_tasks.datalayer.sources import Source
from vllm_tasks.datalayer.sources.arrow_file import ArrowFile
from vllm_tasks.datalayer.sources.arrow_stream import ColumnStream
from vllm_tasks.datalayer.sources.csv import Csv
from vllm_tasks.datalayer.sources.delta import DeltaSource, queryable
from vllm_tasks.datalayer.sources.exact_sql import kinds_of, mixes_numbers, plain_times, refused_in_sql
from vllm_tasks.datalayer.sources.files import Files, Table, exactly
from vllm_tasks.datalayer.sources.hive import Partition, partitions
from vllm_tasks.datalayer.sources.iceberg import Iceberg
from vllm_tasks.datalayer.sources.jsonl import JsonLines
from vllm_tasks.datalayer.sources.named import NoColumns, named_columns
from vllm_tasks.datalayer.sources.parquet import Parquet
from vllm_tasks.datalayer.sources.pieces import Pieces
from vllm_tasks.datalayer.sources.read_options import DEFAULTS, ReadOptions, read_options
from vllm_tasks.datalayer.sources.statement import SQL, Attach, Statement, parse
from vllm_tasks.datalayer.sources.stream import Stream, Streamed
from vllm_tasks.datalayer.storage_errors import storage_errors
from vllm_tasks.datalayer.workspace import literal
from vllm_tasks.settings import site_settings


class Readers:
    """Makes sources from a lake's tables; `options` say by table how files are read."""

    def __init__(self, files: Files, options: Mapping[str, Any]) -> None:
        self._files = files
        self._options = {name: read_options(name, given) for name, given in options.items()}

    def source(self, select: str) -> Source:
        """The source that `select` names; raises `InvalidCall`."""
        tables = self._files.tables()
        # A statement is not a glob, though it may look like one.
        words = re.search(r"\s", select.strip())
        statement = SQL.match(select) and words and select not in tables
        if not statement and (table := self._files.table(select, tables)) is not None:
            return self._of(table)
        if not SQL.match(select) and not words:
            raise self._files.unknown(select, tables)
        return self._statement(select, tables)

    def _statement(self, select: str, tables: dict[str, list[str]]) -> Statement:
        workspace = self._files.workspace(site_settings().select_memory)
        try:
            parsed = parse(workspace.connection(), select)
            attached: dict[str, Attach] = {}
            texts: list[Streamed] = []
            linked: list[str] = []
            for name in parsed.tables:
                if (table := self._files.table(name, tables)) is not None:
                    linked += self._files.linked(table)
                    attached[name] = self._attach(table, parsed.columns, texts)
                elif name.casefold() not in parsed.own:
                    raise self._files.unknown(name, tables)
        except BaseException:
            workspace.close()
            raise
        if linked:  # files that only a workspace of their own may open
            workspace.close()
            workspace = self._files.workspace(site_settings().select_memory, linked)
        display = select if len(select) <= 200 else f"{select[:200]}..."
        return Statement(parsed.sql, attached, workspace, display, texts)

    def _of(self, table: Table) -> Pieces | Csv | JsonLines | DeltaSource:
        """The reader of one table."""
        if table.delta is not None:
            return DeltaSource(open_table(table.delta), self._files.display(table.delta))
        if table.iceberg is not None:
            return Iceberg(self._files.fs, table.iceberg, self._files.display(table.iceberg))
        options = self._options_of(table)
        match table.files[0].kind:
            case "parquet":
                return Parquet(table.files, self._partitions(table))
            case "arrow":
                return ArrowFile(table.files)
            case "jsonl" | "json":
                return JsonLines(table.files, options)
            case _:
                return Csv(table.files, options)

    def _options_of(self, table: Table) -> ReadOptions:
        """The options for the given name, for the file's stem, or for the folder of the files."""
        first = table.files[0]
        folder = first.path.removeprefix(self._files.root + "/").split("/")[0]
        for name in (table.name, first.stem, folder):
            if name in self._options:
                return self._options[name]
        return DEFAULTS

    def _attach(self, table: Table, named: set[str] | None, texts: list[Streamed]) -> Attach:
        """The function that registers a table for a SELECT. DuckDB itself reads Parquet and plain Delta
        tables, only as much as the SELECT needs; all others are streams of the columns that it has `named`
        (see `Parsed.columns`). `texts` receives the tables that are text."""
        if table.delta is not None:
            with storage_errors(f"cannot read {table.name!r}"):
                rows = queryable(open_table(table.delta))
            return _attached(rows, {})
        source = self._of(table)
        assert not isinstance(source, DeltaSource), "Delta tables were handled above"
        columns = named_columns(source, named, table.name)
        if not columns:
            empty = NoColumns(source, named, table.name)
            texts.append(empty)
            return _attached(Stream(empty, empty.columns), {})
        if isinstance(source, Csv | JsonLines):
            texts.append(source)
            return _attached(Stream(source, columns), {})
        refused = refused_in_sql(source, columns)
        if isinstance(source, Parquet) and self._by_duckdb(table):
            kinds = kinds_of(source)
            if not mixes_numbers(kinds, columns):
                return _attached(self._read_parquet(table), plain_times(kinds, columns) | refused)
        return _attached(ColumnStream(source, columns, refused), refused)

    def _by_duckdb(self, table: Table) -> bool:
        """Whether DuckDB reads these Parquet files as we do."""
        # DuckDB needs the time at which a file was changed, which a web server may not report.
        web = "http" in self._files.fs.protocol
        # DuckDB also takes folders above the lake for partition columns.
        return not web and not (self._partitions(table)[0] and "=" in self._files.root)

    def _read_parquet(self, table: Table) -> str:
        uris = ", ".join(literal(exactly(self._files.uri(file.path))) for file in table.files)
        hive = str(bool(self._partitions(table)[0])).lower()
        options = f"hive_partitioning = {hive}, hive_types_autocast = false"
        return f"read_parquet([{uris}], union_by_name = true, {options})"

    def _partitions(self, table: Table) -> list[Partition]:
        root = self._files.root + "/"
        return partitions([posixpath.dirname(file.path.removeprefix(root)) for file in table.files])


def _attached(rows: Any, expressions: Mapping[str, str]) -> Attach:
    """`rows` is an object with an Arrow stream, or SQL; `expressions` replace the columns of those names."""
    replaced = ", ".join(f"{sql} AS {quoted(column)}" for column, sql in expressions.items())

    def attach(cursor: duckdb.DuckDBPyConnection, name: str) -> None:
        found = rows
        if not isinstance(rows, str):
            if not replaced:
                cursor.register(name, rows)
                return
            cursor.register(f"_vllm_tasks_{name}", rows)
            found = quoted(f"_vllm_tasks_{name}")
        columns = f"* REPLACE ({replaced})" if replaced else "*"
        cursor.execute(f"CREATE OR REPLACE TEMP VIEW {quoted(name)} AS SELECT {columns} FROM {found}")  # noqa: S608 - quoted

    return attach
