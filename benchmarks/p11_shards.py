"""P11 for shards: two flow runs on a work pool against one, each with an engine; goal: >= 0.9.

A server that completes every row after `DELAY` seconds stands for GPU time: a client with `IN_FLIGHT` rows in
flight is an engine of that size, and two clients are two engines. The Prefect server, two process workers and
the lake are real. The efficiency is for the time from the first row sent to the last answer. The total time,
with the start of two processes, is printed next to it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from benchmarks import scripted
from benchmarks.children import Child
from benchmarks.options import Options
from benchmarks.p7 import write_rows
from benchmarks.pairs import summarize
from vllm_tasks import VllmAPI, predict_in_db
from vllm_tasks.pools import Pool, make
from vllm_tasks.results import Report

ROWS = 4000
DELAY = 0.25
"""Seconds that the server takes for a row."""
IN_FLIGHT = 32
POOL = "bench"


def measure(options: Options) -> Iterator[str]:
    """One line: two shards against one."""

    @flow
    def spread(url: str, lake: str, shards: int) -> Report:
        model = VllmAPI(
            identifier="bench", api_url=f"{url}/v1/completions", model="m", max_in_flight=IN_FLIGHT,
            compute_kwargs={"work_pool": POOL},
        )  # fmt: skip
        report: Report = predict_in_db(model, "text", "rows", db=lake, shards=shards)
        return report

    def seconds(url: str, shards: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as lake:
            write_rows(Path(lake), ROWS)
            report = spread(url, lake, shards)
            assert report.succeeded == ROWS
            return report.seconds

    with prefect_test_harness(server_startup_timeout=120), Child(scripted.serve, DELAY) as server:
        list(make(Pool(POOL, "process")))
        with workers(2):
            seconds(server.ready, 1)  # warms up
            pairs = [(seconds(server.ready, 1), seconds(server.ready, 2)) for _ in range(options.least)]
    yield line(pairs)


def line(pairs: list[tuple[dict[str, float], dict[str, float]]]) -> str:
    answering = summarize([one["answer"] / two["answer"] / 2 for one, two in pairs])
    total = summarize([one["total"] / two["total"] / 2 for one, two in pairs])
    return (
        f"P11 {answering.median:.3f} efficiency of 2 shards / 1, first row sent to last answer; {answering}, "
        f"{answering.count} pairs; for the total time, with the start of the flow runs, {total.median:.3f}; "
        f"{ROWS:,} rows, {IN_FLIGHT} in flight an engine, {DELAY} s each: "
        f"{summarize([one['total'] for one, _ in pairs]).median:.1f} s and "
        f"{summarize([two['total'] for _, two in pairs]).median:.1f} s; goal >= 0.9"
    )


@contextmanager
def workers(count: int) -> Iterator[None]:
    """Run `count` process workers of the pool; the flow runs are their child processes."""
    url = PREFECT_API_URL.value()
    assert url
    env: dict[str, Any] = {**os.environ, "PREFECT_API_URL": url, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL]
    with tempfile.TemporaryFile() as log:
        running = [
            subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
            for _ in range(count)
        ]
        try:
            yield
        finally:
            for worker in running:
                worker.send_signal(signal.SIGINT)
            for worker in running:
                worker.wait(30)
