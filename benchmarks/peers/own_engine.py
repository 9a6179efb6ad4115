"""Our sides with an engine of our own: lists through `predict_batches`, tables through `predict_in_db`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.ours import GREEDY, check_lengths, seconds_of
from benchmarks.peers.plan import TOKENS
from benchmarks.peers.side import Outcome, answer_all, dead
from benchmarks.workload import Row, output_tokens
from vllm_tasks import VllmAPI, VllmModel
from vllm_tasks.errors import RowErrors

BATCHES, TABLE = "ours: predict_batches", "ours: predict_in_db"


def serve(pipe: Connection, engine_args: dict[str, Any]) -> None:
    """Both ways on one engine; the method `predict_in_db`, from a Parquet to a Delta table."""
    with model_of(engine_args) as model, tempfile.TemporaryDirectory() as folder:
        # What the first table costs (imports, for the most part) belongs to the start-up.
        through_table(model, [Row("first", 1)], Path(tempfile.mkdtemp(dir=folder)))
        check_lengths(model, [Row("first", TOKENS)])  # of `predict_batches` nobody counts the tokens
        answer_all(
            pipe,
            {
                BATCHES: partial(through_batches, model),
                TABLE: lambda rows: through_table(model, rows, Path(tempfile.mkdtemp(dir=folder))),
            },
        )


def model_of(engine_args: dict[str, Any]) -> VllmModel:
    arguments = {**engine_args}
    name = arguments.pop("model")
    return VllmModel(identifier="peer", model_name=name, predict_kwargs=GREEDY, vllm_kwargs=arguments)


def through_batches(model: VllmAPI | VllmModel, rows: Sequence[Row]) -> Outcome:
    """One call for each length of answers, all at once."""
    started = time.perf_counter()
    try:
        seconds = seconds_of(model, rows)
    except RowErrors as found:  # it has the answers of the other rows
        failed = len(found.errors)
        return Outcome(time.perf_counter() - started, 0, len(rows) - failed, failed)
    return Outcome(seconds, output_tokens(rows), len(rows))


def through_table(model: VllmAPI | VllmModel, rows: Sequence[Row], lake: Path, **options: Any) -> Outcome:
    """One call; all rows have answers of one length, for a call has one `max_tokens`."""
    write_source(lake, [row.prompt for row in rows])
    (tokens,) = {row.max_tokens for row in rows}
    started = time.perf_counter()
    try:
        report = model.predict_in_db("prompt", "rows", db=str(lake), max_tokens=tokens, **options)
    except Exception as error:  # noqa: BLE001 - what it does to a bad row is what is asked
        return dead(started, error)
    seconds = time.perf_counter() - started
    return Outcome(seconds, report.completion_tokens, report.succeeded, report.failed)


def write_source(lake: Path, prompts: Sequence[str]) -> None:
    lake.mkdir(exist_ok=True)
    pq.write_table(pa.table({"id": range(len(prompts)), "prompt": prompts}), lake / "rows.parquet")
