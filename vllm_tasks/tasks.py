"""The Prefect tasks: what a flow calls.

Each task is a few lines around a function of another module, takes its arguments and raises its errors.
`_prefect/policy.py` says how Prefect runs them: names, retries, caching.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE, STABLE_TRANSFORMS
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.states import Completed

from vllm_tasks import tables
from vllm_tasks._prefect.approval import approved, check_askable
from vllm_tasks._prefect.commits import InPrefect, publish, publish_scores
from vllm_tasks._prefect.mapping import ModelTask, RowsTask, ValidationTask
from vllm_tasks._prefect.policy import (
    POLICY,
    estimate_run_name,
    preview_run_name,
    table_run_name,
    validation_run_name,
)
from vllm_tasks._prefect.recording import emit_verdict, save_metric_values
from vllm_tasks._prefect.row_retries import over_attempts
from vllm_tasks._prefect.run_logs import follow
from vllm_tasks.artifacts import show_estimate, show_preview
from vllm_tasks.calls.call import OnError, Output, check_model
from vllm_tasks.calls.columns import Columns
from vllm_tasks.calls.prompts import Context
from vllm_tasks.calls.signature import signed_as
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.table_names import outputs_name
from vllm_tasks.errors import GateFailed, InvalidCall, TooManyFailed, VllmTasksError
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.placement import check_shards, over_table, routed, target_of, validated
from vllm_tasks.placement.pulled import check_stays
from vllm_tasks.rows import Completion, RowError
from vllm_tasks.tables.arguments import datalayer_of, is_repeatable
from vllm_tasks.tables.estimates import Estimate
from vllm_tasks.tables.previews import Preview
from vllm_tasks.tables.report import Report
from vllm_tasks.validation import Validation
from vllm_tasks.validation import run as validation_run
from vllm_tasks.validation.report import Comparison, ValidationReport

Model = VllmAPI | VllmModel
follow()
# For `cache_policy=INPUTS`, Prefect would hash a model's random uuid and the masked form of its secrets.
STABLE_TRANSFORMS.update({VllmAPI: VllmAPI.identity, VllmModel: VllmModel.identity})


def _predict(model: Model, x: Any, context: Context = None, **sampling: Any) -> Output:
    """Predict the answer to one record, as `VllmAPI.predict` does.

    Args:
        model: The model.
        x: The record, of the form that the model's `signature` names.
        context: Fills `{context}` in the prompt.
        **sampling: Sampling parameters, which override `predict_kwargs`; arguments of the `prompt_func`.

    Returns:
        A text, or the value that `datatype` or `output_schema` make of it; with `n > 1` a list of these.

    Raises:
        RowErrors: The row failed.
        InvalidCall: The call cannot succeed as it is.
        ServerUnavailable: No server could be reached within the grace period.
        EngineFailed: The engine did not start, or died and could not be restarted.
    """
    check_model(model)
    return routed(model, model.prepare(model.predict, context, sampling)).predict(x)


def _predict_batches(
    model: Model, xs: Sequence[Any], context: Context = None, *, on_error: OnError = "raise", **sampling: Any
) -> list[Output | RowError]:
    """Predict the answers to N records, as `VllmAPI.predict_batches` does.

    Args:
        model: The model.
        xs: The records, each as `predict` takes it.
        context: Fills `{context}` in every prompt.
        on_error: "raise" raises `RowErrors` at the end if rows failed; "return" puts a `RowError` at the
            position of each failed row.
        **sampling: As for `predict`.

    Returns:
        N answers in input order, each as `predict` returns it.

    Raises:
        RowErrors: Rows failed; it has all results.
        InvalidCall: The call cannot succeed as it is.
        ServerUnavailable: No server could be reached within the grace period.
        EngineFailed: The engine did not start, or died and could not be restarted.
    """
    check_model(model)
    call = model.prepare(model.predict_batches, context, sampling)
    return over_attempts(routed(model, call).predict_batches, xs, on_error)


def _completions(
    model: Model, xs: Sequence[Any], context: Context = None, *, on_error: OnError = "raise", **sampling: Any
) -> list[Completion | RowError]:
    """Predict N records and return full results, as `VllmAPI.completions` does.

    Args:
        model: The model.
        xs: The records, each as `predict` takes it.
        context: Fills `{context}` in every prompt.
        on_error: As for `predict_batches`.
        **sampling: As for `predict`.

    Returns:
        N completions in input order, as vLLM gave them: neither decoded nor checked against a schema.

    Raises:
        RowErrors: Rows failed; it has all results.
        InvalidCall: The call cannot succeed as it is.
        ServerUnavailable: No server could be reached within the grace period.
        EngineFailed: The engine did not start, or died and could not be restarted.
    """
    check_model(model)
    call = model.prepare(model.completions, context, sampling)
    return over_attempts(routed(model, call).completions, xs, on_error)


@signed_as(tables.predict_in_db, "display")
def _predict_in_db(
    model: Model,
    X: Columns,  # noqa: N803 - the name in the contract
    select: Any,
    *,
    predict_id: str | None = None,
    db: Datalayer | str | None = None,
    limit: int | None = None,
    shards: int = 1,
    shard: tuple[int, int] | None = None,
    **options: Any,
) -> Report:
    """Process the rows of a table and commit one output or one error for each.

    The arguments and errors are those of `vllm_tasks.tables.predict_in_db`. In a flow, each commit is a task
    run, progress and report are artifacts, and the outputs are an asset. If the model's hints or the settings
    name a work pool, the work is done by a flow run there. A flow run that dies is restarted and resumes.

    Args:
        model: The model.
        X: Column with the input; a list of columns; or a mapping of columns to arguments.
        select: A table, or one SELECT statement; a table in memory with `refresh="changed"`.
        shards: Number of flow runs on the work pool that share the rows, each with an engine of its own.

    Returns:
        What was done: counts of rows, tokens and seconds, and where the outputs are.

    Raises:
        InvalidCall: The call cannot succeed as it is; nothing was processed.
        TooManyFailed: More rows failed than `max_failed` allows; everything finished is committed.
        ServerUnavailable: No server could be reached within the grace period.
        EngineFailed: The engine did not start, or died and could not be restarted.
        TablesUnavailable: A lake or database could not be reached or was full.
    """
    check_model(model)
    if predict_id is not None:
        outputs_name(predict_id)
    target = target_of(model)
    check_shards(shards, target, limit, shard)
    check_stays(datalayer_of(db, model))
    options |= {"predict_id": predict_id, "db": db, "limit": limit, "shard": shard}
    display = InPrefect(model.identifier, predict_id or model.identifier)
    work = tables.predict_in_db if target is None else partial(over_table, target, shards)
    try:
        with closing(display):
            report: Report = work(model, X, select, display=display, **options)
    except TooManyFailed as error:
        publish(model, error.report, "failed")
        raise
    except VllmTasksError as error:
        error.repeatable = error.repeatable and is_repeatable(options)
        raise
    publish(model, report, "stopped" if report.stopped_by else "completed")
    return report


@signed_as(tables.preview, "routed")
def _preview(model: Model, *args: Any, **options: Any) -> Preview:
    """Process the first `n` rows of a table and commit nothing; the preview becomes a table artifact.

    The arguments and errors are those of `vllm_tasks.tables.previews.preview`. Rows are read and answers
    decoded here, even if the model's engine is on a work pool.

    Args:
        model: The model.
        X: Column with the input; a list of columns; or a mapping of columns to arguments.
        select: A table, or one SELECT statement, or a table in memory.
        n: Number of rows.

    Returns:
        The rows with their prompts and answers.
    """
    check_model(model)
    found = model.preview(*args, routed=partial(routed, model), **options)
    show_preview(found)
    return found


@signed_as(tables.estimate, "routed")
def _estimate(model: Model, *args: Any, **options: Any) -> Estimate:
    """Estimate the tokens, time and cost of a run by a trial with a few rows; nothing is committed.

    The arguments and errors are those of `vllm_tasks.tables.estimates.estimate`. The estimate becomes an
    artifact. The trial is processed where the model's engine is, also on a work pool.

    Args:
        model: The model.
        X: Column with the input; a list of columns; or a mapping of columns to arguments.
        select: A table, or one SELECT statement, or a table in memory.
        sample: Number of rows of the trial.

    Returns:
        The estimate, with 95 % intervals.
    """
    check_model(model)
    found = model.estimate(*args, routed=partial(routed, model), **options)
    show_estimate(found)
    return found


@signed_as(validation_run.validate, "display", "flow_run")
def _validate(
    model: Model,
    validation: Validation | None = None,
    *,
    db: Datalayer | str | None = None,
    datasets: Sequence[str] | None = None,
    **options: Any,
) -> ValidationReport:
    """Predict on data sets with known answers, score the answers and record the values.

    The arguments and errors are those of `vllm_tasks.validation.run.validate`. The values are displayed as
    artifacts, saved in the block that `model` was loaded from, and sent as an event.

    Args:
        model: The model to validate.
        validation: Data sets, metrics and limits; the model's own when None.
        db: Where predictions and history go; the model's own when None.
        datasets: Identifiers of some of the data sets; no event is sent, since it would be about all of them.
        resume: Whether an interrupted run of the last 12 hours resumes; False processes all rows anew.
        reuse: Score the answers of the last run again, if the model's weights are known to be the same.
        retry_failed: Process the failed rows of an interrupted run again.
        max_failed: Rows that may fail, as a fraction (0.05) or a number (20); None: any number.
        context: Fills `{context}` in every prompt.
        sampling_columns: Columns of the data sets with sampling parameters of the row's own.

    Returns:
        The values by data set and metric, and how they compare with the limits.

    Raises:
        GateFailed: The model is below its limits; everything is recorded, displayed and sent.
    """
    from vllm_tasks.validation.pages import show

    check_model(model)
    run = FlowRunContext.get()
    flow_run = str(run.flow_run.id) if run and run.flow_run else None
    target = target_of(model)
    check_stays(datalayer_of(db, model))
    work = validate_without_gate if target is None else partial(validated, target)
    report = work(model, validation, **{**options, "db": db, "datasets": datasets, "flow_run": flow_run})
    show(report)
    publish_scores(report)
    save_metric_values(model, report)
    if datasets is None:
        emit_verdict(model, report)
    return passed(report)


def validate_without_gate(model: Model, validation: Validation | None, **options: Any) -> ValidationReport:
    """Run `vllm_tasks.validation.run.validate` without the gate; in a flow, each commit is a task run.

    Args:
        model: The model to validate.
        validation: Data sets, metrics and limits; the model's own when None.
        **options: Those of `vllm_tasks.validation.run.validate`.

    Returns:
        The report, whether the model is within its limits or not.
    """
    display = partial(InPrefect, model.identifier)
    return validation_run.validate(model, validation, display=display, **options)


def _compare(
    models: Sequence[Model],
    validation: Validation,
    reports: Sequence[ValidationReport],
    *,
    db: Datalayer | str | None = None,
    context: Context = None,
) -> Comparison:
    """Compare the reports of `validate` for several models; the comparison becomes artifacts.

    Args:
        models: The models; the others are compared with the first.
        validation: The data sets, metrics and limits that they were validated with.
        reports: The report of each model, in the order of `models`.
        db: Where the predictions are; the first model's own when None.
        context: The context that they were validated with.

    Returns:
        The comparison, row by row.

    Raises:
        InvalidCall: Two models have one identifier, or the reports are not over the same rows or not of these
            models and data sets.
    """
    from vllm_tasks.validation.comparison import compare
    from vllm_tasks.validation.pages import show_comparison

    comparison = compare(models, validation, reports, db=db, context=context)
    show_comparison(comparison)
    return comparison


def passed(report: ValidationReport) -> ValidationReport:
    """Return `report` if the model is within its limits.

    Args:
        report: The report of a validation.

    Returns:
        `report` itself.

    Raises:
        GateFailed: The model is below its limits; the error has the report.
    """
    if not report.passed:
        raise GateFailed(f"{report.model} did not pass: {'; '.join(report.reasons)}", report)
    return report


def report_of(run: PrefectFuture[ValidationReport]) -> ValidationReport:
    """Return the report of a submitted `validate`, whether the model passed or not.

    Args:
        run: The future that `validate.submit` returned.

    Returns:
        The report.

    Raises:
        Exception: The validation failed before it had a report.
    """
    found = run.result(raise_on_failure=False)
    if isinstance(found, GateFailed):
        return found.report
    if isinstance(found, BaseException):
        raise found
    return found


predict = RowsTask(_predict, name="predict", **POLICY)
predict_batches = RowsTask(_predict_batches, name="predict-batches", **POLICY)
completions = RowsTask(_completions, name="completions", **POLICY)
predict_in_db = ModelTask(_predict_in_db, name="predict-in-db", **{**POLICY, "task_run_name": table_run_name})
preview = ModelTask(_preview, name="preview", **{**POLICY, "task_run_name": preview_run_name})
estimate = ModelTask(_estimate, name="estimate", **{**POLICY, "task_run_name": estimate_run_name})
validate = ValidationTask(_validate, name="validate", **{**POLICY, "task_run_name": validation_run_name})
compare = Task(_compare, name="compare", cache_policy=NO_CACHE)


def validate_at_once(model: Model, validation: Validation | None = None, **options: Any) -> ValidationReport:
    """Validate on all data sets at once: one run of the task `validate` for each, all on one engine.

    Call it within a flow. All data sets are recorded before the gate fails the flow, and one event covers
    them all. If the model's hints name a work pool, a single flow run there validates on all data sets.

    Args:
        model: The model to validate.
        validation: Data sets, metrics and limits; the model's own when None.
        **options: Those of `validate`, except `datasets`.

    Returns:
        One report of all data sets.

    Raises:
        GateFailed: The model is below its limits; everything is recorded.
        InvalidCall: Neither the call nor the model has a validation.
    """
    chosen = validation or model.validation
    if chosen is None:
        raise InvalidCall(f"{model.identifier!r} has no validation: give one, or save one with the model")
    if target_of(model) is not None:
        report: ValidationReport = validate(model, chosen, **options)
        return report
    names = [dataset.identifier for dataset in chosen.datasets]
    runs = [validate.submit(model, chosen, datasets=[name], **options) for name in names]
    for run in runs:
        run.wait()
    reports = [report_of(run) for run in runs]
    found = tuple(dataset for report in reports for dataset in report.datasets)
    together = ValidationReport(model.identifier, reports[0].fingerprint, found)
    emit_verdict(model, together)
    return passed(together)


def validate_and_ask(
    model: Model, validation: Validation | None = None, *, timeout: int, **options: Any
) -> State[ValidationReport]:
    """Validate as `validate_at_once` does; if the model is below its limits, a person decides.

    Call it within a flow and return what it returns. The flow run pauses until somebody resumes it in the
    Prefect UI with a decision. Meanwhile the model's engine is closed, so that others may use its GPUs.

    Args:
        model: The model to validate.
        validation: Data sets, metrics and limits; the model's own when None.
        timeout: Seconds to wait for the decision.
        **options: Those of `validate`, except `datasets`.

    Returns:
        The state of a flow run that completes, with the report. If the model was approved, its message says
        by whom.

    Raises:
        GateFailed: The model is below its limits, and was rejected or not approved in time.
        InvalidCall: The flow run could not be resumed by anybody; no row was sent.
    """
    check_askable()
    try:
        return Completed(data=validate_at_once(model, validation, **options))
    except GateFailed as failed:
        model.close()
        return approved(failed, timeout)
