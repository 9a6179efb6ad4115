"""A table that is processed on a work pool, by one flow run or one for each shard: the call travels and the
rows do not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from vllm_tasks.calls.arguments import check_spelling
from vllm_tasks.calls.columns import Columns
from vllm_tasks.calls.prompt_func import named_parameters
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.arguments import table_or_statement
from vllm_tasks.datalayer.opening import Store, source_of
from vllm_tasks.errors import InvalidCall, TooManyFailed
from vllm_tasks.placement import payload
from vllm_tasks.placement.parameters import parameters
from vllm_tasks.placement.part import Part
from vllm_tasks.placement.payload import Model, Parameters
from vllm_tasks.placement.runs import Runs
from vllm_tasks.placement.target import Target
from vllm_tasks.tables.arguments import datalayer_of, is_repeatable, share_of_budget
from vllm_tasks.tables.budget import Budget
from vllm_tasks.tables.job import Display
from vllm_tasks.tables.predict import predict_in_db
from vllm_tasks.tables.progress import Progress
from vllm_tasks.tables.report import Report
from vllm_tasks.tables.tally import Tally

MAX_SHARDS = 1000
"""More flow runs at once than this are surely a mistake."""


def check_shards(
    shards: int, target: Target | None, limit: int | None, shard: tuple[int, int] | None
) -> None:
    """Check the argument `shards` of `predict_in_db`.

    Args:
        shards: The number of flow runs.
        target: Where the step runs; None for here.
        limit: The argument `limit`, which shards exclude.
        shard: The argument `shard`, which shards exclude.

    Raises:
        InvalidCall: `shards` is out of range, there is no work pool, or `limit` or `shard` is set.
    """
    if type(shards) is not int or not 1 <= shards <= MAX_SHARDS:
        raise InvalidCall(f"shards={shards!r} must be a whole number from 1 to {MAX_SHARDS}")
    if shards == 1:
        return
    if target is None:
        raise InvalidCall(
            f"shards={shards} are flow runs on a work pool, and the model names none: set compute_kwargs="
            "{'work_pool': NAME}, or VLLM_TASKS_GPU_WORK_POOL for local models; a flow run that is on that "
            "pool already starts no others"
        )
    if limit is not None or shard is not None:
        raise InvalidCall("shards cover a complete table: leave out limit, which tries a few rows, and shard")


def over_table(
    target: Target,
    shards: int,
    model: Model,
    X: Columns,  # noqa: N803 - the name in predict_in_db
    select: Any,
    *,
    db: Datalayer | str | None,
    source: Store | None,
    display: Display,
    **options: Any,
) -> Report:
    """Run `predict_in_db` on a work pool.

    Args:
        target: The deployment whose flow runs do the work.
        shards: Number of flow runs at once, each for a part of the rows.
        model: The model.
        X: As for `predict_in_db`.
        select: As for `predict_in_db`.
        db: As for `predict_in_db`.
        source: As for `predict_in_db`.
        display: Where progress is displayed.
        **options: The other arguments of `predict_in_db`.

    Returns:
        One report for all flow runs.

    Raises:
        VllmTasksError: As `predict_in_db` raises it.
    """
    began = time.monotonic()
    _check_options(model, options)
    select = table_or_statement(select)
    names = f"{model.identifier} - {select[:80]}"
    call = {"work": "table", "X": X, "select": select, "options": options}
    share = share_of_budget(options, shards)
    calls = [{**call, "options": {**options, **share, "shard": (i, shards)}} for i in range(shards)]
    if shards == 1:
        calls = [call]
    parts = [
        Part(
            names if shards == 1 else f"{names} [{i + 1}/{shards}]",
            parameters(call, model, datalayer_of(db, model), source_of(source)),
        )
        for i, call in enumerate(calls)
    ]
    outcomes = Runs(target, parts, repeatable=is_repeatable(options), on_progress=display.progress).outcomes()
    report = _merged(outcomes, options.get("max_failed"), began)
    counts = report.processed, report.succeeded, report.failed, report.completion_tokens
    done = Progress(*counts, report.seconds["total"], report.stopped_by)
    display.progress(done, last=True)
    return report


def _check_options(model: Model, options: Parameters) -> None:
    """Raise `InvalidCall` for a misspelt option before a flow run is created."""
    more = {"shards", *named_parameters(model.prompt_func)}
    check_spelling(options, predict_in_db, model.sampling_names(), more)


def _merged(outcomes: Sequence[str | None], max_failed: float | int | None, began: float) -> Report:
    """One report of all. The first error among them is raised; a `TooManyFailed` has the merged report."""
    reports, failure = [], None
    for outcome in outcomes:
        try:
            if outcome:
                reports.append(payload.value_of(outcome))
        except TooManyFailed as error:
            reports.append(error.report)
            failure = failure or error
    unreported = sum(outcome is None for outcome in outcomes)
    seconds = time.monotonic() - began
    report = Report.of_shards(reports, seconds, shards=len(outcomes), unreported=unreported)
    if failure is not None:
        raise TooManyFailed(str(failure), report) from failure
    at_end = report.stopped_by is None
    if verdict := Budget(max_failed).exceeded(Tally.of(report), at_end=at_end):
        raise TooManyFailed(f"{verdict}; all is committed. Look at `_error` in {report.outputs}", report)
    return report
