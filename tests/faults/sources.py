"""The kinds of sources of a flow that is killed: each is read there, and outputs are written elsewhere."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import deltalake
import duckdb
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq

from tests.datalayer.sources.test_every_source import arrow, iceberg
from tests.faults.ground import Ground, Lacking
from tests.faults.kills import APART, flows
from tests.faults.ledger import Figures
from tests.faults.work import IN_FLOW, Work
from tests.places import Place
from tests.servers import mariadb, object_store

PARTS = 3


def in_parts(table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """The table in parts of about one size, with their numbers."""
    size = -(-table.num_rows // PARTS)
    for i in range(PARTS):
        yield i, table.slice(i * size, size)


def parquet_folder(table: pa.Table, at: Path, name: str = "{}.parquet") -> None:
    for i, part in in_parts(table):
        file = at / "rows" / name.format(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(part, file)


def delta(table: pa.Table, at: Path) -> None:
    for _, part in in_parts(table):
        deltalake.write_deltalake(at / "rows", part, mode="append")


def lines(table: pa.Table) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in table.to_pylist())


def delimited(table: pa.Table, delimiter: str = ",") -> bytes:
    written = pa.BufferOutputStream()
    pa.csv.write_csv(table, written, pa.csv.WriteOptions(delimiter=delimiter))
    return written.getvalue().to_pybytes()


FILES: dict[str, Callable[[pa.Table, Path], object]] = {
    "a Parquet file": lambda table, at: pq.write_table(table, at / "rows.parquet", row_group_size=150),
    "a folder of Parquet files": parquet_folder,
    "partitions of Parquet files": lambda table, at: parquet_folder(table, at, "part={}/x.parquet"),
    "CSV": lambda table, at: (at / "rows.csv").write_bytes(delimited(table)),
    "CSV, gzip": lambda table, at: (at / "rows.csv.gz").write_bytes(gzip.compress(delimited(table))),
    "TSV": lambda table, at: (at / "rows.tsv").write_bytes(delimited(table, "\t")),
    "JSON lines": lambda table, at: (at / "rows.jsonl").write_bytes(lines(table)),
    "JSON": lambda table, at: (at / "rows.json").write_text(json.dumps(table.to_pylist())),
    "Arrow": lambda table, at: arrow(table, at / "rows.arrow"),
    "Feather": lambda table, at: pa.feather.write_feather(table, at / "rows.feather", compression="zstd"),
    "Delta": delta,
    "Iceberg": iceberg,
}
FRAMES = ("pandas", "polars", "stream")
"""Tables in memory; a stream can be read once only, and is copied first."""
SOURCES = (
    *FILES, "a SELECT over Parquet", "an object store", "SQLite", "PostgreSQL", "DuckDB", "MariaDB",
    *(f"a table in memory ({frame})" for frame in FRAMES),
)  # fmt: skip


def flow_reads(ground: Ground, source: str, kind: str, kills: int) -> Figures:
    """The flow that reads `source` and writes to a place of `kind` is killed.

    Raises `Lacking` where the source's server is not installed.
    """
    rows = range(2 * APART * (kills + 1))
    table = pa.table({"id": rows, "text": [f"t{i}" for i in rows]})
    at = ground.folder / f"source{SOURCES.index(source)}"
    at.mkdir()
    with made(ground, source, table, at) as work:
        # The environment has the address of the object store by now.
        jobs = ground.jobs_in({}) if source == "an object store" else None
        return flows(ground, kind, kills, work, jobs)


@contextmanager
def made(ground: Ground, source: str, table: pa.Table, at: Path) -> Iterator[Work]:
    """The work of reading `table`, which is put into a source in `at`, or on a server, for as long."""
    name = f"reads {source}"
    if source.startswith("a table in memory"):
        pq.write_table(table, at / "rows.parquet")
        frame = source.partition("(")[2][:-1]
        call = {"work": "in_flow_over_frame", "frame": frame}
        yield Work(name, table=("text", str(at / "rows.parquet")), call=call)
    elif source == "MariaDB":
        if mariadb.binary() is None:
            raise Lacking("needs MariaDB: apt-get install mariadb-server")
        with mariadb.running() as url:
            yield Work(name, call=filled(url, table))
    elif source == "an object store":
        with object_store.running() as bucket:
            pq.write_table(table, at / "rows.parquet")
            object_store.put(at / "rows.parquet", f"{bucket}/rows.parquet")
            yield Work(name, call={**IN_FLOW, "source": bucket})
    elif source in ("SQLite", "PostgreSQL"):
        url = f"sqlite:///{at}/rows.db" if source == "SQLite" else ground.postgres.new_database()
        yield Work(name, call=filled(url, table))
    elif source == "DuckDB":
        with duckdb.connect(f"{at}/crm.duckdb") as connection:
            connection.register("t", table)
            connection.execute("CREATE TABLE rows AS FROM t")
        yield Work(name, call={**IN_FLOW, "source": f"duckdb:///{at}/crm.duckdb"})
    else:
        FILES.get(source, FILES["a Parquet file"])(table, at)
        select = "rows" if source in FILES else "SELECT id, text FROM rows WHERE id >= 0 ORDER BY id DESC"
        yield Work(name, table=("text", select), call={**IN_FLOW, "source": str(at)})


def filled(url: str, table: pa.Table) -> dict[str, str]:
    """The call that reads the table `rows` of a database, with these rows."""
    Place(url).fill(table.to_pylist())
    return {**IN_FLOW, "source": url}
