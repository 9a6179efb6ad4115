"""The Prefect tasks: what a flow calls.

Each is a few lines over a function of its own room, whose arguments and errors it has; how Prefect runs it
(names, retries, caching) is in `_prefect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from prefect import Task
from prefect.cache_policies import NO_CACHE, STABLE_TRANSFORMS
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture

from vllm_tasks import tables
from vllm_tasks._prefect.commits import InPrefect, publish
from vllm_tasks._prefect.mapping import ModelTask, RowsTask
from vllm_tasks._prefect.policy import POLICY, table_run_name, validation_run_name
from vllm_tasks._prefect.recording import emit_verdict, save_metric_values
from vllm_tasks._prefect.row_retries import over_attempts
from vllm_tasks._prefect.run_logs import follow
from vllm_tasks.artifacts import show_preview
from vllm_tasks.calls.call import Columns, OnError, Output
from vllm_tasks.calls.prompts import Context
from vllm_tasks.calls.signature import signed_as
from vllm_tasks.datalayer import Datalayer, outputs_name
from vllm_tasks.errors import GateFailed, InvalidCall, TooManyFailed, VllmTasksError
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.placement import check_shards, over_table, routed, target_of, validated
from vllm_tasks.placement.pulled import check_stays
from vllm_tasks.rows import Completion, RowError
from vllm_tasks.tables.arguments import datalayer_of
from vllm_tasks.tables.previews import Preview
from vllm_tasks.tables.report import Report
from vllm_tasks.validation import Validation
from vllm_tasks.validation import run as validation_run
from vllm_tasks.validation.report import Comparison, ValidationReport

Model = VllmAPI | VllmModel
follow()
# Prefect hashes models for `cache_policy=INPUTS`, and would take their random uuid and their masked secrets.
STABLE_TRANSFORMS.update({VllmAPI: VllmAPI.identity, VllmModel: VllmModel.identity})


def _predict(model: Model, x: Any, context: Context = None, **sampling: Any) -> Output:
    """One record in, its answer out; see `VllmAPI.predict`."""
    return routed(model, model.prepare(model.predict, context, sampling)).predict(x)


def _predict_batches(
    model: Model, xs: Sequence[Any], context: Context = None, *, on_error: OnError = "raise", **sampling: Any
) -> list[Output | RowError]:
    """N records in, N answers out in input order; see `VllmAPI.predict_batches`."""
    call = model.prepare(model.predict_batches, context, sampling)
    return over_attempts(routed(model, call).predict_batches, xs, on_error)


def _completions(
    model: Model, xs: Sequence[Any], context: Context = None, *, on_error: OnError = "raise", **sampling: Any
) -> list[Completion | RowError]:
    """N records in, N full results out in input order; see `VllmAPI.completions`."""
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
    """Rows of a table in, one committed output or error per row out; see `vllm_tasks.tables.predict_in_db`.

    In a flow, each commit is a task run, progress and report are artifacts, and the outputs an asset. Where
    the model's hints or the settings name a work pool, a flow run there does it; with `shards=n`, n flow runs
    do it at once, each with an engine of its own. One that dies is made again and goes on.
    """
    if predict_id is not None:
        outputs_name(predict_id)
    target = target_of(model)
    check_shards(shards, target, limit, shard)
    check_stays(datalayer_of(db, model))
    options |= {"predict_id": predict_id, "db": db, "limit": limit, "shard": shard}
    display = InPrefect(model.identifier, predict_id or model.identifier)
    work = tables.predict_in_db if target is None else partial(over_table, target, shards)
    try:
        report: Report = work(model, X, select, display=display, **options)
    except TooManyFailed as error:
        publish(error.report)
        raise
    except VllmTasksError as error:
        # Another attempt would ask rows again that this one has answered: they are no longer to be told
        # from those that it was called for.
        error.repeatable = error.repeatable and not options.get("overwrite") and limit is None
        raise
    publish(report)
    return report


@signed_as(tables.preview, "routed")
def _preview(model: Model, *args: Any, **options: Any) -> Preview:
    """The first `n` rows of a table with their prompts and answers; see `vllm_tasks.tables.previews.preview`.

    They become a table artifact and nothing is committed. Where the model is asked on a work pool, as by
    `predict`, the rows are read and the answers decoded here all the same.
    """
    found = model.preview(*args, routed=partial(routed, model), **options)
    show_preview(found)
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
    """Predict on data sets with known answers, score and record; see `vllm_tasks.validation.run.validate`.

    What was found is shown as artifacts and sent as an event, and goes into the block that `model` was loaded
    from. Raises `GateFailed` after all that when the model is below its limits. With `datasets` no event is
    sent: some of the data sets say nothing of all.
    """
    from vllm_tasks.validation.pages import show

    run = FlowRunContext.get()
    flow_run = str(run.flow_run.id) if run and run.flow_run else None
    target = target_of(model)
    check_stays(datalayer_of(db, model))
    work = found if target is None else partial(validated, target)
    report = work(model, validation, **{**options, "db": db, "datasets": datasets, "flow_run": flow_run})
    show(report)
    save_metric_values(model, report)
    if datasets is None:
        emit_verdict(model, report)
    return passed(report)


def found(model: Model, validation: Validation | None, **options: Any) -> ValidationReport:
    """What `vllm_tasks.validation.run.validate` finds; in a flow, each commit is a task run."""
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
    """Compare what `validate` found of models, and show it; see `vllm_tasks.validation.comparison`."""
    from vllm_tasks.validation.comparison import compare
    from vllm_tasks.validation.pages import show_comparison

    comparison = compare(models, validation, reports, db=db, context=context)
    show_comparison(comparison)
    return comparison


def passed(report: ValidationReport) -> ValidationReport:
    """`report`; raises `GateFailed` with it when the model is below its limits."""
    if not report.passed:
        raise GateFailed(f"{report.model} did not pass: {'; '.join(report.reasons)}", report)
    return report


def report_of(run: PrefectFuture[ValidationReport]) -> ValidationReport:
    """What a submitted `validate` found, whether the model passed or not; raises what kept it from that."""
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
preview = ModelTask(_preview, name="preview", **{**POLICY, "task_run_name": table_run_name})
validate = ModelTask(_validate, name="validate", **{**POLICY, "task_run_name": validation_run_name})
compare = Task(_compare, name="compare", cache_policy=NO_CACHE)


def validate_at_once(model: Model, validation: Validation | None = None, **options: Any) -> ValidationReport:
    """Validate on all data sets at once: a run of the task `validate` for each, all on one engine.

    For use within a flow. All data sets are recorded before one of them fails it, and automations learn of
    them together. Where the model's hints name a work pool, one flow run there validates on all of them.

    Args:
        model: The model to validate.
        validation: Data sets, metrics and limits; the model's own when None.
        **options: Those of `validate`.

    Returns:
        What was found on all data sets.

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
