"""How Prefect runs the tasks: their names, caching and retries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from vllm_tasks.errors import EngineFailed, RowErrors, ServerUnavailable, TablesUnavailable, VllmTasksError
from vllm_tasks.validation import Validation


def run_name(parameters: dict[str, Any]) -> str:
    """Return the model and the number of rows, as the UI displays them; futures are resolved by then."""
    xs = parameters.get("xs")
    rows = f" - {len(xs)} rows" if isinstance(xs, Sequence) else ""
    return f"{_name_of(parameters['model'])}{rows}"


def table_run_name(parameters: dict[str, Any]) -> str:
    """Return the model and the source, as the UI displays them."""
    select = parameters["select"]
    # A table in memory would show its rows.
    named = str(select) if isinstance(select, str | os.PathLike) else f"a {type(select).__name__}"
    return f"{_name_of(parameters['model'])} - {named[:80]}"


def preview_run_name(parameters: dict[str, Any]) -> str:
    """Return what the task does, the model and the source."""
    return f"preview {table_run_name(parameters)}"


def estimate_run_name(parameters: dict[str, Any]) -> str:
    """Return what the task does, the model and the source."""
    return f"estimate {table_run_name(parameters)}"


def validation_run_name(parameters: dict[str, Any]) -> str:
    """Return what the task does, the model and the data sets."""
    model, validation, names = (parameters[name] for name in ("model", "validation", "datasets"))
    validation = validation or getattr(model, "validation", None)
    if names is None and isinstance(validation, Validation):
        names = [dataset.identifier for dataset in validation.datasets]
    return f"validate {_name_of(model)} - {', '.join(names or ())[:80]}"


def _name_of(model: Any) -> str:
    """Return the name of a model. Anything else gets one too: its run fails, with the reason."""
    return str(getattr(model, "identifier", type(model).__name__))


def is_temporary(task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Return whether the same call may succeed later.

    Failed rows count only if a user has set the task's `retries`: the engine has retried them already.
    """
    error = state.result(raise_on_failure=False)
    if isinstance(error, RowErrors):
        return getattr(task, "retries_rows", False)
    if not isinstance(error, VllmTasksError) or not error.repeatable:
        return False
    return isinstance(error, ServerUnavailable | TablesUnavailable) or (
        isinstance(error, EngineFailed) and error.temporary
    )


def is_lost(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Return whether the connection to tables was lost, which may come back."""
    return isinstance(state.result(raise_on_failure=False), TablesUnavailable)


POLICY: dict[str, Any] = {
    "task_run_name": run_name,
    "cache_policy": NO_CACHE,  # a cache key would hash every row
    "retries": 2,
    "retry_delay_seconds": [10, 60],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": is_temporary,
}
