"""A run over a table in the Prefect UI: a task run for each commit, progress, and the outputs as an asset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from prefect import Task
from prefect.assets import Asset, AssetProperties, add_asset_metadata
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext, TaskRunContext
from prefect.tasks import MaterializingTask
from prefect.transactions import CommitMode, transaction

from vllm_tasks._prefect.policy import is_lost
from vllm_tasks._prefect.recording import emit, emit_reviews
from vllm_tasks.artifacts import (
    ProgressArtifact,
    asset_key,
    page_url,
    report_key,
    show_report,
    validation_key,
)
from vllm_tasks.engines.stopping import pause
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.placement import payload
from vllm_tasks.placement.heartbeat import Heartbeat
from vllm_tasks.tables import Log, Report, Terminal
from vllm_tasks.tables.job import RETRY_DELAYS
from vllm_tasks.tables.progress import Progress
from vllm_tasks.validation.report import ValidationReport

KEPT = CommitMode.EAGER
"""The commit mode of a task run within a task. Its work stays, so Prefect must not mark it as rolled back
if the outer task fails later."""


class InPrefect:
    """A `Display` in the Prefect UI: a task run for each commit, and a progress artifact.

    Outside of a flow a commit is not a task run, which would cost more than the commit (116 ms, measured).
    """

    def __init__(self, model: str, predict_id: str) -> None:
        self._model = model
        self._flow = FlowRunContext.get()
        self._progress = ProgressArtifact(predict_id)
        self._heartbeat = Heartbeat.current()
        self._log = Terminal() if self._flow is None else Log()

    def commit(self, name: str, work: Callable[[], None]) -> None:
        """Call `work`, which commits the group `name`; in a flow, within a task run."""
        if self._flow is None:
            return self._log.commit(name, work)
        held = [work]
        try:
            with transaction(commit_mode=KEPT):
                commit_group(f"{self._model} {name}", lambda: held[0]())
        finally:
            held.clear()  # Prefect keeps the arguments of a task run, and with them all rows in memory

    def progress(self, progress: Progress, *, last: bool = False) -> None:
        """Display `progress`, or send it to the caller of the step by the heartbeat."""
        if self._heartbeat is None:
            self._progress.show(progress, last=last)
        else:
            self._heartbeat.progress(progress)  # the step's caller displays it
        self._log.progress(progress, last=last)

    def stopped(self, committed: Report) -> None:
        """Send the counts to the caller of the step by the heartbeat, in case this run is stopped."""
        if self._heartbeat is not None:
            self._heartbeat.stopped(payload.outcome_of(committed))

    def close(self) -> None:
        self._log.close()


def _commit_group(name: str, work: Callable[[], None]) -> None:
    """Commit one group of finished rows. A retry repeats the commit and processes no row again."""
    run = TaskRunContext.get()
    assert run is not None
    if run.task_run.run_count > 1:
        pause(RETRY_DELAYS[run.task_run.run_count - 2])
    work()


def _publish(report: Report) -> None:
    """Display the report; Prefect records the outputs as an asset that depends on the source."""
    show_report(report)
    add_asset_metadata(asset_key(report.outputs), _counts(report))


def _counts(report: Report) -> dict[str, Any]:
    names = (
        *("predict_id", "model", "fingerprint", "rows", "up_to_date", "processed", "succeeded", "failed"),
        *("truncated", "to_review", "prompt_tokens", "completion_tokens", "stopped_by", "remaining"),
    )
    return {name: getattr(report, name) for name in names}


def publish(
    model: VllmAPI | VllmModel, report: Report, ended: Literal["completed", "stopped", "failed"]
) -> None:
    """Display the report, and send the event `vllm-tasks.predictions.<ended>` for automations.

    Rows that the run has marked for a person are an event of their own, `vllm-tasks.reviews.requested`.
    In a flow, a task run also makes the outputs a Prefect asset of their source. A flow run that works for a
    step elsewhere does none of this: the step's caller does.
    """
    if Heartbeat.current() is not None:
        return
    payload = {**_counts(report), "source": report.source, "outputs": report.outputs}
    emit(f"predictions.{ended}", report.model, payload)
    emit_reviews(model, report)
    if FlowRunContext.get() is None:
        show_report(report)
        return
    outputs = _asset(report.outputs, report_key(report.predict_id))
    task = outputs_task.with_options(assets=[outputs], asset_deps=[asset_key(report.source)])
    with transaction(commit_mode=KEPT):
        task(report)


def publish_scores(report: ValidationReport) -> None:
    """In a flow, make the answers of each data set a Prefect asset whose metadata are their scores."""
    if FlowRunContext.get() is None:
        return
    for dataset in report.datasets:
        metadata = {
            "model": report.model,
            "fingerprint": report.fingerprint,
            "dataset": dataset.dataset,
            "run": dataset.run,
            "rows": dataset.rows,
            "failed": dataset.failed,
            "truncated": dataset.truncated,
            "score": {value.metric: value.value for value in dataset.values},
            "passed": not dataset.reasons,
        }
        answers = _asset(dataset.outputs, validation_key(report.model, dataset.dataset))
        with transaction(commit_mode=KEPT):
            scores_task.with_options(assets=[answers])(answers.key, metadata)


def _asset(location: str, page: str) -> Asset:
    """The asset of a table, which links to the page of the artifact with the key `page`."""
    return Asset(key=asset_key(location), properties=AssetProperties(url=page_url(page)))


commit_group = Task(
    _commit_group,
    name="commit-group",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    retries=len(RETRY_DELAYS),
    retry_delay_seconds=0,  # because Prefect's own wait cannot be stopped; `_commit_group` waits
    retry_condition_fn=is_lost,
)
outputs_task = MaterializingTask(
    _publish,
    name="outputs",
    task_run_name="outputs {report.predict_id}",
    assets=["vllm://outputs"],
    materialized_by="vllm",
    cache_policy=NO_CACHE,
)
scores_task = MaterializingTask(
    add_asset_metadata,
    name="scores",
    task_run_name="scores {metadata[model]} - {metadata[dataset]}",
    assets=["vllm://scores"],
    materialized_by="vllm",
    cache_policy=NO_CACHE,
)
