"""A table, view or SELECT of a DuckDB file as a source: `duckdb:///file.duckdb`."""

from __future__ import annotations

from pathlib import Path

import duckdb

from vllm_tasks.datalayer.lake.delta import quoted
from vllm_tasks.datalayer.sources.statement import SQL, Statement, parse
from vllm_tasks.datalayer.workspace import Workspace
from vllm_tasks.errors import SHOWN, InvalidCall, TablesUnavailable, near
from vllm_tasks.settings import site_settings

SCHEME = "duckdb:///"


class DuckDBSource(Statement):
    """`Source` of a DuckDB file, opened read-only; a SELECT cannot read any other file."""

    def __init__(self, url: str, select: str) -> None:
        name = url.removeprefix(SCHEME)
        if name == url or not name or "?" in name:
            raise InvalidCall(f"a DuckDB file is written {SCHEME}path/to/file.duckdb, without options")
        path = Path(name).expanduser().absolute()
        if not path.is_file():
            raise InvalidCall(f"there is no DuckDB file {str(path)!r}")
        workspace = _opened(path)
        try:
            sql = _statement(workspace.connection(), select.strip(), path)
        except BaseException:
            workspace.close()
            raise
        super().__init__(sql, {}, workspace, f"{select[:200]} in {path}")


def _opened(path: Path) -> Workspace:
    try:
        return Workspace(site_settings().select_memory, database=path)
    except duckdb.Error as e:
        if "lock" in str(e):  # while a process writes the file, no other can read it
            raise TablesUnavailable(f"{path}: {str(e)[:300]}") from e
        if "already attached" in str(e):
            raise TablesUnavailable(
                f"{path}: this process has a connection to the file; close it, or read a table in memory"
            ) from e
        raise InvalidCall(f"{str(path)!r} cannot be opened as a DuckDB file: {str(e)[:300]}") from e


def _statement(con: duckdb.DuckDBPyConnection, select: str, path: Path) -> str:
    """The SQL for the rows that `select` names."""
    found = con.execute(
        "SELECT table_schema, table_name FROM information_schema.tables "
        "WHERE table_catalog = current_database()"
    ).fetchall()
    there = {f"{schema}.{name}": (schema, name) for schema, name in found}
    named = sorted(full for full, (_, name) in there.items() if select in (full, name))
    if len(named) > 1:
        raise InvalidCall(
            f"select={select[:200]!r} may be any of {', '.join(named[:SHOWN])} in {str(path)!r}; name "
            "the table with its schema, or in a SELECT"
        )
    if named:
        return f"FROM {'.'.join(map(quoted, there[named[0]]))}"
    if not SQL.match(select):
        raise InvalidCall(
            f"select={select[:200]!r} is neither a table or view of {str(path)!r} nor a SELECT"
            f"{near(select, [*there, *(name for _, name in found)])}"
        )
    return parse(con, select).sql
