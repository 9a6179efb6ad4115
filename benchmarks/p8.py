"""P8: memory of `predict_in_db` over more and more rows; goal: 1 M take <= 150 MB more than 10 k.

From a Parquet file into a Delta table, against a server that answers at once, each run in a process of
its own: the most that was resident in it, imports and all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks import scripted
from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.p6 import resident
from benchmarks.p7 import model_of, write_rows

SIZES = 10_000, 100_000, 1_000_000


def measure(options: Options) -> Iterator[str]:
    """One line."""
    peaks, seconds = [], []
    with Child(scripted.serve) as server:
        for size in SIZES:
            with tempfile.TemporaryDirectory() as folder:
                with Child(source, folder, size) as writing:
                    assert writing.ready
                with Child(job, folder, server.ready, size) as child:
                    peak, took = child.ready
            peaks.append(peak)
            seconds.append(took)
    shown = ", ".join(
        f"{size:,} rows {peak / 2**20:.0f} MiB ({size / took:,.0f} rows/s)"
        for size, peak, took in zip(SIZES, peaks, seconds, strict=True)
    )
    growth = (peaks[-1] - peaks[0]) / 1e6
    yield (
        f"P8 {growth:.0f} MB more peak RSS at {SIZES[-1]:,} rows than at {SIZES[0]:,}; {shown}; "
        "goal <= 150 MB"
    )


def source(pipe: Connection, folder: str, size: int) -> None:
    """Write the source, in a process of its own: DuckDB keeps memory."""
    write_rows(Path(folder), size)
    pipe.send("ready")


def job(pipe: Connection, folder: str, server: str, size: int) -> None:
    """Send the peak memory in bytes and the seconds of a run over `size` rows."""
    report = model_of(server).predict_in_db("text", "rows", db=folder)
    assert report.succeeded == size, report
    pipe.send((resident("VmHWM"), report.seconds["total"]))
