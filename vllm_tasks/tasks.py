"""The Prefect tasks. All of Prefect's policy (names, retries, caching, what it looks into) is here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from prefect import Task
from prefect.assets import Asset
from prefect.cache_policies import NO_CACHE, STABLE_TRANSFORMS
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.tasks import MaterializingTask
from prefect.transactions import CommitMode, transaction

from vllm_tasks import tables
from vllm_tasks._prefect.mapping import ModelTask, RowsTask
from vllm_tasks._prefect.row_retries import over_attempts
from vllm_tasks.artifacts import ProgressArtifact, asset_key, show_preview, show_report
from vllm_tasks.calls.call import Columns, OnError, Output
from vllm_tasks.calls.prompts import Context
from vllm_tasks.datalayer import Datalayer, outputs_name
from vllm_tasks.datalayer.opening import Store
from vllm_tasks.errors import (
    EngineFailed,
    GateFailed,
    RowErrors,
    ServerUnavailable,
    TablesUnavailable,
    TooManyFailed,
    VllmTasksError,
)
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.placement import check_shards, over_table, place_of, routed, validated
from vllm_tasks.placement.heartbeat import Lifeline
from vllm_tasks.placement.pulled import check_stays
from vllm_tasks.rows import Completion, RowError
from vllm_tasks.tables.arguments import datalayer_of
from vllm_tasks.tables.job import RETRY_DELAYS
from vllm_tasks.tables.previews import Preview
from vllm_tasks.tables.report import Progress, Report
from vllm_tasks.validation import Validation
from vllm_tasks.validation.report import Comparison, ValidationReport

logger = logging.getLogger(__name__)

Model = VllmAPI | VllmModel
# Prefect hashes models for `cache_policy=INPUTS`, and would take their random uuid and their masked secrets.
STABLE_TRANSFORMS.update({VllmAPI: VllmAPI.identity, VllmModel: VllmModel.identity})
KEPT = CommitMode.EAGER
"""Of a task run within a task: it is not called rolled back when that fails later, as its work stays."""
SAVING = threading.Lock()
"""Values of several data sets may be found at once, and go into one block."""


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


def _predict_in_db(
    model: Model,
    X: Columns,  # noqa: N803 - the name in the contract
    select: Any,
    *,
    predict_id: str | None = None,
    primary_id: str | Sequence[str] = "id",
    db: Datalayer | str | None = None,
    source: Store | None = None,
    ids: Sequence[Any] | None = None,
    max_chunk_size: int | None = None,
    overwrite: bool = False,
    refresh: Literal["missing", "changed"] = "missing",
    retry_failed: bool = False,
    max_failed: float | int | None = 0.05,
    limit: int | None = None,
    context: Context = None,
    shards: int = 1,
    shard: tuple[int, int] | None = None,
    same_source: bool = False,
    **sampling: Any,
) -> Report:
    """Rows of a table in, one committed output or error per row out; see `tables.predict`.

    In a flow, each commit is a task run, progress and report are artifacts, and the outputs an asset. Where
    the model's hints or the settings name a work pool, a flow run there does it; with `shards=n`, n flow runs
    do it at once, each with an engine of its own. One that dies is made again and goes on.
    """
    if predict_id is not None:
        outputs_name(predict_id)
    place = place_of(model)
    check_shards(shards, place, limit, shard)
    check_stays(datalayer_of(db, model))
    work = tables.predict_in_db if place is None else partial(over_table, place, shards)
    try:
        report: Report = work(
            model,
            X,
            select,
            predict_id=predict_id,
            primary_id=primary_id,
            db=db,
            source=source,
            ids=ids,
            max_chunk_size=max_chunk_size,
            overwrite=overwrite,
            refresh=refresh,
            retry_failed=retry_failed,
            max_failed=max_failed,
            limit=limit,
            context=context,
            shard=shard,
            same_source=same_source,
            display=InPrefect(model.identifier, predict_id or model.identifier),
            **sampling,
        )
    except TooManyFailed as error:
        publish(error.report)
        raise
    except VllmTasksError as error:
        # Another attempt would ask rows again that this one has answered: they are no longer to be told
        # from those that it was called for.
        error.repeatable = error.repeatable and not overwrite and limit is None
        raise
    publish(report)
    return report


def _preview(
    model: Model,
    X: Columns,  # noqa: N803 - the name in the contract
    select: Any,
    n: int = 5,
    *,
    primary_id: str | Sequence[str] = "id",
    db: Datalayer | str | None = None,
    source: Store | None = None,
    context: Context = None,
    **sampling: Any,
) -> Preview:
    """The first `n` rows of a table with their prompts and answers; see `vllm_tasks.tables.previews.preview`.

    They become a table artifact and nothing is committed. Where the model is asked on a work pool, as by
    `predict`, the rows are read and the answers decoded here all the same.
    """
    options = {"primary_id": primary_id, "db": db, "source": source, "context": context, **sampling}
    found = model.preview(X, select, n, routed=partial(routed, model), **options)
    show_preview(found)
    return found


def _validate(
    model: Model,
    validation: Validation | None = None,
    *,
    db: Datalayer | str | None = None,
    datasets: Sequence[str] | None = None,
    reuse: bool = False,
    retry_failed: bool = False,
    max_failed: float | int | None = 0.05,
    context: Context = None,
) -> ValidationReport:
    """Predict on data sets with known answers, score and record; see `vllm_tasks.validation.run.validate`.

    What was found is shown as artifacts and sent as an event, and goes into the block that `model` was loaded
    from. Raises `GateFailed` after all that when the model is below its limits. With `datasets` no event is
    sent: some of the data sets say nothing of all.
    """
    from vllm_tasks.validation.pages import show

    run = FlowRunContext.get()
    place = place_of(model)
    check_stays(datalayer_of(db, model))
    work = found if place is None else partial(validated, place)
    report = work(
        model,
        validation,
        db=db,
        datasets=datasets,
        reuse=reuse,
        retry_failed=retry_failed,
        max_failed=max_failed,
        context=context,
        flow_run=str(run.flow_run.id) if run and run.flow_run else None,
    )
    show(report)
    save_metric_values(model, report)
    if datasets is None:
        emit_verdict(model, report)
    return passed(report)


def found(model: Model, validation: Validation | None, **options: Any) -> ValidationReport:
    """What `vllm_tasks.validation.run.validate` finds; in a flow, each commit is a task run."""
    from vllm_tasks.validation.run import validate

    return validate(
        model, validation, display=lambda predict_id: InPrefect(model.identifier, predict_id), **options
    )


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


def save_metric_values(model: Model, report: ValidationReport) -> None:
    """Put the values into the saved block that `model` came from, beside those of other data sets."""
    if (block := model._block_document_id) is None:
        return
    with SAVING, get_client(sync_client=True) as client:
        try:
            saved = client.read_block_document(block)
        except ObjectNotFound:
            logger.warning("the block %s is gone: its metric_values are not updated", block)
            return
        # An update has to name the blocks that this one refers to, or Prefect takes them out.
        data: dict[str, Any] = {
            field: {"$ref": {"block_document_id": str(found["block_document"]["id"])}}
            for field, found in saved.block_document_references.items()
        }
        data["metric_values"] = {**saved.data.get("metric_values", {}), **report.metric_values}
        client.update_block_document(block, BlockDocumentUpdate(data=data))


def emit_verdict(model: Model, report: ValidationReport) -> None:
    """Tell Prefect's automations: the event `vllm-tasks.validation.passed` or `.failed`, with the values."""
    emit_event(
        event=f"vllm-tasks.validation.{'passed' if report.passed else 'failed'}",
        resource={
            "prefect.resource.id": f"vllm-tasks.model.{model.identifier}",
            "prefect.resource.name": model.identifier,
        },
        payload={
            "metric_values": report.metric_values,
            "reasons": report.reasons,
            "runs": {dataset.dataset: dataset.run for dataset in report.datasets},
        },
    )


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


class InPrefect:
    """A `Display` in the Prefect UI: a task run for each commit, and a progress artifact.

    Outside of a flow a task run costs more than a commit (116 ms, measured), so it is none there.
    """

    def __init__(self, model: str, predict_id: str) -> None:
        self._model = model
        self._flow = FlowRunContext.get()
        self._progress = ProgressArtifact(predict_id)
        self._lifeline = Lifeline.current()
        self._log = tables.Log()

    def commit(self, name: str, work: Callable[[], None]) -> None:
        if self._flow is None:
            return self._log.commit(name, work)
        held = [work]
        try:
            with transaction(commit_mode=KEPT):
                commit_group(f"{self._model} {name}", lambda: held[0]())
        finally:
            held.clear()  # Prefect keeps the arguments of a task run, which would keep all rows in memory

    def progress(self, progress: Progress, *, last: bool = False) -> None:
        if self._lifeline is None:
            self._progress.show(progress, last=last)
        else:
            self._lifeline.progress(progress)  # it is shown where the step was called
        self._log.progress(progress, last=last)


def _commit_group(name: str, work: Callable[[], None]) -> None:
    """Commit one group of finished rows. A retry repeats the commit and asks nothing again."""
    work()


def _publish(report: Report) -> None:
    """Show the report; the outputs become an asset of the source."""
    show_report(report)


def publish(report: Report) -> None:
    """Show the report; in a flow as a task run that makes the outputs a Prefect asset of their source.

    Not in a flow run that works for a step elsewhere: it is shown there.
    """
    if Lifeline.current() is not None:
        return
    if FlowRunContext.get() is None:
        show_report(report)
        return
    outputs = Asset(key=asset_key(report.outputs))
    task = outputs_task.with_options(assets=[outputs], asset_deps=[asset_key(report.source)])
    with transaction(commit_mode=KEPT):
        task(report)


def run_name(parameters: dict[str, Any]) -> str:
    """Model and number of rows, as the UI shows them; Prefect has resolved the futures by now."""
    xs = parameters.get("xs")
    rows = f" - {len(xs)} rows" if isinstance(xs, Sequence) else ""
    return f"{parameters['model'].identifier}{rows}"


def is_temporary(task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Whether the same call may succeed later.

    Failed rows count only where a user has set the task's `retries`: their engine has retried them already.
    """
    error = state.result(raise_on_failure=False)
    if isinstance(error, RowErrors):
        return getattr(task, "retries_rows", False)
    if not isinstance(error, VllmTasksError) or not error.repeatable:
        return False
    return isinstance(error, ServerUnavailable | TablesUnavailable) or (
        isinstance(error, EngineFailed) and error.temporary
    )


def table_run_name(parameters: dict[str, Any]) -> str:
    """Model and source, as the UI shows them."""
    return f"{parameters['model'].identifier} - {str(parameters['select'])[:80]}"


def validation_run_name(parameters: dict[str, Any]) -> str:
    """Model and data sets, as the UI shows them."""
    model, validation, names = (parameters[name] for name in ("model", "validation", "datasets"))
    validation = validation or model.validation
    if names is None and validation is not None:
        names = [dataset.identifier for dataset in validation.datasets]
    return f"{model.identifier} - {', '.join(names or ())[:80]}"


def is_lost(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Whether tables were lost, which may come back."""
    return isinstance(state.result(raise_on_failure=False), TablesUnavailable)


POLICY: dict[str, Any] = {
    "task_run_name": run_name,
    "cache_policy": NO_CACHE,  # a cache key would hash every row
    "retries": 2,
    "retry_delay_seconds": [10, 60],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": is_temporary,
}

predict = RowsTask(_predict, name="predict", **POLICY)
predict_batches = RowsTask(_predict_batches, name="predict-batches", **POLICY)
completions = RowsTask(_completions, name="completions", **POLICY)
predict_in_db = ModelTask(_predict_in_db, name="predict-in-db", **{**POLICY, "task_run_name": table_run_name})
preview = ModelTask(_preview, name="preview", **{**POLICY, "task_run_name": table_run_name})
validate = ModelTask(_validate, name="validate", **{**POLICY, "task_run_name": validation_run_name})
compare = Task(_compare, name="compare", cache_policy=NO_CACHE)
commit_group = Task(
    _commit_group,
    name="commit-group",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=list(RETRY_DELAYS),
    retry_condition_fn=is_lost,
)
outputs_task = MaterializingTask(
    _publish, name="outputs", assets=["vllm://outputs"], materialized_by="vllm", cache_policy=NO_CACHE
)
