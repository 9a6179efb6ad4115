"""What a `select` names in a lake: files by name, path or glob, Delta tables, or one SELECT over them."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import duckdb
from fsspec.implementations.local import LocalFileSystem

from vllm_tasks.datalayer.delta import (
    find_table,
    open_table,
    plain,
    quoted,
    storage_errors,
)
from vllm_tasks.datalayer.sources.delta import queryable
from vllm_tasks.errors import SHOWN, InvalidCall, TablesUnavailable, near
from vllm_tasks.places import without_secrets

READERS = {
    "parquet": "read_parquet([{}])",
    # Dates in JSON are text: of a format that no text has, none is taken for a date by the look of it.
    "jsonl": "read_json([{}], format='nd', dateformat='%Y-%m-%d\x1f', timestampformat='%Y-%m-%d\x1f')",
    "json": "read_json([{}], dateformat='%Y-%m-%d\x1f', timestampformat='%Y-%m-%d\x1f')",
    "csv": "read_csv([{}])",
}
UUID = re.compile(r'"(?:[^"]|"")*"|\bUUID(?=[],)[]|$)')
"""In the name of a type: the quoted name of a field, or a UUID."""
VIEW = "_vllm_tasks_source"
FILE = re.compile(r"(?P<stem>.+)\.(?P<kind>parquet|jsonl|ndjson|json|csv)(?P<gz>\.gz)?", re.DOTALL)
SQL = re.compile(
    r"(\s|\(|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)*+(select|with|from|values|table)\b", re.IGNORECASE
)
"""How a statement begins, after comments, each of which matches in one way only: nothing is tried again."""


def literal(text: str) -> str:
    """`text` as an SQL string, for where SQL takes no parameter."""
    return "'" + text.replace("'", "''") + "'"


def reading(kind: str, uris: list[str]) -> str:
    """SQL that reads these files, whatever characters their names have."""
    return "FROM " + READERS[kind].format(", ".join(literal(exactly(uri)) for uri in uris))


def exactly(uri: str) -> str:
    """The glob that only `uri` matches."""
    return re.sub(r"([*?[])", r"[\1]", uri)


def kind_of(path: str) -> tuple[str, str] | None:
    """(stem, kind) of a data file's name, None for any other file."""
    match = FILE.fullmatch(posixpath.basename(path))
    if not match or (match["kind"] == "parquet" and match["gz"]):
        return None
    return match["stem"], {"ndjson": "jsonl"}.get(match["kind"], match["kind"])


@dataclass(frozen=True)
class Source:
    """What one `select` reads, made known to a cursor by `attach`."""

    sql: str
    views: Mapping[str, str] = field(default_factory=dict)
    datasets: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    """DuckDB's, by column, once `described`."""

    def described(self, cursor: duckdb.DuckDBPyConnection) -> Source:
        """This source with its types; what looks like a UUID in JSON is text, which it was."""
        views = {name: _with_text(cursor, sql) for name, sql in self.views.items()}
        source = Source(self.sql, views, self.datasets)
        source.attach(cursor)
        return replace(source, types=_types(cursor, f"FROM {VIEW}"))

    def attach(self, cursor: duckdb.DuckDBPyConnection) -> None:
        """Make the temporary view `VIEW` on `cursor`, which no other cursor sees."""
        for name, rows in self.datasets.items():
            cursor.register(name, rows)
        for name, sql in self.views.items():
            cursor.execute(f"CREATE TEMP VIEW {quoted(name)} AS {sql}")
        cursor.execute(f"CREATE TEMP VIEW {VIEW} AS {self.sql}")


def _types(cursor: duckdb.DuckDBPyConnection, sql: str) -> dict[str, str]:
    return {row[0]: row[1] for row in cursor.execute(f"DESCRIBE {sql}").fetchall()}


def _with_text(cursor: duckdb.DuckDBPyConnection, sql: str) -> str:
    if not sql.startswith("FROM read_json("):
        return sql
    types = _types(cursor, sql)
    wanted = {name: UUID.sub(lambda m: m[0] if m[0][0] == '"' else "VARCHAR", t) for name, t in types.items()}
    if wanted == types:
        return sql
    columns = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in wanted.items())
    return f"{sql.removesuffix(')')}, columns={{{columns}}})"


class Files:
    """The files of a lake: `root` on the filesystem `fs`."""

    def __init__(self, fs: Any, root: str) -> None:
        self.fs = fs
        self.root = root.rstrip("/")

    def uri(self, path: str) -> str:
        """`path` as DuckDB and delta-rs know it."""
        return path if self.local else str(self.fs.unstrip_protocol(path))

    def shown(self, path: str) -> str:
        """`path` as a person is told it."""
        return without_secrets(self.uri(path))

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def _ask(self, question: str, path: str, **given: Any) -> Any:
        try:
            return getattr(self.fs, question)(path, **given)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except PermissionError as e:
            raise InvalidCall(f"cannot list {self.shown(path)!r}: not allowed: {plain(e)}") from e
        except Exception as e:  # every filesystem has errors of its own, which have no base in common
            raise TablesUnavailable(f"cannot list {self.shown(path)!r}: {plain(e)}") from e

    def tables(self) -> dict[str, list[str]]:
        """Paths by table name; raises `InvalidCall` when the lake is not there."""
        found: dict[str, list[str]] = {}
        self.fs.invalidate_cache()
        try:
            entries = self._ask("ls", self.root or "/", detail=True)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise InvalidCall(f"there is no folder {self.shown(self.root)!r} to read from") from e
        for entry in entries:
            path = entry["name"].rstrip("/")
            name = posixpath.basename(path)
            if entry["type"] == "directory":
                if not name.startswith("."):
                    found.setdefault(name, []).append(path)
            elif match := kind_of(path):
                found.setdefault(match[0], []).append(path)
        return found

    def has(self, name: str) -> bool:
        """Whether there is a file, a folder of files or a Delta table `name`."""
        self.fs.invalidate_cache()
        if not self._ask("exists", self.root or "/"):
            return False
        for path in self.tables().get(name, ()):
            if not self._ask("isdir", path):
                return True
            if self._ask("exists", f"{path}/_delta_log"):
                return find_table(self.uri(path)) is not None  # it may be about to be made
            if self._data_files(path):
                return True
        return False

    def source(self, select: str) -> Source:
        """What `select` names; raises `InvalidCall`."""
        tables = self.tables()
        # A statement is no glob, though it may look like one.
        sql = SQL.match(select) and re.search(r"\s", select.strip()) and select not in tables
        if not sql and (one := self._one(select, tables)) is not None:
            return one("_vllm_tasks_table")
        has = ", ".join(map(repr, sorted(tables)[:20])) + (", ..." if len(tables) > 20 else "")
        if not SQL.match(select) and not re.search(r"\s", select.strip()):
            raise InvalidCall(
                f"{self.shown(self.root)!r} has no table, file or match for {select!r}"
                f"{near(select, list(tables))}; it has {has or 'no tables'}"
            )
        return self._select(select, tables, has)

    def _select(self, select: str, tables: dict[str, list[str]], has: str) -> Source:
        with duckdb.connect() as con:
            statement, names, own = parse(con, select)
        views: dict[str, str] = {}
        datasets: dict[str, Any] = {}
        for name in names:
            if (one := self._one(name, tables)) is not None:
                source = one(name)
                datasets |= source.datasets
                views |= source.views
            elif name.casefold() not in own:
                raise InvalidCall(
                    f"{self.shown(self.root)!r} has no table {name!r}{near(name, list(tables))}; it has {has}"
                )
        return Source(statement, views, datasets)

    def _one(self, name: str, tables: dict[str, list[str]]) -> Callable[[str], Source] | None:
        """How to read the table, path or glob `name`, as a function of a view's name; None if not here."""
        paths = tables.get(name)
        if paths is None:
            paths = self._paths(name)
        elif len(paths) > 1:
            those = ", ".join(sorted(posixpath.basename(p) for p in paths))
            raise InvalidCall(f"{name!r} may be any of {those}; give the file's whole name")
        if not paths:
            return None
        if len(paths) == 1 and self._ask("isdir", paths[0]):
            if self._ask("exists", f"{paths[0]}/_delta_log"):
                with storage_errors(f"cannot read {self.shown(paths[0])}"):
                    rows = queryable(open_table(self.uri(paths[0])))
                return lambda view: Source(f"FROM {quoted(view)}", {}, {view: rows})
            paths = self._inside(paths[0])
        if not paths:
            return None
        kinds = sorted({kind[1] for path in paths if (kind := kind_of(path))})
        if len(kinds) != 1:
            raise InvalidCall(
                f"{name!r} has files of several kinds ({', '.join(kinds)}); name those of one kind"
            )
        sql = reading(kinds[0], [self.uri(path) for path in sorted(paths)])
        return lambda view: Source(f"FROM {quoted(view)}", {view: sql})

    def _paths(self, name: str) -> list[str]:
        path = name.strip()
        for prefix in (self.root + "/", self.uri(self.root) + "/"):
            path = path.removeprefix(prefix)
        outside = path.startswith("/") or "://" in path or ".." in path.split("/")
        if outside and not re.search(r"\s", path):
            raise InvalidCall(
                f"{name!r} is not in the lake {self.shown(self.root)!r}; give a path relative to it"
            )
        if outside or not path:
            return []
        whole = f"{self.root}/{path.rstrip('/')}"
        if self._ask("exists", whole):
            if not self._ask("isdir", whole) and kind_of(whole) is None:
                raise InvalidCall(f"{name!r} is none of {', '.join(READERS)} by its name")
            return [whole]
        if not set("*?[") & set(path):
            return []
        found = [p for p in self._ask("glob", whole) if kind_of(p) and not self._hidden(p, path)]
        return self._refuse_delta(found)

    def _inside(self, folder: str) -> list[str]:
        found = self._data_files(folder)
        if not found:
            raise InvalidCall(f"the folder {self.shown(folder)!r} holds no {', '.join(READERS)} files")
        return self._refuse_delta(found)

    def _data_files(self, folder: str) -> list[str]:
        return [p for p in self._ask("find", folder) if kind_of(p) and not self._hidden(p, folder)]

    def _hidden(self, path: str, pattern: str) -> bool:
        """Whether a part of `path` that `pattern` does not name begins with . or _: a log, or under way."""
        named = set(pattern.split("/"))
        parts = path.removeprefix(self.root + "/").split("/")
        return any(part[0] in "._" and part not in named for part in parts if part)

    def _refuse_delta(self, paths: list[str]) -> list[str]:
        """Files of a Delta table are not its rows: some are of the past."""
        folders: set[str] = set()
        for path in paths:
            while (path := posixpath.dirname(path)) not in folders and len(path) >= len(self.root):
                folders.add(path)
        for folder in sorted(folders):
            if self._ask("exists", f"{folder}/_delta_log"):
                raise InvalidCall(f"{self.shown(folder)!r} is a Delta table: name it, not the files in it")
        return paths


def parse(con: duckdb.DuckDBPyConnection, select: str) -> tuple[str, set[str], set[str]]:
    """The one SELECT statement in `select`, the tables it names, and (casefolded) those it makes by WITH."""
    try:
        statements = con.extract_statements(select)
    except duckdb.Error as e:
        raise InvalidCall(f"{select!r:.500} is no table, path or SELECT statement: {e}") from e
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        kinds = ", ".join(s.type.name for s in statements[:SHOWN])
        raise InvalidCall(f"{select!r:.500} must be one SELECT statement, not {kinds or 'nothing'}")
    found = con.execute("SELECT json_serialize_sql(?::VARCHAR)", [select]).fetchall()[0][0]
    tree = json.loads(found)
    if tree["error"]:
        raise InvalidCall(f"{select!r:.500} must be one SELECT statement: {tree['error_message']}")
    nodes = list(_nodes(tree))
    named = {
        node["table_name"]
        for node in nodes
        if node.get("type") == "BASE_TABLE" and not node["schema_name"] and not node["catalog_name"]
    }
    own = {entry["key"].casefold() for node in nodes for entry in node.get("cte_map", {"map": []})["map"]}
    return statements[0].query, named, own


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _nodes(child)
