"""Our sides with an engine of their own: lists with `predict_batches`, and tables with `predict_in_db`."""

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
    """Process rows both ways on one engine; `predict_in_db` goes from a Parquet file to a Delta table."""
    with model_of(engine_args) as model, tempfile.TemporaryDirectory() as folder:
        # The extra cost of the first table (mostly imports) counts as start-up.
        through_table(model, [Row("first", 1)], Path(tempfile.mkdtemp(dir=folder)))
        check_lengths(model, [Row("first", TOKENS)])  # since `predict_batches` does not return token counts
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
    return VllmModel(
        identifier="peer",
        model_name=name,
        chat=False,  # as the other sides, which send texts as they are
        predict_kwargs=GREEDY,
        vllm_kwargs=arguments,
    )


def through_batches(model: VllmAPI | VllmModel, rows: Sequence[Row]) -> Outcome:
    """One call for each length of answers, all calls concurrently."""
    started = time.perf_counter()
    try:
        seconds = seconds_of(model, rows)
    except RowErrors as found:  # the error has the answers of the other rows
        failed = len(found.errors)
        return Outcome(time.perf_counter() - started, 0, len(rows) - failed, failed)
    return Outcome(seconds, output_tokens(rows), len(rows))


def through_table(model: VllmAPI | VllmModel, rows: Sequence[Row], lake: Path, **options: Any) -> Outcome:
    """One call; all rows have answers of one length, since a call has one `max_tokens`."""
    write_source(lake, [row.prompt for row in rows])
    (tokens,) = {row.max_tokens for row in rows}
    started = time.perf_counter()
    try:
        report = model.predict_in_db("prompt", "rows", db=str(lake), max_tokens=tokens, **options)
    except Exception as error:  # noqa: BLE001 - the result with a bad row is measured
        return dead(started, error)
    seconds = time.perf_counter() - started
    return Outcome(seconds, report.completion_tokens, report.succeeded, report.failed)


def write_source(lake: Path, prompts: Sequence[str]) -> None:
    lake.mkdir(exist_ok=True)
    pq.write_table(pa.table({"id": range(len(prompts)), "prompt": prompts}), lake / "rows.parquet")
