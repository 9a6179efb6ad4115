"""The start of a shard, measured: the time to find its missing rows among all keys of a table."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from benchmarks.children import Child
from benchmarks.p6 import resident
from benchmarks.scale.commits import OUTPUTS, SELECTION, TABLE, rows_of, write_keys
from vllm_tasks.datalayer.lake.lake import Lake

DONE = 0.9
"""The fraction of the rows that are done."""
PART = 1_000_000
SHARD = 0, 16


@dataclass(frozen=True)
class Found:
    """A search: the keys of the table, the shard, seconds to the first missing row and to the last, the peak
    of the memory in bytes, and the missing rows of the shard."""

    keys: int
    shard: tuple[int, int] | None
    first: float
    last: float
    peak: int
    rows: int


def searches(keys: int) -> list[Found]:
    """Search a table of so many rows, of which a tenth is missing: all of them, and a shard's."""
    with tempfile.TemporaryDirectory() as folder:
        fill(folder, keys)
        found = []
        for shard in (None, SHARD):
            with Child(search, folder, keys, shard) as child:
                found.append(child.ready)
        return found


def fill(folder: str, keys: int) -> None:
    """A source of whole numbers, of which every tenth has no output."""
    import duckdb

    duckdb.sql(f"COPY (SELECT i AS id, '' AS text FROM range({keys}) t(i)) TO '{folder}/rows.parquet'")
    lake = Lake(folder)
    writer = lake.writer(SELECTION, TABLE)
    writer.commit(rows_of([""], 0, 1), ())
    writer.close()
    lake.close()
    write_keys(f"{folder}/{OUTPUTS}", int(DONE * keys) - 1, first=1, part=PART)


def search(pipe: Connection, folder: str, keys: int, shard: tuple[int, int] | None) -> None:
    """Send what a `Found` has."""
    lake = Lake(folder)
    chosen = replace(SELECTION, fingerprint="f" * 64, shard=shard)
    started, first, rows = time.perf_counter(), 0.0, 0
    for some in lake.rows(chosen, 512):
        first = first or time.perf_counter() - started
        rows += len(some)
    last = time.perf_counter() - started
    lake.close()
    pipe.send(Found(keys, shard, first, last, resident("VmHWM"), rows))
