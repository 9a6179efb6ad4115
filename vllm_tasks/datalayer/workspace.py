"""DuckDB as a workbench: queries in bounded memory, with a folder to spill to that goes with the process."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb

from vllm_tasks.datalayer.lake.delta import storage_errors
from vllm_tasks.errors import InvalidCall, TablesUnavailable

MEMORY = "300MB"
"""DuckDB's for keys and the state of their outputs; what it needs beyond is spilled."""
THREADS = 2
"""More would hold more at once, and not be noticed: what takes time is the model."""
CLOSING_S = 1.0
"""How long other threads have to leave the queries that closing interrupts."""
PREFIX = "vllm-tasks-spill-"
LOCK = "lock"


def literal(text: str) -> str:
    """`text` as an SQL string, for where SQL takes no parameter."""
    return "'" + text.replace("'", "''") + "'"


class Workspace:
    """A DuckDB connection of its own that may open files below the `allowed` URLs only."""

    def __init__(
        self,
        memory: str,
        allowed: Sequence[str] = (),
        filesystem: Any = None,
        database: Path | None = None,
        files: Sequence[str] = (),
    ) -> None:
        """`memory` as DuckDB's `memory_limit` has it; what a query needs beyond is spilled. `filesystem`: of
        fsspec, where files are not local. `database`: a file of DuckDB's, to read from. `files`: further
        ones that may be opened, which links lead to."""
        self._folder = SpillFolder()
        self._open_cursors: set[duckdb.DuckDBPyConnection] = set()
        try:
            con = _connected(memory, database, self._folder.path)
        except BaseException:  # no file of DuckDB's, or another process writes it
            self._folder.remove()
            raise
        self._con: duckdb.DuckDBPyConnection | None = con
        if filesystem is not None:
            con.register_filesystem(filesystem)
        # DuckDB follows links before it compares; a glob stands for itself in the path that it is given.
        opened = {path for file in files for path in (file, os.path.realpath(file))}
        for setting in (
            "TimeZone = 'UTC'",
            "arrow_lossless_conversion = true",
            f"allowed_directories = [{', '.join(map(literal, allowed))}]",
            f"allowed_paths = [{', '.join(map(literal, sorted(opened)))}]",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            con.execute(f"SET {setting}")

    @contextmanager
    def cursor(self, doing: str) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection for one query at a time; errors say what was being done."""
        with storage_errors(doing):
            cursor = self.connection().cursor()
            self._open_cursors.add(cursor)
            try:
                yield cursor
            finally:
                self._open_cursors.discard(cursor)
                cursor.close()

    def connection(self) -> duckdb.DuckDBPyConnection:
        """Raises `TablesUnavailable` for a thread that comes late."""
        if (con := self._con) is None:
            raise TablesUnavailable("the lake or database was closed")
        return con

    def close(self) -> None:
        """Interrupt what other threads still do, and remove what was spilled."""
        con, self._con = self._con, None
        if con is None:
            return
        # Whoever keeps this object (Prefect keeps the arguments of its task runs) must not keep DuckDB's,
        # which complains at the end of the process about what is still there.
        until = time.monotonic() + CLOSING_S
        while self._open_cursors and time.monotonic() < until:
            for cursor in list(self._open_cursors):
                with suppress(duckdb.Error):  # it has ended meanwhile
                    cursor.interrupt()
            time.sleep(0.01)
        con.close()
        self._folder.remove()


def _connected(memory: str, database: Path | None, spill: Path) -> duckdb.DuckDBPyConnection:
    return duckdb.connect(
        ":memory:" if database is None else str(database),
        read_only=database is not None,
        config={
            "memory_limit": memory,
            "threads": THREADS,
            "temp_directory": str(spill),
            "preserve_insertion_order": False,
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        },
    )


class SpillFolder:
    """A temporary folder that goes with its process: a killed one's is removed by whoever makes the next.

    A lock on a file in it, which the kernel gives back at any end, says that somebody is there.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
            made = self.path / f"{LOCK}.new"
            self._lock = os.open(made, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            made.rename(self.path / LOCK)  # seen by others only when it is held
        except OSError as e:
            raise InvalidCall(
                f"no temporary folder can be made in {tempfile.gettempdir()!r} ({e.strerror}); name another "
                "place by the environment variable TMPDIR"
            ) from e

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another's, or being removed, or made, by somebody else
            lock = os.open(folder / LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
