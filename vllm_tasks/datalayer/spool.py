"""Spools rows to a file at full speed, so that no transaction is open while the model works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from tempfile import SpooledTemporaryFile, gettempdir
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from vllm_tasks.datalayer.database.backends import Backend
from vllm_tasks.datalayer.pages import Pages
from vllm_tasks.datalayer.sources import Values
from vllm_tasks.datalayer.storage_errors import storage_errors

LEAST = 16 << 20
"""Minimum bytes that one transaction reads, if there are as many; up to here they are kept in memory."""
MOST = 256 << 20
"""Maximum bytes that one transaction reads, except for a last page."""
SOON = 1 << 20
"""Maximum bytes of the first transaction, so that its rows need not wait for more."""
LONGEST = 5.0
"""Seconds after its first row within which a transaction must end: others may wait for its locks."""
PAGE_BYTES = 4 << 20
"""Approximate bytes of rows held as Python objects at once."""
FIRST = 16
"""Rows fetched before their width is known."""
LIMIT = 1000
"""Rows of the first transaction, if a result must be read to its end."""


class Spool:
    """The rows of one query, in pages of at most `size` rows and about `PAGE_BYTES`."""

    def __init__(self, size: int, most: int = MOST) -> None:
        self._size = size
        self._most = most
        self._file = SpooledTemporaryFile(max_size=LEAST)  # noqa: SIM115 - closed by `close`
        self._pages = Pages()
        self.last: Values = ()
        """The last row that was read."""
        self.rows = self._end = 0

    def fill(self, connection: Connection, query: sa.Select[Any], *, all_rows: bool = False) -> bool:
        """Read enough rows for one transaction, or `all_rows`; returns whether the query is at its end.

        If a query took long before its first row, rows are read for at least as long: otherwise a sort of the
        complete table would be repeated for every few rows.
        """
        began = time.monotonic()
        first = 0.0
        streaming = connection.execution_options(stream_results=True, max_row_buffer=1)
        with streaming.execute(query) as result:
            count = min(FIRST, self._size)
            while page := [tuple(row) for row in result.fetchmany(count)]:
                now = time.monotonic()
                first = first or now
                written = self._add(page)
                if not all_rows and self._is_enough(written, now - first, first - began):
                    return False
                count = max(1, min(self._size, PAGE_BYTES * self.rows // written))
        return True

    def _is_enough(self, written: int, reading: float, waited: float) -> bool:
        return written >= self._most or reading >= LONGEST or (written >= LEAST and reading >= waited)

    def _add(self, page: list[Values]) -> int:
        """Append a page; returns the bytes written so far. Raises `TablesUnavailable` without disk space."""
        with storage_errors(f"cannot keep rows in the temporary folder {gettempdir()!r} (TMPDIR)"):
            self._pages.write(page, self._file)
        self.last = page[-1]
        self.rows += len(page)
        self._end = self._file.tell()
        return self._end

    def rows_within(self, most: int) -> int:
        """How many rows of this width fit into `most` bytes, at least one."""
        return max(1, most * self.rows // self._end)

    def pages(self) -> Iterator[list[Values]]:
        """The rows in their order; may be called repeatedly."""
        self._file.seek(0)
        while self._file.tell() < self._end:
            yield self._pages.read(self._file)

    def close(self) -> None:
        """Discard the rows."""
        self._file.close()


def spools(
    backend: Backend,
    query: Callable[[Connection, Sequence[Any] | None], sa.Select[Any]],
    bound: int,
    size: int,
) -> Iterator[Spool]:
    """All rows of a query that is ordered by its keys; each spool is read in a separate transaction.

    `query(connection, after)` returns the rows after the one whose last `bound` columns were `after`. No
    transaction is open while the caller uses a spool, and a spool is closed when the next one is requested.
    """
    after: Sequence[Any] | None = None
    limit = None if backend.leaves_results else LIMIT
    while True:
        with closing(Spool(size, SOON if after is None else MOST)) as spool:
            with backend.reading() as connection:
                left = query(connection, after).limit(limit)
                complete = spool.fill(connection, left, all_rows=limit is not None)
            yield spool
            if complete and (limit is None or spool.rows < limit):
                return
            after = spool.last[-bound:]
            limit = None if limit is None else spool.rows_within(LEAST)
