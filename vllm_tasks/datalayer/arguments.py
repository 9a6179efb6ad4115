"""Checks of arguments as the caller gave them: they must name a table, a folder, columns."""

from __future__ import annotations

import os
from collections.abc import Iterable, Set
from typing import Any

from vllm_tasks.errors import InvalidCall

DATABASES = {".db", ".sqlite", ".sqlite3", ".duckdb"}
"""Endings of database files."""


def table_or_statement(select: Any) -> str:
    """`select` as text; raises `InvalidCall` if it cannot name a table."""
    if isinstance(select, os.PathLike):
        select = os.fspath(select)
    if not isinstance(select, str):
        raise InvalidCall(
            f"select={_display(select)} is not a text: give the name of a table in db, in a lake also a path "
            "or a glob, or one SELECT statement; or a table in memory with __arrow_c_stream__: a DataFrame "
            "of pandas or polars (.collect() a LazyFrame), pyarrow.Table.from_pylist(rows) for a list of "
            "rows, pyarrow.table(columns) for a dict of columns"
        )
    return select


def check_folder(db: str, argument: str = "db") -> None:
    """Raise `InvalidCall` for a file instead of a folder: a lake is a folder, and its files are tables."""
    if "://" in db:
        return
    path = os.path.expanduser(db)
    folder, file = os.path.split(path)
    ending = os.path.splitext(file)[1].lower()
    if ending in DATABASES and not os.path.isdir(path):
        kind, scheme = ("DuckDB", "duckdb") if ending == ".duckdb" else ("SQLite", "sqlite")
        raise InvalidCall(
            f"{argument}={db!r:.200} is a file, not a folder: a {kind} database is '{scheme}:///{db:.200}'"
        )
    if os.path.isfile(path):
        raise InvalidCall(
            f"{argument}={db!r:.200} is a file, not a folder: give its folder, "
            f"{argument}={folder or '.'!r:.200}, and the file as the table, select={file!r:.200}"
        )


def named_columns(name: str, given: Any) -> tuple[str, ...]:
    """Return the columns that an argument names. Raise `InvalidCall` for none, a set, and one named twice."""
    columns = (given,) if not isinstance(given, Iterable) or isinstance(given, str) else tuple(given)
    if not columns or not all(isinstance(c, str) and c for c in columns):
        raise InvalidCall(f"{name}={given!r} must name one or more columns")
    if isinstance(given, Set) and len(columns) > 1:
        raise InvalidCall(f"{name}={given!r} is a set, which has no order: give a list")
    if len(set(columns)) < len(columns):
        raise InvalidCall(f"{name}={columns!r} names a column twice")
    return columns


def _display(value: Any) -> str:
    return "None" if value is None else f"<{type(value).__name__}>"
