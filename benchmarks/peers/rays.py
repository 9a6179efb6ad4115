"""Ray Data LLM: its engine processor and its HTTP processor, from a Parquet file to Parquet files.

A run is one dataset. Its engine lives as long as the run, so each run has a start-up: until the first
row is in the engine, told by the time that the processor says a row took.
"""

from __future__ import annotations

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
"""Rows of a batch: Ray Data LLM's default for its engine. At most 8 are in the engine: 256 rows."""
STORE = 256 * 2**20
"""Bytes of Ray's object store: the rows of a run are a few hundred KiB."""


def serve_engine(pipe: Connection, engine_args: dict[str, Any]) -> None:
    """Answer rows by `vLLMEngineProcessorConfig`, as it is by default and with `should_continue_on_error`."""
    ways = {ENGINE: False, TOLERANT: True}
    with_ray(
        pipe,
        {name: partial(engine_processor, engine_args, tolerant) for name, tolerant in ways.items()},
        first_row_in_engine,
    )


def serve_http(pipe: Connection, url: str, model: str, concurrency: int, folder: str | None = None) -> None:
    """Answer rows by `HttpRequestProcessorConfig`; in a `folder` of before it resumes by its checkpoints."""
    with_ray(pipe, {HTTP: partial(http_processor, url, model, concurrency)}, None, folder)


Started = Callable[[pa.Table], float]
"""From what came out, the `time.time()` at which the work began."""


def with_ray(
    pipe: Connection,
    processors: Mapping[str, Callable[[], Any]],
    began: Started | None,
    folder: str | None = None,
) -> None:
    environments.overlay("ray")
    import ray

    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    ray.init("local", include_dashboard=False, object_store_memory=STORE, log_to_driver=False)
    if folder is not None:
        resume_by(f"{folder}/checkpoints")
    try:
        ways = {name: partial(through, build(), began, folder) for name, build in processors.items()}
        answer_all(pipe, ways)
    finally:
        ray.shutdown()


def engine_processor(engine_args: dict[str, Any], continue_on_error: bool = False) -> Any:
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    arguments = {**engine_args}
    config = vLLMEngineProcessorConfig(
        model_source=arguments.pop("model"),
        # As the other sides have it: no statistics at each step.
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
    return build_processor(config, preprocess=to_engine, postprocess=from_engine)


def to_engine(row: dict[str, Any]) -> dict[str, Any]:
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": row["max_tokens"]}
    return {"prompt": row["prompt"], "sampling_params": sampling}


def from_engine(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "output": row["generated_text"],
        "tokens": row["num_generated_tokens"],
        "began": time.time() - row["time_taken_llm"],
    }


def first_row_in_engine(found: pa.Table) -> float:
    """Not before the true time: a row is seen here a little after its end."""
    first: float = min(found["began"].to_pylist())
    return first


def http_processor(url: str, model: str, concurrency: int) -> Any:
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    def to_http(row: dict[str, Any]) -> dict[str, Any]:
        sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": row["max_tokens"]}
        return {"payload": {"model": model, "prompt": row["prompt"], **sampling}}

    config = HttpRequestProcessorConfig(url=f"{url}/v1/completions", batch_size=1, concurrency=concurrency)
    return build_processor(config, preprocess=to_http, postprocess=from_http)


def from_http(row: dict[str, Any]) -> dict[str, Any]:
    answer = row["http_response"]
    return {
        "id": row["id"],
        "output": answer["choices"][0]["text"],
        "tokens": answer["usage"]["completion_tokens"],
    }


def resume_by(checkpoints: str) -> None:
    """Ray Data's own: rows whose key is there are left out."""
    from ray.data import DataContext
    from ray.data.checkpoint import CheckpointConfig

    context = DataContext.get_current()
    context.checkpoint_config = CheckpointConfig("id", checkpoints, delete_checkpoint_on_success=False)


def through(processor: Any, began: Started | None, folder: str | None, rows: Sequence[Row]) -> Outcome:
    """A dataset from file to files, in a folder of its own if none is given."""
    import ray

    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(folder or scratch) / "rows.parquet", Path(folder or scratch) / "outputs"
        write_source(source, rows)
        ordered, started = time.time(), time.perf_counter()
        try:
            processor(ray.data.read_parquet(str(source))).write_parquet(str(target))
        except Exception as error:  # noqa: BLE001 - what it does to a bad row is what is asked
            return dead(started, error)
        finally:
            remove_groups()
        seconds = time.perf_counter() - started
        return outcome(pq.read_table(target), ordered, seconds, began)


def write_source(source: Path, rows: Sequence[Row]) -> None:
    """As many row groups as batches, so that reading can overlap with the work."""
    columns = {
        "id": range(len(rows)),
        "prompt": [row.prompt for row in rows],
        "max_tokens": [row.max_tokens for row in rows],
    }
    pq.write_table(pa.table(columns), source, row_group_size=BATCH)


def outcome(found: pa.Table, ordered: float, seconds: float, began: Started | None) -> Outcome:
    startup = began(found) - ordered if began else 0.0
    errors = 0
    if "__inference_error__" in found.column_names:
        errors = sum(bool(words) for words in found["__inference_error__"].to_pylist())
    tokens = sum(count or 0 for count in found["tokens"].to_pylist())
    answered = len({*found["id"].to_pylist()}) - errors
    return Outcome(seconds - startup, tokens, answered, errors, startup, stored=len(found))


def remove_groups() -> None:
    """A run leaves its placement group behind, with a CPU that the next one would wait for."""
    from ray.util import placement_group_table, remove_placement_group
    from ray.util.placement_group import PlacementGroup, PlacementGroupID

    for name, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(name)))
