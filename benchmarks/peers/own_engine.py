"""Our sides with an engine of their own: lists with `predict_batches`, and tables with `predict_in_db`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
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


def serve_pooling(pipe: Connection, engine_args: dict[str, Any]) -> None:
    """Embed texts and score pairs both ways, all on one engine."""
    embeds = model_of(engine_args, task="embed")
    scores = model_of(engine_args, task="score", signature="*args")  # equal but for the task: one engine

    def of(rows: Sequence[Row]) -> VllmModel:
        return scores if rows[0].second else embeds

    def through_list(rows: Sequence[Row]) -> Outcome:
        inputs = [(row.prompt, row.second) if row.second else row.prompt for row in rows]
        started = time.perf_counter()
        count = len(of(rows).predict_batches(inputs))
        return Outcome(time.perf_counter() - started, 0, count)

    with embeds, scores, tempfile.TemporaryDirectory() as folder:

        def through(rows: Sequence[Row]) -> Outcome:
            return through_table(of(rows), rows, Path(tempfile.mkdtemp(dir=folder)))

        through([Row("first", 0)])
        answer_all(pipe, {BATCHES: through_list, TABLE: through})


def model_of(engine_args: dict[str, Any], **fields: Any) -> VllmModel:
    arguments = {**engine_args}
    name = arguments.pop("model")
    if "task" not in fields:
        fields |= {"chat": False, "predict_kwargs": GREEDY}  # texts as they are, as the other sides
    return VllmModel(
        identifier="peer",
        model_name=name,
        vllm_kwargs=arguments,
        **fields,
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
    """One call; parameters that differ from row to row are columns of the table."""
    columns: dict[str, list[Any]] = {"prompt": [row.prompt for row in rows]}
    if any(row.second for row in rows):
        columns["second"] = [row.second for row in rows]
    inputs = list(columns) if len(columns) > 1 else "prompt"
    options |= parameters(rows, columns)
    write_source(lake, columns)
    started = time.perf_counter()
    try:
        report = model.predict_in_db(inputs, "rows", db=str(lake), **options)
    except Exception as error:  # noqa: BLE001 - the result with a bad row is measured
        return dead(started, error)
    seconds = time.perf_counter() - started
    return Outcome(seconds, report.completion_tokens, report.succeeded, report.failed)


def parameters(rows: Sequence[Row], columns: dict[str, list[Any]]) -> dict[str, Any]:
    """Arguments for the parameters of the rows; those that differ become `columns`."""
    lengths = {row.max_tokens for row in rows}
    if len(lengths) == 1 and not rows[0].sampling:
        return {"max_tokens": lengths.pop()} if lengths != {0} else {}
    names = ["max_tokens", *rows[0].sampling]
    columns |= {name: [row.parameters()[name] for row in rows] for name in names}
    return {"sampling_columns": {name: name for name in names}}


def write_source(lake: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    lake.mkdir(exist_ok=True)
    count = len(columns["prompt"])
    pq.write_table(pa.table({"id": range(count), **columns}), lake / "rows.parquet")
