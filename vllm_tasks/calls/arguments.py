"""The arguments of a call as they were given: what is misspelt, and what is of the wrong kind."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable
from typing import Any

from vllm_tasks.calls.sampling import GONE, OWNED, Target, known_names
from vllm_tasks.errors import InvalidCall

SHOWN = 100
"""Characters of a value in an error."""
DATABASES = {".db", ".sqlite", ".sqlite3", ".duckdb"}
"""How files of databases end."""


def check_spelling(
    given: Iterable[str], call: Callable[..., Any], target: Target, more: Iterable[str] = ()
) -> None:
    """Raise `InvalidCall` for a name that is neither an argument of `call` nor a sampling parameter, but near
    to an argument. What is near to a sampling parameter is `check_names`' matter.

    `more`: arguments that the call has elsewhere.
    """
    own = {name for name, p in inspect.signature(call).parameters.items() if p.kind != p.VAR_KEYWORD}
    own |= set(more)
    known = known_names(target)
    for name in given:
        if name in own | known or name in OWNED or name in GONE:
            continue
        near = difflib.get_close_matches(name, own | known, n=1)
        if near and near[0] in own:
            called = call.__name__.lstrip("_")
            raise InvalidCall(f"{called} has no argument {name!r}; did you mean {near[0]!r}?")


def table_or_statement(select: Any) -> str:
    """`select` as text; raises `InvalidCall` for what names no table."""
    if isinstance(select, os.PathLike):
        select = os.fspath(select)
    if not isinstance(select, str):
        raise InvalidCall(
            f"select={_shown(select)} is no text: give the name of a table in db, in a lake also a path or a "
            "glob, or one SELECT statement; or a table in memory that has __arrow_c_stream__: a DataFrame of "
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


def _shown(value: Any) -> str:
    return "None" if value is None else f"<{type(value).__name__}>"
