"""Rows over the attempts of one task run: a retry processes only the rows that failed before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from prefect.context import TaskRunContext

from vllm_tasks.calls.call import OnError, rows_of
from vllm_tasks.errors import EngineFailed, RowErrors, ServerUnavailable
from vllm_tasks.rows import RowError

_failed: dict[UUID, RowErrors] = {}
"""The answers and errors so far, by the task run that another attempt follows."""


def over_attempts(
    process: Callable[[Sequence[Any], OnError], list[Any]], xs: Sequence[Any], on_error: OnError
) -> list[Any]:
    """Return `process(xs, on_error)`; in a retry, rows that were completed before keep their answers.

    Args:
        process: Processes records; it is called with the failed ones only in a retry.
        xs: The records.
        on_error: As for `predict_batches`.

    Returns:
        The results of all records, in input order.

    Raises:
        RowErrors: Rows failed in this attempt.
    """
    run = TaskRunContext.get()
    if run is None or not getattr(run.task, "retries_rows", False):
        return process(xs, on_error)
    earlier = _failed.pop(run.task_run.id, None)
    try:
        return _only_failed(process, xs, on_error, earlier)
    except (RowErrors, EngineFailed, ServerUnavailable) as error:
        kept = error if isinstance(error, RowErrors) else earlier
        if kept and run.task_run.run_count <= run.task.retries:
            _failed[run.task_run.id] = kept
        raise


def _only_failed(
    process: Callable[[Sequence[Any], OnError], list[Any]],
    xs: Sequence[Any],
    on_error: OnError,
    earlier: RowErrors | None,
) -> list[Any]:
    if earlier is None:
        return process(xs, on_error)
    failed = [error.index for error in earlier.errors]
    rows, results = rows_of(xs), list(earlier.results)  # a column of pandas is indexed by its labels
    for index, result in zip(failed, process([rows[index] for index in failed], "return"), strict=True):
        results[index] = replace(result, index=index) if isinstance(result, RowError) else result
    if errors := [result for result in results if isinstance(result, RowError)]:
        raise RowErrors(errors, results)
    return results
