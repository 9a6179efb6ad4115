"""P7: `predict_in_db` over 10 M rows of which 9 M are done; goal: the first row is sent within 10 s, <= 1 GB.

Three cases: a lake (a Parquet source, and outputs in a Delta table of 90 files), PostgreSQL, and a source in
PostgreSQL with outputs in the lake. Each run is a fresh process; the server responds at once. Seconds are
from the call of `predict_in_db`, without the imports before it. Memory is the peak resident memory of the
process, including imports, until 20,000 rows were processed and committed. The 9 M outputs are as the job
itself would have written them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import scripted
from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.p6 import resident
from benchmarks.pairs import summarize

if TYPE_CHECKING:
    from vllm_tasks import VllmAPI

ALL, DONE, FILES, PROCESSED = 10_000_000, 9_000_000, 90, 20_000
TEXT = "'What is ' || i || ' times ' || i || '? Think step by step and give the number alone.'"
"""A prompt of about 80 characters, in SQL."""


@dataclass(frozen=True)
class Start:
    """The start of a run: seconds to the first row sent, bytes of memory before and at the peak, and rows."""

    seconds: float
    idle: int
    peak: int
    processed: int


def measure(options: Options) -> Iterator[str]:
    """One line for each kind of datalayer."""
    from tests.servers.postgres import running

    with ExitStack() as stack:
        server: str = stack.enter_context(Child(scripted.serve)).ready
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lake = fill_lake(folder, server)
        yield line("lake", *starts(lake, server, options.least))
        postgres = fill_postgres(stack.enter_context(running()).new_database(), server)
        yield line("PostgreSQL", *starts(postgres, server, options.least))
        yield line("PostgreSQL to lake", *starts(lake, server, options.least, postgres))


def starts(url: str, server: str, runs: int, source: str | None = None) -> list[Start]:
    found = []
    for _ in range(runs):
        with Child(job, url, server, source) as child:
            found.append(child.ready)
    return found


def job(pipe: Connection, url: str, server: str, source: str | None = None) -> None:
    """Send the `Start` of a run that processes the first rows that are not done.

    `source` has the same rows as `url`.
    """
    import deltalake  # noqa: F401 - imports are not part of the call
    import duckdb  # noqa: F401
    import sqlalchemy  # noqa: F401

    model = model_of(server)
    idle = resident("VmRSS")
    there: dict[str, Any] = {} if source is None else {"source": source, "same_source": True}
    report = model.predict_in_db("text", "rows", db=url, limit=PROCESSED, **there)
    assert report.succeeded == PROCESSED, report
    pipe.send(Start(report.seconds["first_row"], idle, resident("VmHWM"), report.processed))


def model_of(server: str, max_in_flight: int | None = None) -> VllmAPI:
    from vllm_tasks import VllmAPI

    url = f"{server}/v1/completions"
    return VllmAPI(identifier="bench", api_url=url, model="m", max_in_flight=max_in_flight)


def first_output(url: str, server: str) -> str:
    """Process one row, which creates the outputs table; return its fingerprint, which all rows have."""
    report = model_of(server).predict_in_db("text", "rows", db=url, limit=1, ids=[DONE])
    return report.fingerprint


def done_rows(start: int, end: int, fingerprint: str) -> str:
    """SQL for output rows with the ids `start` to `end - 1`, as the job writes them."""
    return f"""
        SELECT i AS id, 'The answer is 42. ' || i AS output, CAST(NULL AS VARCHAR) AS _error,
            'stop' AS _finish_reason, CAST(60 AS BIGINT) AS _prompt_tokens,
            CAST(48 AS BIGINT) AS _completion_tokens, CAST(1.5 AS FLOAT8) AS _seconds,
            'scripted' AS _model, 'bench' AS _uuid,
            '{fingerprint}' AS _fingerprint, md5(CAST(i AS VARCHAR)) AS _input_hash,
            current_timestamp AS _created_at, 'rows' AS _source
        FROM {{series}}
    """.format(series=f"generate_series({start}, {end - 1}) AS t(i)")


def write_rows(folder: Path, count: int) -> None:
    """The source: `rows.parquet` with the columns `id` and `text`."""
    import duckdb

    duckdb.sql(f"COPY (SELECT i AS id, {TEXT} AS text FROM range({count}) t(i)) TO '{folder}/rows.parquet'")


def fill_lake(folder: Path, server: str) -> str:
    import duckdb
    from deltalake import DeltaTable, write_deltalake

    write_rows(folder, ALL)
    fingerprint = first_output(str(folder), server)
    table = f"{folder}/_outputs__bench"
    columns = ", ".join(field.name for field in DeltaTable(table).schema().fields)
    for file in range(FILES):
        start, end = file * DONE // FILES, (file + 1) * DONE // FILES
        rows = duckdb.sql(f"SELECT {columns} FROM ({done_rows(start, end, fingerprint)})")
        assert rows is not None
        write_deltalake(table, rows.to_arrow_table(), mode="append")
    return str(folder)


def fill_postgres(url: str, server: str) -> str:
    import sqlalchemy as sa

    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        run = connection.exec_driver_sql
        run("CREATE TABLE rows (id BIGINT PRIMARY KEY, text TEXT)")
        run(f"INSERT INTO rows SELECT i, {TEXT} FROM generate_series(0, {ALL - 1}) AS t(i)")
        fingerprint = first_output(url, server)
        columns = "id, output, _error, _finish_reason, _prompt_tokens, _completion_tokens, _seconds"
        columns += ", _model, _uuid, _fingerprint, _input_hash, _created_at, _source"
        run(f"INSERT INTO _outputs__bench ({columns}) {done_rows(0, DONE, fingerprint)}")
        run("VACUUM ANALYZE")
    engine.dispose()
    return url


def line(datalayer: str, *runs: Start) -> str:
    seconds = summarize([run.seconds for run in runs])
    peak = max(run.peak for run in runs)
    idle = max(run.idle for run in runs)
    return (
        f"P7 {seconds.median:.2f} s to the first row, {datalayer}, {ALL:,} rows of which {DONE:,} are done; "
        f"{seconds}, {seconds.count} runs; peak RSS {peak / 2**20:.0f} MiB "
        f"({idle / 2**20:.0f} MiB before the call) until {PROCESSED:,} rows were committed; "
        "goal <= 10 s and <= 1 GB"
    )
