"""P8: memory of `predict_in_db` over more and more rows; goal: 1 M rows take <= 150 MB more than 10 k.

Rows go from a Parquet file into a Delta table, and the server responds at once. Each run is a process of its
own; its figure is the peak resident memory, including imports.
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
WIDE, WIDE_IN_ONE, GROUP = 20_000, 1_000, 16
"""Rows of 1 MB in groups of `GROUP`, and rows in one group, which its writer must hold in memory."""
MEGABYTE = 1_000_000


def measure(options: Options) -> Iterator[str]:
    """One line for the number of rows, and one for wide rows."""
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
    yield wide_line()


def wide_line() -> str:
    """The peak memory of runs over wide rows."""
    shown = []
    with Child(scripted.serve) as server:
        for size, group in (WIDE // 10, GROUP), (WIDE, GROUP), (WIDE_IN_ONE, WIDE_IN_ONE):
            with tempfile.TemporaryDirectory() as folder:
                with Child(wide_source, folder, size, group) as writing:
                    assert writing.ready
                with Child(job, folder, server.ready, size) as child:
                    peak, took = child.ready
            shown.append(
                f"{size:,} rows in groups of {group:,}: {peak / 2**20:,.0f} MiB ({size / took:,.0f} rows/s)"
            )
    return f"P8 peak RSS over rows of 1 MB: {'; '.join(shown)}; goal <= 1 GB, and thrice one group of 1 GB"


def wide_source(pipe: Connection, folder: str, size: int, group: int) -> None:
    """Write rows of 1 MB, all different, in row groups of `group`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = "What is the answer to this long question? " * (MEGABYTE // 42)
    schema = pa.schema({"id": pa.int64(), "text": pa.string()})
    with pq.ParquetWriter(f"{folder}/rows.parquet", schema, compression="zstd") as writer:
        for start in range(0, size, group):
            ids = range(start, min(start + group, size))
            columns = [pa.array(ids, pa.int64()), pa.array([f"{i}. {words}" for i in ids])]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=group)
    pipe.send("ready")


def source(pipe: Connection, folder: str, size: int) -> None:
    """Write the source in a process of its own, since DuckDB keeps memory."""
    write_rows(Path(folder), size)
    pipe.send("ready")


def job(pipe: Connection, folder: str, server: str, size: int) -> None:
    """Send the peak memory in bytes and the seconds of a run over `size` rows."""
    report = model_of(server).predict_in_db("text", "rows", db=folder)
    assert report.succeeded == size, report
    pipe.send((resident("VmHWM"), report.seconds["total"]))
