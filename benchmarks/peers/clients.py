"""Clients of a server in our environment: ours, `vllm bench serve`, and the older system's ways."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from deltalake import DeltaTable

from benchmarks.ours import GREEDY
from benchmarks.peers import own_engine
from benchmarks.peers.side import Outcome, answer_all
from benchmarks.workload import Row
from vllm_tasks import VllmAPI

OURS, BENCH = "ours: VllmAPI.predict_batches", "vllm bench serve"
GROUP = 64
"""Rows of a small commit group: as many as are in flight with the default `--concurrency`."""
SMALL = f"{own_engine.TABLE}, max_chunk_size={GROUP}"
THREADS, CHUNKS = "older: 4 threads, a request each", "older: requests of 4, one after another"


def serve_ours(pipe: Connection, url: str, concurrency: int) -> None:
    """Process lists with `predict_batches`, and tables with `predict_in_db`, each in a new lake."""
    model = model_of(url, concurrency)
    with tempfile.TemporaryDirectory() as folder:

        def through_table(rows: Sequence[Row]) -> Outcome:
            return own_engine.through_table(model, rows, Path(tempfile.mkdtemp(dir=folder)))

        through_table([Row("first", 1)])  # so that its imports count as start-up
        answer_all(pipe, {OURS: partial(own_engine.through_batches, model), own_engine.TABLE: through_table})


def model_of(url: str, concurrency: int) -> VllmAPI:
    return VllmAPI(
        identifier="peer",
        api_url=f"{url}/v1/completions",
        max_in_flight=concurrency,
        predict_kwargs=GREEDY,
    )


def serve_table(pipe: Connection, url: str, concurrency: int, folder: str) -> None:
    """Run `predict_in_db` into a lake that remains after a crash."""
    lake = Path(folder) / "lake"

    def through(rows: Sequence[Row], **options: int) -> Outcome:
        found = own_engine.through_table(model_of(url, concurrency), rows, lake, **options)
        keys = DeltaTable(lake / "_outputs__peer").to_pyarrow_table(columns=["id"])["id"].to_pylist()
        return dataclasses.replace(found, completed=len({*keys}), stored=len(keys))

    answer_all(pipe, {own_engine.TABLE: through, SMALL: partial(through, max_chunk_size=GROUP)})


def serve_bench(pipe: Connection, url: str, model: str, concurrency: int) -> None:
    """Run `vllm bench serve`, which always streams, and take the time that it reports."""
    from vllm.benchmarks import serve as client
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from benchmarks.bench_serve import arguments, samples

    parser = FlexibleArgumentParser()
    client.add_cli_args(parser)

    def through(rows: Sequence[Row]) -> Outcome:
        client.get_samples = lambda *_: samples(rows)
        found = client.main(parser.parse_args(arguments(url, model, concurrency, len(rows))))
        failed = len(rows) - found["completed"]
        return Outcome(found["duration"], found["total_output_tokens"], found["completed"], failed)

    answer_all(pipe, {BENCH: through})


def serve_older(pipe: Connection, url: str, model: str) -> None:
    """Send requests with `requests.post`, which opens a connection for each."""
    import requests

    def post(prompt: str | list[str], row: Row) -> int:
        """Send one request; returns the number of output tokens."""
        sampling = {**GREEDY, "max_tokens": row.max_tokens}
        body = {"model": model, "prompt": prompt, **sampling}
        answer = requests.post(f"{url}/v1/completions", json=body, timeout=600)
        answer.raise_for_status()
        tokens: int = answer.json()["usage"]["completion_tokens"]
        return tokens

    def in_threads(rows: Sequence[Row]) -> list[int]:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda row: post(row.prompt, row), rows))

    def in_chunks(rows: Sequence[Row]) -> list[int]:
        chunks = [rows[first : first + 4] for first in range(0, len(rows), 4)]
        return [post([row.prompt for row in chunk], chunk[0]) for chunk in chunks]

    answer_all(pipe, {THREADS: partial(timed, in_threads), CHUNKS: partial(timed, in_chunks)})


def timed(way: Callable[[Sequence[Row]], list[int]], rows: Sequence[Row]) -> Outcome:
    started = time.perf_counter()
    try:
        tokens = way(rows)
    except OSError as error:  # the base of all errors of `requests`
        words = f"{type(error).__name__}: {error}"
        return Outcome(time.perf_counter() - started, 0, 0, died=words)
    return Outcome(time.perf_counter() - started, sum(tokens), len(rows))
