"""From a `select` in a lake to the source that reads it: by its format, or a SELECT over several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import duckdb

from vllm_tasks.datalayer.delta import open_table, quoted, storage_errors
from vllm_tasks.datalayer.sources import Source
from vllm_tasks.datalayer.sources.arrow_file import ArrowFile
from vllm_tasks.datalayer.sources.arrow_stream import ColumnStream
from vllm_tasks.datalayer.sources.csv import Csv
from vllm_tasks.datalayer.sources.delta import DeltaSource, queryable
from vllm_tasks.datalayer.sources.files import Files, Table, exactly
from vllm_tasks.datalayer.sources.iceberg import Iceberg
from vllm_tasks.datalayer.sources.jsonl import JsonLines
from vllm_tasks.datalayer.sources.named import NoColumns, named_columns
from vllm_tasks.datalayer.sources.parquet import Parquet
from vllm_tasks.datalayer.sources.pieces import Pieces
from vllm_tasks.datalayer.sources.read_options import DEFAULTS, ReadOptions, read_options
from vllm_tasks.datalayer.sources.statement import SQL, Attach, Statement, parse
from vllm_tasks.datalayer.sources.stream import Stream, Streamed
from vllm_tasks.datalayer.workspace import Workspace, literal
from vllm_tasks.errors import InvalidCall
from vllm_tasks.settings import site_settings


class Readers:
    """Makes sources of a lake's tables; `options` say by table how files are read."""

    def __init__(self, files: Files, options: Mapping[str, Any]) -> None:
        self._files = files
        self._options = {name: read_options(name, given) for name, given in options.items()}

    def source(self, select: str) -> Source:
        """What `select` names; raises `InvalidCall`."""
        tables = self._files.tables()
        # A statement is no glob, though it may look like one.
        words = re.search(r"\s", select.strip())
        statement = SQL.match(select) and words and select not in tables
        if not statement and (table := self._files.table(select, tables)) is not None:
            return self._of(table)
        if not SQL.match(select) and not words:
            raise self._files.unknown(select, tables)
        return self._statement(select, tables)

    def _statement(self, select: str, tables: dict[str, list[str]]) -> Statement:
        with duckdb.connect() as con:
            parsed = parse(con, select)
        attached: dict[str, Attach] = {}
        texts: list[Streamed] = []
        linked: list[str] = []
        for name in parsed.tables:
            if (table := self._files.table(name, tables)) is not None:
                linked += self._files.linked(table)
                attached[name] = self._attach(table, parsed.columns, texts)
            elif name.casefold() not in parsed.own:
                raise self._files.unknown(name, tables)
        root = self._files.uri(self._files.root)
        filesystem = None if self._files.local else self._files.fs
        memory = site_settings().select_memory
        workspace = Workspace(memory, [f"{root}/", f"{exactly(root)}/"], filesystem, files=linked)
        shown = select if len(select) <= 200 else f"{select[:200]}..."
        return Statement(parsed.sql, attached, workspace, shown, texts)

    def _of(self, table: Table) -> Pieces | Csv | JsonLines | DeltaSource:
        """The reader of one table."""
        if table.delta is not None:
            return DeltaSource(open_table(table.delta), self._files.shown(table.delta))
        if table.iceberg is not None:
            return Iceberg(self._files.fs, table.iceberg, self._files.shown(table.iceberg))
        options = self._options_of(table)
        match table.files[0].kind:
            case "parquet":
                return Parquet(table.files)
            case "arrow":
                return ArrowFile(table.files)
            case "jsonl" | "json":
                return JsonLines(table.files, options)
            case "excel":
                raise InvalidCall(
                    f"{table.files[0].shown!r} is a file of Excel's, which is not read here; pass it as a "
                    "table in memory, select=pandas.read_excel(...), or save it as CSV or Parquet"
                )
            case _:
                return Csv(table.files, options)

    def _options_of(self, table: Table) -> ReadOptions:
        """By the name as it was given, by the file's stem, or by the folder that the files are in."""
        first = table.files[0]
        folder = first.path.removeprefix(self._files.root + "/").split("/")[0]
        for name in (table.name, first.stem, folder):
            if name in self._options:
                return self._options[name]
        return DEFAULTS

    def _attach(self, table: Table, named: set[str] | None, texts: list[Streamed]) -> Attach:
        """How a SELECT's connection gets to know the table: Parquet and plain Delta tables by DuckDB, which
        reads of them what the SELECT needs, all others as a stream of the columns it has `named` (see
        `Parsed.columns`). `texts` gets those that are text."""
        # DuckDB asks a filesystem when a file was changed, which a web server may not tell.
        web = "http" in self._files.fs.protocol
        if table.files and table.files[0].kind == "parquet" and not web:
            uris = ", ".join(literal(exactly(self._files.uri(file.path))) for file in table.files)
            read = f"read_parquet([{uris}], union_by_name = true)"

            def view(cursor: duckdb.DuckDBPyConnection, name: str) -> None:
                cursor.execute(f"CREATE OR REPLACE TEMP VIEW {quoted(name)} AS FROM {read}")

            return view
        if table.delta is not None:
            with storage_errors(f"cannot read {table.name!r}"):
                rows = queryable(open_table(table.delta))
            return lambda cursor, name: _register(cursor, name, rows)
        source = self._of(table)
        assert not isinstance(source, DeltaSource), "DuckDB was given it above"
        columns = named_columns(source, named, table.name)
        stream: Any
        if not columns:
            empty = NoColumns(source, named, table.name)
            texts.append(empty)
            stream = Stream(empty, empty.columns)
            return lambda cursor, name: _register(cursor, name, stream)
        if isinstance(source, Csv | JsonLines):
            texts.append(source)
            stream = Stream(source, columns)
        else:
            stream = ColumnStream(source, columns)
        return lambda cursor, name: _register(cursor, name, stream)


def _register(cursor: duckdb.DuckDBPyConnection, name: str, rows: Any) -> None:
    cursor.register(name, rows)
