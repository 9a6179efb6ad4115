"""DuckDB as a workspace: queries in bounded memory, with a spill folder that is removed with the process."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb

from vllm_tasks.datalayer.lake.delta import quoted
from vllm_tasks.datalayer.storage_errors import storage_errors
from vllm_tasks.errors import InvalidCall, TablesUnavailable

MEMORY = "300MB"
"""DuckDB's memory for keys and the state of their outputs; beyond it, DuckDB spills."""
THREADS = 2
"""More threads would need more memory and save no time: the model takes the time."""
CLOSE_TIMEOUT = 1.0
"""Seconds that other threads have to leave the queries that closing interrupts."""
OWN = {"memory", "system", "temp"}
"""Names of DuckDB's own databases."""
PREFIX = "vllm-tasks-spill-"
LOCK = "lock"


def literal(text: str) -> str:
    """`text` as an SQL string, for places where SQL takes no parameter."""
    return "'" + text.replace("'", "''") + "'"


class Workspace:
    """A separate DuckDB connection that may open only files below the `allowed` URLs."""

    def __init__(
        self,
        memory: str,
        allowed: Sequence[str] = (),
        filesystem: Any = None,
        database: Path | None = None,
        files: Sequence[str] = (),
    ) -> None:
        """`memory` is DuckDB's `memory_limit`, beyond which queries spill. `filesystem` is fsspec's, if files
        are not local. `database` is a DuckDB file to read from. `files` are further files that may be opened:
        the targets of links."""
        self._open_cursors: set[duckdb.DuckDBPyConnection] = set()
        # DuckDB resolves links before it compares a path with those that are allowed, but not a glob.
        opened = {path for file in files for path in (file, os.path.realpath(file))}
        with ExitStack() as made:
            self._folder = SpillFolder()
            made.callback(self._folder.remove)
            con = _connected(memory, self._folder.path)
            made.callback(con.close)
            # It fails for a file that is not DuckDB's, or if another process has it open for writing.
            self._catalog = "" if database is None else _attached(con, database)
            if filesystem is not None:
                con.register_filesystem(filesystem)
            # The last two are the guard: a statement can neither open other files nor change the settings.
            for setting in (
                "TimeZone = 'UTC'",
                "arrow_lossless_conversion = true",
                f"allowed_directories = [{', '.join(map(literal, allowed))}]",
                f"allowed_paths = [{', '.join(map(literal, sorted(opened)))}]",
                "enable_external_access = false",
                "lock_configuration = true",
            ):
                con.execute(f"SET {setting}")
            made.pop_all()
        self._con: duckdb.DuckDBPyConnection | None = con

    @contextmanager
    def cursor(self, doing: str) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection for one query at a time; errors begin with `doing`."""
        with storage_errors(doing):
            cursor = self.connection().cursor()
            if self._catalog:  # each connection begins with the database in memory
                cursor.execute(f"USE {self._catalog}")
            self._open_cursors.add(cursor)
            try:
                yield cursor
            finally:
                self._open_cursors.discard(cursor)
                cursor.close()

    def connection(self) -> duckdb.DuckDBPyConnection:
        """The connection; raises `TablesUnavailable` after `close`, for a late thread."""
        if (con := self._con) is None:
            raise TablesUnavailable("the lake or database was closed")
        return con

    def close(self) -> None:
        """Interrupt the queries of other threads, and remove the spill folder."""
        con, self._con = self._con, None
        if con is None:
            return
        # This object may live on (Prefect keeps the arguments of its task runs), but DuckDB's connection must
        # not: DuckDB complains about it at the end of the process.
        until = time.monotonic() + CLOSE_TIMEOUT
        while self._open_cursors and time.monotonic() < until:
            for cursor in list(self._open_cursors):
                with suppress(duckdb.Error):  # it has ended meanwhile
                    cursor.interrupt()
            time.sleep(0.01)
        con.close()
        self._folder.remove()


def _connected(memory: str, spill: Path) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(
        ":memory:",
        config={
            "memory_limit": memory,
            "threads": THREADS,
            "temp_directory": str(spill),
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        },
    )


def _attached(con: duckdb.DuckDBPyConnection, database: Path) -> str:
    """The quoted name of a DuckDB file that is opened for reading, and is the default of `con` from now on.

    It is attached, not connected to: all connections of a process to one file need the same settings, and
    those of two workspaces differ in their spill folders.
    """
    name = database.stem
    catalog = quoted(f"{name}_" if name.casefold() in OWN else name)
    con.execute(f"ATTACH {literal(str(database))} AS {catalog} (READ_ONLY)")
    con.execute(f"USE {catalog}")
    return catalog


class SpillFolder:
    """A temporary folder for one process; that of a killed process is removed when the next one is made.

    A process holds a lock on a file in its folder. The kernel releases the lock when the process ends in any
    way, also by `kill -9`, so a folder without a held lock is abandoned.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            made = self.path / f"{LOCK}.new"
            self._lock = os.open(made, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            made.rename(self.path / LOCK)  # other processes see the file only once it is locked
        except OSError as e:
            raise InvalidCall(
                f"cannot create a temporary folder in {tempfile.gettempdir()!r} ({e.strerror}); name another "
                "place in the environment variable TMPDIR"
            ) from e

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's folder, or one that is being created or removed
            lock = os.open(folder / LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
