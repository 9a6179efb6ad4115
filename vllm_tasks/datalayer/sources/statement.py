"""A SELECT over the tables of a lake, run by DuckDB and read as an Arrow stream."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from vllm_tasks.datalayer.lake.delta import quoted
from vllm_tasks.datalayer.sources import Part, Unreadable
from vllm_tasks.datalayer.sources.arrow import KEYS_AT_ONCE, ROWS_AT_ONCE, gathered, part_of
from vllm_tasks.datalayer.sources.keys import fitting, key_type
from vllm_tasks.datalayer.sources.stream import Streamed
from vllm_tasks.datalayer.workspace import Workspace
from vllm_tasks.errors import SHOWN, InvalidCall

SQL = re.compile(
    r"(\s|\(|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)*+(select|with|from|values|table)\b", re.IGNORECASE
)
"""The beginning of a statement, after comments; possessive, so that matching never backtracks."""
VIEW = "_vllm_tasks_source"
GUESSING = {
    **dict.fromkeys(("read_csv", "read_csv_auto"), ("columns", "all_varchar")),
    **dict.fromkeys(("read_json", "read_json_auto", "read_ndjson", "read_ndjson_auto"), ("columns",)),
}
"""DuckDB's functions that guess types, by which 1.50 becomes 1.5, and the options that give the types."""
BATCH_ROWS = 2048
"""Maximum rows of a batch, DuckDB's own size."""

Attach = Callable[[duckdb.DuckDBPyConnection, str], None]
"""Registers one table with a connection under a name."""


class Statement:
    """`Source` of one SELECT. Each use runs it again, so its rows may come in another order."""

    def __init__(
        self,
        sql: str,
        tables: Mapping[str, Attach],
        workspace: Workspace,
        display: str,
        texts: Sequence[Streamed] = (),
    ) -> None:
        """`tables` has by name those of the lake that the statement reads; `workspace` is closed with it.

        `texts` are those among them that skip lines which they cannot read.
        """
        self._sql = sql
        self._tables = tables
        self._workspace = workspace
        self._display = display
        self._texts = texts
        self._kinds: dict[str, str] = {}
        """DuckDB's type names of all columns, once a pass has begun."""
        self._described: tuple[list[str], pa.Schema] | None = None

    def columns(self) -> Sequence[str]:
        return self._description()[0]

    def key_types(self, key: Sequence[str]) -> Sequence[pa.DataType]:
        names, schema = self._description()
        _refuse_doubles(key, names)
        if mixed := [name for name in key if self._kinds[name] == MIXED_KIND]:
            raise InvalidCall(
                f"the key {mixed[0]!r:.100} has texts and other values; convert all to text with "
                f"CAST({quoted(mixed[0])} AS VARCHAR) AS {quoted(mixed[0])}"
            )
        return [key_type(name, schema.field(name).type) for name in key]

    def identified_by(self, key: Sequence[str]) -> bool:
        return False

    def keys(self, key: pa.Schema) -> Iterator[pa.Table]:
        for found in self._batches(key.names, KEYS_AT_ONCE):
            yield fitting(found, key)

    def parts(self, key: pa.Schema, columns: Sequence[str], unreadable: Unreadable) -> Iterator[Part]:
        names = list(dict.fromkeys((*key.names, *columns)))
        for found in self._batches(names, ROWS_AT_ONCE):
            yield part_of(found, key, columns, unreadable, self._display)
        for text in self._texts:
            unreadable.take(text.left_out)

    def close(self) -> None:
        self._workspace.close()

    def _description(self) -> tuple[list[str], pa.Schema]:
        """The names of all columns, and the Arrow types of those whose name is unique in SQL."""
        if self._described is None:
            with self._cursor() as cursor:
                names = cursor.sql(self._sql).columns
                wanted = self._readable(cursor, [n for n in names if not _doubles(n, names)])
                rows = cursor.sql(f"SELECT {wanted} FROM {VIEW} LIMIT 0")  # noqa: S608 - quoted
                self._described = list(names), rows.to_arrow_table().schema
        return self._described

    def _batches(self, names: Sequence[str], rows: int) -> Iterator[pa.Table]:
        """The statement's rows in tables of about `rows` rows or `PART_BYTES`."""
        _refuse_doubles(names, self.columns())
        with self._cursor() as cursor:
            query = f"SELECT {self._readable(cursor, names)} FROM {VIEW}"  # noqa: S608 - quoted
            with cursor.sql(query).to_arrow_reader(BATCH_ROWS) as reader:
                yield from gathered(reader, rows)

    def _readable(self, cursor: duckdb.DuckDBPyConnection, names: Sequence[str]) -> str:
        """These columns in SQL; types that Arrow lacks are cast to text, mixed ones and variants to JSON."""
        if not self._kinds:
            self._kinds = {row[0]: row[1] for row in cursor.execute(f"DESCRIBE FROM {VIEW}").fetchall()}
        wanted = (f"{_in_arrow(quoted(n), self._kinds[n])} AS {quoted(n)}" for n in names)
        return ", ".join(wanted) or "1 AS one"

    @contextmanager
    def _cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with self._workspace.cursor(f"cannot read {self._display!r}") as cursor:
            for name, attach in self._tables.items():
                attach(cursor, name)
            cursor.execute(f"CREATE TEMP VIEW {VIEW} AS {self._sql}")
            yield cursor


WITHOUT_ARROW = re.compile(r"(BIT|BIGNUM|VARINT|TIME WITH TIME ZONE|INTERVAL|GEOMETRY|UNION)\b")
"""The beginning of the names of types that Arrow lacks."""

MIXED_KIND = 'UNION("text" VARCHAR, other JSON)'
"""DuckDB's name for `json_fields.MIXED`."""


def _refuse_doubles(wanted: Sequence[str], names: Sequence[str]) -> None:
    for name in wanted:
        if others := _doubles(name, names):
            raise InvalidCall(
                f"the SELECT has the columns {name!r:.100} and {others[0]!r:.100}, which are one in "
                "SQL; rename one with AS"
            )


def _doubles(name: str, names: Sequence[str]) -> list[str]:
    """Other names that are the same as `name` in SQL."""
    return [other for other in names if other != name and other.casefold() == name.casefold()]


def _in_arrow(column: str, kind: str) -> str:
    if kind == MIXED_KIND:
        return f"if(union_tag({column}) = 'text', to_json({column}.text), {column}.other)"
    if kind == "VARIANT":  # Arrow would have its bytes
        return f"CAST({column} AS JSON)"
    return f"CAST({column} AS VARCHAR)" if WITHOUT_ARROW.match(kind) else column


@dataclass(frozen=True)
class Parsed:
    """One SELECT statement."""

    sql: str
    tables: set[str]
    """Tables that it names."""
    own: set[str]
    """Tables that it defines by WITH, casefolded."""
    columns: set[str] | None
    """All columns that it may read from any table; None if it does not name them (a star, a complete row)."""


def parse(con: duckdb.DuckDBPyConnection, select: str) -> Parsed:
    """The one SELECT statement in `select`; raises `InvalidCall`."""
    try:
        statements = con.extract_statements(select)
    except duckdb.Error as e:
        raise InvalidCall(f"{select!r:.500} is not a table, path or SELECT statement: {e}") from e
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        kinds = ", ".join(s.type.name for s in statements[:SHOWN])
        raise InvalidCall(f"{select!r:.500} must be one SELECT statement, not {kinds or 'nothing'}")
    found = con.execute("SELECT json_serialize_sql(?::VARCHAR)", [select]).fetchall()[0][0]
    tree = json.loads(found)
    if tree["error"]:
        raise InvalidCall(f"{select!r:.500} must be one SELECT statement: {tree['error_message']}")
    nodes = list(_nodes(tree))
    _refuse_guesses(nodes)
    named = {
        node["table_name"]
        for node in nodes
        if node.get("type") == "BASE_TABLE" and not node["schema_name"] and not node["catalog_name"]
    }
    own = {entry["key"].casefold() for node in nodes for entry in node.get("cte_map", {"map": []})["map"]}
    return Parsed(statements[0].query, named, own, _columns(nodes))


def _refuse_guesses(nodes: Sequence[dict[str, Any]]) -> None:
    for node in nodes:
        if node.get("type") != "TABLE_FUNCTION":
            continue
        called = node["function"]
        name, options = called["function_name"].casefold(), _options(called)
        if name in GUESSING and options.isdisjoint(GUESSING[name]):
            raise InvalidCall(
                f"{name} guesses the types of values, and may change them (1.50 becomes 1.5): name the file "
                f"itself, as in FROM 'file.csv', or set {' or '.join(GUESSING[name])}"
            )


def _options(called: Mapping[str, Any]) -> set[str]:
    """The names of a function's options, `name := value` or `name = value`."""
    names: set[str] = set()
    for given in called["arguments"]:
        names |= {given["name"], *given["expression"].get("left", {}).get("column_names", ())}
    return {name.casefold() for name in names}


def _columns(nodes: Sequence[dict[str, Any]]) -> set[str] | None:
    """See `Parsed.columns`."""
    kinds = {node.get("type") for node in nodes} | {node.get("ref_type") for node in nodes}
    if kinds & {"STAR", "PIVOT", "SHOW_REF", "NATURAL"}:
        return None
    # A node with a class is an expression; otherwise an alias is a table's, and its name alone is a row.
    tables = [node for node in nodes if "class" not in node]
    rows = {node.get(name, "").casefold() for node in tables for name in ("alias", "table_name")}
    names = [node["column_names"] for node in nodes if node.get("class") == "COLUMN_REF"]
    if any(parts[0].casefold() in rows for parts in names if len(parts) == 1):
        return None
    joined = [node.get("using_columns") or () for node in nodes]
    bare = [parts[1:] if parts[0].casefold() in rows else parts for parts in names]
    return {name for parts in (*bare, *joined) for name in parts}


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(child)
