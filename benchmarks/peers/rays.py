"""Ray Data LLM: its engine processor and its HTTP processor, from a Parquet file to Parquet files.

A run is one dataset. Its engine or client lives as long as the run, so each run has a start-up: until the
first row is in the engine (computed from the row's time, which the processor reports), or until the first
request is made.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.peers import environments
from benchmarks.peers.side import Outcome, answer_all, dead
from benchmarks.workload import Row

ENGINE, HTTP = "Ray Data LLM: engine", "Ray Data LLM: HTTP"
TOLERANT = "Ray Data LLM: engine, continue on error"
BATCH = 32
"""Rows of a batch, by Ray Data LLM's default for its engine. At most 8 batches (256 rows) are in the
engine."""
ALL = 2**20
"""Rows of a block that is large enough for all rows."""
STORE = 256 * 2**20
"""Bytes of Ray's object store; the rows of a run are a few hundred KiB."""


def serve_engine(pipe: Connection, engine_args: dict[str, Any]) -> None:
    """Process rows with `vLLMEngineProcessorConfig`, with its defaults and with
    `should_continue_on_error`."""
    ways = {ENGINE: False, TOLERANT: True}
    with_ray(
        pipe,
        {name: partial(engine_processor, engine_args, tolerant) for name, tolerant in ways.items()},
        BATCH,
    )


def serve_http(pipe: Connection, url: str, model: str, concurrency: int, folder: str | None = None) -> None:
    """Process rows with `HttpRequestProcessorConfig`; with a `folder` it resumes from its checkpoints there.

    By default it sends the rows of a batch one after another, and 4 batches of a block at once. To have as
    many rows in flight as the others, a batch is one row, the 4 is replaced, and all rows are one block.
    Since it resumes by blocks, with a `folder` a block has as many rows as are in flight.
    """
    os.environ["RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY"] = str(concurrency)
    block = concurrency if folder else ALL
    with_ray(pipe, {HTTP: partial(http_processor, url, model)}, block, folder)


def serve_embedding(pipe: Connection, engine_args: dict[str, Any]) -> None:
    """Embed texts with the task `embed`."""
    with_ray(pipe, {ENGINE: partial(engine_processor, engine_args, task="embed")}, BATCH)


def with_ray(
    pipe: Connection,
    processors: Mapping[str, Callable[[], Any]],
    block: int,
    folder: str | None = None,
) -> None:
    environments.overlay()
    import ray

    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    ray.init("local", include_dashboard=False, object_store_memory=STORE, log_to_driver=False)
    if folder is not None:
        resume_by(f"{folder}/checkpoints")
    try:
        ways = {name: partial(through, build(), block, folder) for name, build in processors.items()}
        answer_all(pipe, ways)
    finally:
        ray.shutdown()


def engine_processor(
    engine_args: dict[str, Any], continue_on_error: bool = False, task: str = "generate"
) -> Any:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    arguments = {**engine_args}
    config = vLLMEngineProcessorConfig(
        model_source=arguments.pop("model"),
        task_type=task,
        # As for the other sides, without statistics at each step.
        engine_kwargs={"disable_log_stats": True, **arguments},
        log_engine_metrics=False,
        batch_size=BATCH,
        concurrency=1,
        placement_group_config={"bundles": [{"CPU": 1}]},
        should_continue_on_error=continue_on_error,
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    if task == "embed":
        return build_processor(config, preprocess=to_embed, postprocess=from_embed)
    return build_processor(config, preprocess=to_engine, postprocess=from_engine)


def to_engine(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "sampling_params": json.loads(row["parameters"])}


def from_engine(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "output": row["generated_text"],
        "tokens": row["num_generated_tokens"],
        "began": time.time() - row["time_taken_llm"],
    }


def to_embed(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "pooling_params": {}}


def from_embed(row: dict[str, Any]) -> dict[str, Any]:
    vector, began = row["embeddings"], time.time() - row["time_taken_llm"]
    return {"id": row["id"], "output": vector, "tokens": 0, "began": began}


def http_processor(url: str, model: str) -> Any:
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    def to_http(row: dict[str, Any]) -> dict[str, Any]:
        payload = {"model": model, "prompt": row["prompt"], **json.loads(row["parameters"])}
        return {"payload": payload, "began": time.time()}

    config = HttpRequestProcessorConfig(url=f"{url}/v1/completions", batch_size=1, concurrency=1)
    return build_processor(config, preprocess=to_http, postprocess=from_http)


def from_http(row: dict[str, Any]) -> dict[str, Any]:
    answer = row["http_response"]
    return {
        "id": row["id"],
        "output": answer["choices"][0]["text"],
        "tokens": answer["usage"]["completion_tokens"],
        "began": row["began"],
    }


def resume_by(checkpoints: str) -> None:
    """Enable Ray Data's own checkpoints: rows whose key is in them are left out."""
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig

    context = DataContext.get_current()
    context.checkpoint_config = CheckpointConfig("id", checkpoints, delete_checkpoint_on_success=False)


def through(processor: Any, block: int, folder: str | None, rows: Sequence[Row]) -> Outcome:
    """Run one dataset from file to files, in `folder` or in a temporary one."""
    import ray

    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(folder or scratch) / "rows.parquet", Path(folder or scratch) / "outputs"
        write_source(source, rows, block)
        ordered, started = time.time(), time.perf_counter()
        try:
            blocks = -(-len(rows) // block)
            data = ray.data.read_parquet(str(source), override_num_blocks=blocks)
            processor(data).write_parquet(str(target))
        except Exception as error:  # noqa: BLE001 - the result with a bad row is measured
            return dead(started, error)
        finally:
            remove_groups()
        seconds = time.perf_counter() - started
        return outcome(pq.read_table(target), ordered, seconds)


def write_source(source: Path, rows: Sequence[Row], block: int) -> None:
    """Write the rows in row groups of `block` rows, which Ray Data reads as blocks."""
    columns = {
        "id": range(len(rows)),
        "prompt": [row.prompt for row in rows],
        "parameters": [json.dumps(row.parameters()) for row in rows],
    }
    pq.write_table(pa.table(columns), source, row_group_size=block)


def outcome(found: pa.Table, ordered: float, seconds: float) -> Outcome:
    """The outcome from the output rows; the start-up ends when the first row is sent."""
    startup = min(filter(None, found["began"].to_pylist())) - ordered
    errors = 0
    if "__inference_error__" in found.column_names:
        errors = sum(bool(words) for words in found["__inference_error__"].to_pylist())
    tokens = sum(count or 0 for count in found["tokens"].to_pylist())
    completed = len({*found["id"].to_pylist()}) - errors
    return Outcome(seconds - startup, tokens, completed, errors, startup, stored=len(found))


def remove_groups() -> None:
    """Remove the placement group that a run leaves behind: the next run would wait for its CPU for ever."""
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup, PlacementGroupID

    for name, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))
