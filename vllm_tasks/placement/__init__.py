"""Steps that run on a work pool, where the model's engine is; their outcome comes back to the caller.

Only the engine needs GPUs. So prompts are made and answers decoded where the step is called: rows travel as
finished prompts and come back as answers. For a table, the call travels and the rows do not.
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
from vllm_tasks.calls.prompt_func import named_parameters
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
from vllm_tasks.tables.arguments import datalayer_of, is_repeatable, share_of_budget
from vllm_tasks.tables.budget import Budget
from vllm_tasks.tables.job import Display
from vllm_tasks.tables.predict import predict_in_db
from vllm_tasks.tables.report import Progress, Report, Tally
from vllm_tasks.validation import Validation
from vllm_tasks.validation.report import ValidationReport

logger = logging.getLogger(__name__)

PARAMETER_OVERHEAD = 1024
"""Bytes in the parameters of a flow run beside its call: references, names, quotes."""
MAX_SHARDS = 1000
"""More flow runs at once than this are surely a mistake."""


def routed(model: Model, call: Call) -> Call:
    """Return `call`, processed on the model's work pool if it has one.

    Args:
        model: The model; its hints or the settings name the pool.
        call: A call of this model.

    Returns:
        `call` itself if the step runs here, else a copy that sends its requests to the pool.

    Raises:
        InvalidCall: The pool does not exist, or it would drop one of the hints.
    """
    if (target := target_of(model)) is None:
        return call
    return replace(call, answerer=lambda requests: _on_pool(target, model, requests))


def _on_pool(target: Target, model: Model, requests: Sequence[Request | RowError]) -> list[Result]:
    """The results of `requests`, processed by a flow run on `target`; errors among them stay as they are."""
    sent = [request for request in requests if isinstance(request, Request)]
    if not sent:
        return [request for request in requests if isinstance(request, RowError)]
    rows = storage.store(
        {"prompts": [request.prompt for request in sent], "sampling": dict(sent[0].sampling)}
    )
    try:
        call = {"work": "rows", "rows": rows}
        part = Part(f"{model.identifier} - {len(sent):,} rows", parameters(call, model, None))
        (outcome,) = Runs(target, [part], repeatable=True).outcomes()
    finally:
        storage.discard(rows)
    path = payload.answers_path(outcome)
    try:
        payload.value_of(outcome)
    except VllmTasksError as error:
        try:
            error.results = _results(path, requests)
        except VllmTasksError as lost:  # what failed first is what the caller has to know
            logger.warning("the answers of the rows that were processed could not be loaded: %s", lost)
        raise error
    return cast(list[Result], _results(path, requests))


def _results(path: str | None, requests: Sequence[Request | RowError]) -> list[Result | None] | None:
    """The answers that the storage has at `path`, merged with the rows that have no prompt."""
    if path is None:
        return None
    answers = iter(payload.results_of(storage.load(path)))
    storage.discard(path)
    found = [request if isinstance(request, RowError) else next(answers) for request in requests]
    # The flow run counted only the rows that were sent to it.
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


def validated(
    target: Target,
    model: Model,
    validation: Validation | None,
    *,
    db: Datalayer | str | None,
    **options: Any,
) -> ValidationReport:
    """Run `vllm_tasks.validation.run.validate` on a work pool.

    Args:
        target: The deployment whose flow run does the work.
        model: The model; its `metric_values` are updated.
        validation: Data sets, metrics and limits; the model's own when None.
        db: As for `validate`.
        **options: The other arguments of `validate`.

    Returns:
        The report, whether the model is within its limits or not.

    Raises:
        VllmTasksError: As `validate` raises it.
    """
    parameter = payload.validation_parameter(validation or model.validation)
    call = {"work": "validation", "validation": parameter, "options": options}
    part = Part(f"validate {model.identifier}", parameters(call, model, datalayer_of(db, model)))
    (outcome,) = Runs(target, [part], repeatable=True).outcomes()
    report: ValidationReport = payload.value_of(outcome)
    model.metric_values.update(report.metric_values)
    return report


def parameters(
    call: Parameters, model: Model, db: Datalayer | None, source: Datalayer | None = None
) -> Parameters:
    """The parameters of the thin flow: references to blocks, and all else as one JSON text.

    It is a text because Prefect would take the `$ref` of a JSON Schema for a block.
    """
    references: Parameters = {}
    for name, parameter in (
        ("model", payload.model_parameter(model)),
        ("db", payload.db_parameter(db)),
        ("source", payload.db_parameter(source)),
    ):
        if parameter is not None and "$ref" in parameter:
            references[name] = parameter
        else:
            call = {**call, name: parameter}
    call["kind"] = type(model).__name__
    try:
        text = json.dumps(call, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidCall(
            f"the arguments of a step on a work pool must be plain data (JSON): {error}"
        ) from error
    _check_size(text, call)
    return {"call": text, **references}


def _check_size(text: str, call: Parameters) -> None:
    """Raise `InvalidCall` for parameters that Prefect's server would refuse."""
    most = get_current_settings().server.api.max_parameter_size
    if (size := len(json.dumps(text)) + PARAMETER_OVERHEAD) <= most:
        return
    parts = {**call.get("options", {}), **{n: v for n, v in call.items() if n != "options"}}
    largest = max(parts, key=lambda name: len(json.dumps(parts[name])))
    raise InvalidCall(
        f"the call has {size:,} bytes, most of them in {largest!r}, and the parameters of a flow run on a "
        f"work pool may have {most:,} (PREFECT_SERVER_API_MAX_PARAMETER_SIZE): keep that argument where the "
        "step runs, such as ids in a table that the SELECT joins, or a context in an artifact's file"
    )


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


def _merged(outcomes: Sequence[str], max_failed: float | int | None, began: float) -> Report:
    """One report of all. The first error among them is raised; a `TooManyFailed` has the merged report."""
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
    at_end = report.stopped_by is None
    if verdict := Budget(max_failed).exceeded(Tally.of(report), at_end=at_end):
        raise TooManyFailed(f"{verdict}; all is committed. Look at `_error` in {report.outputs}", report)
    return report


__all__ = ["check_shards", "over_table", "routed", "target_of", "validated"]
