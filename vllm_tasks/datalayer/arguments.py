"""Where a call reads and writes, as it was given: what names no table and no folder is refused."""

from __future__ import annotations

import os
from typing import Any

from vllm_tasks.errors import InvalidCall

DATABASES = {".db", ".sqlite", ".sqlite3", ".duckdb"}
"""How files of databases end."""


def table_or_statement(select: Any) -> str:
    """`select` as text; raises `InvalidCall` for what names no table."""
    if isinstance(select, os.PathLike):
        select = os.fspath(select)
    if not isinstance(select, str):
        raise InvalidCall(
            f"select={_display(select)} is no text: give the name of a table in db, in a lake also a path or "
            "a glob, or one SELECT statement; or a table in memory that has __arrow_c_stream__: a DataFrame of "
            "pandas or polars (of a LazyFrame its .collect()), of a list of rows "
            "pyarrow.Table.from_pylist(rows), of a dict of columns pyarrow.table(columns)"
        )
    return select


def check_folder(db: str, argument: str = "db") -> None:
    """Raise `InvalidCall` for a file where a folder is meant: a lake is a folder, its files are tables."""
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


def _display(value: Any) -> str:
    return "None" if value is None else f"<{type(value).__name__}>"
