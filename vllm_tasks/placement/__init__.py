"""Steps that run on a work pool: the model's engine is there, the outcome comes back here.

What needs GPUs is the engine, so rows travel as finished prompts and come back as answers: prompts are made
and answers decoded where the step is called. A table's rows do not travel at all, but the call does.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from prefect.settings import get_current_settings

from vllm_tasks.calls.arguments import check_spelling
from vllm_tasks.calls.call import Call, Columns
from vllm_tasks.calls.prompts import named_parameters
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.arguments import table_or_statement
from vllm_tasks.datalayer.opening import Store, source_of
from vllm_tasks.errors import InvalidCall, TooManyFailed, VllmTasksError
from vllm_tasks.placement import payload, storage
from vllm_tasks.placement.part import Part
from vllm_tasks.placement.payload import Model, Parameters
from vllm_tasks.placement.runs import Runs
from vllm_tasks.placement.target import Target, target_of
from vllm_tasks.rows import Request, Result, RowError
from vllm_tasks.tables.arguments import datalayer_of
from vllm_tasks.tables.budget import Budget
from vllm_tasks.tables.job import Display
from vllm_tasks.tables.predict import predict_in_db
from vllm_tasks.tables.report import Progress, Report, Tally
from vllm_tasks.validation import Validation
from vllm_tasks.validation.report import ValidationReport

logger = logging.getLogger(__name__)

OF_A_PARAMETER = 1024
"""Bytes of the parameters of a flow run beside its call: references, names, quotes."""
MOST_SHARDS = 1000
"""More flow runs at once than this are surely a mistake."""


def routed(model: Model, call: Call) -> Call:
    """`call` of `model`, answered on its work pool where it has one."""
    if (target := target_of(model)) is None:
        return call
    return replace(call, answerer=lambda requests: _answered(target, model, requests))


def _answered(target: Target, model: Model, requests: Sequence[Request | RowError]) -> list[Result]:
    asked = [request for request in requests if isinstance(request, Request)]
    if not asked:
        return [request for request in requests if isinstance(request, RowError)]
    rows = storage.store(
        {"prompts": [request.prompt for request in asked], "sampling": dict(asked[0].sampling)}
    )
    try:
        call = {"work": "rows", "rows": rows}
        part = Part(f"{model.identifier} - {len(asked):,} rows", parameters(call, model, None))
        (outcome,) = Runs(target, [part], repeatable=True).outcomes()
    finally:
        storage.discard(rows)
    results = _results(payload.answered_in(outcome), requests)
    try:
        payload.value_of(outcome)
    except VllmTasksError as error:
        error.results = results
        raise
    return cast(list[Result], results)


def _results(answered: str | None, requests: Sequence[Request | RowError]) -> list[Result | None] | None:
    """What was `answered`, among the rows that became no request."""
    if answered is None:
        return None
    answers = iter(payload.results_of(storage.stored(answered)))
    storage.discard(answered)
    found = [request if isinstance(request, RowError) else next(answers) for request in requests]
    # There a row has its place among those that travelled.
    return [replace(r, index=i) if isinstance(r, RowError) else r for i, r in enumerate(found)]


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
    """`predict_in_db` on `target`, in `shards` flow runs at once; their report is one. Raises as it does."""
    began = time.monotonic()
    _check_options(model, options)
    select = table_or_statement(select)
    names = f"{model.identifier} - {select[:80]}"
    call = {"work": "table", "X": X, "select": select, "options": options}
    calls = [{**call, "options": {**options, "shard": (i, shards)}} for i in range(shards)]
    if shards == 1:
        calls = [call]
    parts = [
        Part(
            names if shards == 1 else f"{names} [{i + 1}/{shards}]",
            parameters(call, model, datalayer_of(db, model), source_of(source)),
        )
        for i, call in enumerate(calls)
    ]
    repeatable = not options.get("overwrite") and options.get("limit") is None
    outcomes = Runs(target, parts, repeatable=repeatable, shown=display.progress).outcomes()
    report = _together(outcomes, options.get("max_failed"), began)
    done = Progress(
        report.processed, report.succeeded, report.failed, report.completion_tokens, report.seconds["total"]
    )
    display.progress(done, last=True)
    return report


def _check_options(model: Model, options: Parameters) -> None:
    """What is misspelt is told before a flow run is made for it."""
    more = {"shards", *named_parameters(model.prompt_func)}
    check_spelling(options, predict_in_db, model.sampling_target(), more)


def validated(
    target: Target,
    model: Model,
    validation: Validation | None,
    *,
    db: Datalayer | str | None,
    **options: Any,
) -> ValidationReport:
    """`validate` on `target`. Raises as it does, `GateFailed` not."""
    told = payload.validation_parameter(validation or model.validation)
    call = {"work": "validation", "validation": told, "options": options}
    part = Part(f"validate {model.identifier}", parameters(call, model, datalayer_of(db, model)))
    (outcome,) = Runs(target, [part], repeatable=True).outcomes()
    report: ValidationReport = payload.value_of(outcome)
    model.metric_values.update(report.metric_values)
    return report


def parameters(
    call: Parameters, model: Model, db: Datalayer | None, source: Datalayer | None = None
) -> Parameters:
    """Of the thin flow. All but references is one text: Prefect takes a JSON Schema's `$ref` for a block."""
    references: Parameters = {}
    for name, told in (
        ("model", payload.model_parameter(model)),
        ("db", payload.db_parameter(db)),
        ("source", payload.db_parameter(source)),
    ):
        if told is not None and "$ref" in told:
            references[name] = told
        else:
            call = {**call, name: told}
    call["kind"] = type(model).__name__
    try:
        text = json.dumps(call, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidCall(f"what travels to another flow run must be plain data (JSON): {error}") from error
    _check_size(text, call)
    return {"call": text, **references}


def _check_size(text: str, call: Parameters) -> None:
    """Raise `InvalidCall` for parameters that Prefect's server would refuse."""
    size, most = len(json.dumps(text)) + OF_A_PARAMETER, get_current_settings().server.api.max_parameter_size
    if size <= most:
        return
    parts = {**call.get("options", {}), **{n: v for n, v in call.items() if n != "options"}}
    largest = max(parts, key=lambda name: len(json.dumps(parts[name])))
    raise InvalidCall(
        f"the call has {size:,} bytes, most of them {largest!r}, and the parameters of a flow run on a work "
        f"pool may have {most:,} (PREFECT_SERVER_API_MAX_PARAMETER_SIZE): keep it where the step runs, such "
        "as ids in a table that the SELECT joins, or a context in an artifact's file"
    )


def check_shards(
    shards: int, target: Target | None, limit: int | None, shard: tuple[int, int] | None
) -> None:
    """Raises `InvalidCall` for no number of shards, no pool for them, and what is of a whole run."""
    if type(shards) is not int or not 1 <= shards <= MOST_SHARDS:
        raise InvalidCall(f"shards={shards!r} must be a whole number from 1 to {MOST_SHARDS}")
    if shards == 1:
        return
    if target is None:
        raise InvalidCall(
            f"shards={shards} are flow runs on a work pool, and the model names none: compute_kwargs="
            "{'work_pool': NAME}, or VLLM_TASKS_GPU_WORK_POOL for local models; a flow run that is on that "
            "pool already makes none"
        )
    if limit is not None or shard is not None:
        raise InvalidCall("shards spread a whole table: leave out limit, which tries a few rows, and shard")


def _together(outcomes: Sequence[str], max_failed: float | int | None, began: float) -> Report:
    """One report of all; the first failure among them is raised, `TooManyFailed` with all reports."""
    reports, failure = [], None
    for outcome in filter(None, outcomes):
        try:
            reports.append(payload.value_of(outcome))
        except TooManyFailed as error:
            reports.append(error.report)
            failure = failure or error
    report = Report.of_shards(reports, time.monotonic() - began)
    if failure is not None:
        raise TooManyFailed(str(failure), report) from failure
    if verdict := Budget(max_failed).exceeded(Tally.of(report), at_end=True):
        raise TooManyFailed(f"{verdict}; all is committed. Look at `_error` in {report.outputs}", report)
    return report


__all__ = ["check_shards", "over_table", "routed", "target_of", "validated"]
