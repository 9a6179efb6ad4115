"""Rows over the attempts of one task run: a retry asks for those that failed before, and for no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from prefect.context import TaskRunContext

from vllm_tasks.calls.call import OnError
from vllm_tasks.errors import EngineFailed, RowErrors, ServerUnavailable
from vllm_tasks.rows import RowError

_failed: dict[UUID, RowErrors] = {}
"""By task run: the answers and errors of its rows so far, where another attempt follows."""


def over_attempts(
    ask: Callable[[Sequence[Any], OnError], list[Any]], xs: Sequence[Any], on_error: OnError
) -> list[Any]:
    """`ask(xs, on_error)`; in a retry the rows that were answered before keep their answers."""
    run = TaskRunContext.get()
    if run is None or not getattr(run.task, "retries_rows", False):
        return ask(xs, on_error)
    earlier = _failed.pop(run.task_run.id, None)
    try:
        return _without_answered(ask, xs, on_error, earlier)
    except (RowErrors, EngineFailed, ServerUnavailable) as error:
        kept = error if isinstance(error, RowErrors) else earlier
        if kept and run.task_run.run_count <= run.task.retries:
            _failed[run.task_run.id] = kept
        raise


def _without_answered(
    ask: Callable[[Sequence[Any], OnError], list[Any]],
    xs: Sequence[Any],
    on_error: OnError,
    earlier: RowErrors | None,
) -> list[Any]:
    if earlier is None:
        return ask(xs, on_error)
    places = [error.index for error in earlier.errors]
    results = list(earlier.results)
    for place, result in zip(places, ask([xs[place] for place in places], "return"), strict=True):
        results[place] = replace(result, index=place) if isinstance(result, RowError) else result
    if errors := [result for result in results if isinstance(result, RowError)]:
        raise RowErrors(errors, results)
    return results
