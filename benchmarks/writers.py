"""WRITERS: commits a second of several concurrent writers to one outputs table of a lake, as shards make
them.

Each writer is a process that commits groups of 512 rows of its own, one after another. Delta's log takes one
commit at a time, so the total rate limits the number of shards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.p7 import write_rows
from benchmarks.pairs import summarize

WRITERS = 1, 2, 4, 8
GROUP = 512
SECONDS = 15.0


def measure(options: Options) -> Iterator[str]:
    """One line for each number of writers."""
    for count in WRITERS:
        with tempfile.TemporaryDirectory() as folder:
            write_rows(Path(folder), 1)
            running = [Child(writer, folder, i) for i in range(count)]
            try:
                for child in running:
                    child.__enter__()
                done = at_once(running)
            finally:
                for child in running:
                    child.close(5.0)
        slowest = summarize([worst for _, worst in done])
        yield (
            f"WRITERS {sum(n for n, _ in done) / SECONDS:.1f} commits a second of {GROUP} rows by {count} "
            f"writers into one lake; slowest commit {slowest.median:.2f} s (median of writers)"
        )


def at_once(running: list[Child]) -> list[tuple[int, float]]:
    for child in running:
        child.send("go")
    return [child.receive() for child in running]


def writer(pipe: Connection, folder: str, number: int) -> None:
    """Send the number of groups committed within `SECONDS`, and the seconds of the slowest commit."""
    from vllm_tasks.datalayer.lake.lake import Lake
    from vllm_tasks.datalayer.selection import OWN_COLUMNS, OutputColumn, OutputTable, Selection

    lake = Lake(folder)
    selection = Selection("rows", ("id",), ("text",), "_outputs__m", "f")
    committing = lake.writer(selection, OutputTable("_outputs__m", (OutputColumn("output", "str"),)))
    pipe.send("ready")
    pipe.recv()
    begun = time.monotonic()
    done, worst = 0, 0.0
    stamp = dict.fromkeys(OWN_COLUMNS) | {"_fingerprint": "f", "_created_at": datetime.now(UTC)}
    while time.monotonic() - begun < SECONDS:
        first = (number * 100_000 + done) * GROUP
        rows = [{"id": first + i, "output": "The answer is 42. " * 8, **stamp} for i in range(GROUP)]
        started = time.monotonic()
        committing.commit(rows, set())
        done, worst = done + 1, max(worst, time.monotonic() - started)
    pipe.send((done, worst))
    committing.close()
    lake.close()
