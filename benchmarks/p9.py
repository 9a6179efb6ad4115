"""P9: Prefect's cost in `predict_in_db`, per commit group and of the wall time; goal: <= 10 ms and <= 1 %.

A flow with a Prefect server processes rows from a Parquet file into a Delta table; a scripted server responds
at once. First one row is in flight, which is about as fast as a small model on a GPU. Then there is no limit,
which uses both cores fully, so Prefect's time is mostly waiting for a core. The cost is Prefect's time in the
committing thread, for task runs and progress, without the commits themselves.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from benchmarks import scripted
from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.p7 import model_of, write_rows
from benchmarks.pairs import summarize
from vllm_tasks._prefect.commits import InPrefect
from vllm_tasks.results import Report
from vllm_tasks.tables import predict_in_db
from vllm_tasks.tables.progress import Progress

ROWS = 50_000


class Timed(InPrefect):
    """Adds up the seconds spent in Prefect."""

    def __init__(self, model: str, predict_id: str) -> None:
        super().__init__(model, predict_id)
        self.groups: list[float] = []
        self.displaying = 0.0

    def commit(self, name: str, work: Callable[[], None]) -> None:
        inside = 0.0

        def timed() -> None:
            nonlocal inside
            started = time.perf_counter()
            work()
            inside += time.perf_counter() - started

        started = time.perf_counter()
        super().commit(name, timed)
        self.groups.append(time.perf_counter() - started - inside)

    def progress(self, progress: Progress, *, last: bool = False) -> None:
        started = time.perf_counter()
        super().progress(progress, last=last)
        self.displaying += time.perf_counter() - started


def measure(options: Options) -> Iterator[str]:
    """One line with one row in flight, one with many, and one with many in small groups of 512 rows."""

    @flow
    def nightly(
        lake: str, server: str, max_in_flight: int | None, max_chunk_size: int | None
    ) -> tuple[Report, Timed]:
        display = Timed("bench", "bench")
        model = model_of(server, max_in_flight)
        report = predict_in_db(model, "text", "rows", db=lake, max_chunk_size=max_chunk_size, display=display)
        return report, display

    with prefect_test_harness(server_startup_timeout=120), Child(scripted.serve) as server:
        for in_flight, size in ((1, None), (None, None), (None, 512)):
            with tempfile.TemporaryDirectory() as lake:
                write_rows(Path(lake), ROWS)
                report, display = nightly(lake, server.ready, in_flight, size)
            yield line(f"max_in_flight={in_flight}, max_chunk_size={size}", report, display)


def line(setting: str, report: Report, display: Timed) -> str:
    group = summarize([1000 * seconds for seconds in display.groups])
    fraction = (sum(display.groups) + display.displaying) / report.seconds["total"]
    return (
        f"P9 {group.median:.2f} ms of Prefect a group, {fraction:.2%} of the wall time, with "
        f"{setting}; {group}, {group.count} groups; {ROWS:,} rows in "
        f"{report.seconds['total']:.1f} s; goal <= 10 ms and <= 1 %"
    )
