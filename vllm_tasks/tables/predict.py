"""`predict_in_db`: processes the rows of a table and commits one output or error for each."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Literal

from vllm_tasks.calls.call import Model
from vllm_tasks.calls.columns import Columns
from vllm_tasks.calls.prompts import Context
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.opening import Store, name_of
from vllm_tasks.datalayer.selection import OutputTable
from vllm_tasks.errors import Terminated, TooManyFailed
from vllm_tasks.settings import site_settings
from vllm_tasks.tables.counting import Counted
from vllm_tasks.tables.job import Display, Job
from vllm_tasks.tables.log import Terminal
from vllm_tasks.tables.opening import check_job, open_job
from vllm_tasks.tables.report import Report
from vllm_tasks.tables.run import SHUTDOWN_TIMEOUT, Run
from vllm_tasks.tables.tally import Tally

logger = logging.getLogger(__name__)

COUNT_TIMEOUT = 5.0
"""Seconds that a finished run waits until its source is counted."""


def predict_in_db(
    model: Model,
    X: Columns,  # noqa: N803 - the name in the contract, as in scikit-learn
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
    max_total_tokens: int | None = None,
    max_seconds: float | None = None,
    max_cost: float | None = None,
    prices: Mapping[str, float] | None = None,
    limit: int | None = None,
    context: Context = None,
    shards: int = 1,
    shard: tuple[int, int] | None = None,
    same_source: bool = False,
    sampling_columns: Mapping[str, str] | None = None,
    display: Display | None = None,
    **sampling: Any,
) -> Report:
    """Process the rows of a table and commit one output or one error for each.

    A row is done when it is committed, and only rows that are not done are processed: after any crash, the
    same call resumes where it stopped. Each call finds its rows by a join of the source with the outputs on
    key and fingerprint. Changing anything that decides an answer (model, prompt, sampling, schema) reruns
    every row. Whatever ends a run early, Ctrl-C and SIGTERM included, finished rows are committed.

    Args:
        model: The model that answers.
        X: The column that is the record; a list of columns for signature `*args` or `**kwargs`; or a
            mapping of columns to arguments, by name or by position.
        select: A table, in a lake also a path or a glob in it, or one SELECT statement; or a table in memory
            (pandas, polars, pyarrow or any object with `__arrow_c_stream__`), with `refresh="changed"`.
        predict_id: Names the outputs, `_outputs__<predict_id>`; the model's identifier when None.
        primary_id: The column or columns that identify a row: never NULL, each value once.
        db: Where the outputs are, and the rows unless `source` is given: a `Datalayer` or its URL; the
            model's own when None.
        source: Where the rows are read, if not in `db`: a `Datalayer`, its URL or path, or the name of a
            saved one. It need not be able to keep outputs: MariaDB, `duckdb:///x.duckdb` and any SQLAlchemy
            dialect that streams will do.
        ids: Process only rows with these keys (tuples when the key has several columns).
        max_chunk_size: Rows of a commit group; None: VLLM_TASKS_COMMIT_ROWS, and more when rows are fast.
        overwrite: Process all rows, done or not.
        refresh: `missing` processes rows without an output or error; `changed` also those whose input
            has changed since they were processed.
        retry_failed: Process only the rows that have an error.
        max_failed: How many rows may fail: a fraction (float) or a number (int); None: any number. A run with
            more stops, commits finished rows and raises `TooManyFailed`. Unless any number may fail, it also
            stops when the first 50 rows that were sent all fail alike. Failures that merely arrive before
            answers do not count more.
        max_total_tokens: The run ends when its finished rows have this many tokens, of prompts and answers
            together. Finished rows are committed, rows in flight are cancelled, and the rest is left to the
            next call; the report has `stopped_by` and `remaining`. In a flow, a call with a budget is not
            retried: another attempt would spend it again.
        max_seconds: The same at this time after the start of the call, engine start included.
        max_cost: The same when this time and these tokens have this cost at `prices`.
        prices: `per_hour` (of the engine, with all its GPUs), `per_million_prompt_tokens`,
            `per_million_completion_tokens`, in any currency; None: those of the site's settings.
        limit: Process at most this many rows. Refused if it would replace outputs of another prompt, sampling
            or model: use `preview`, which commits nothing, to try rows.
        context: Fills `{context}` in every prompt.
        shards: The number of flow runs on the model's work pool that share the rows, each with its own
            engine. The task `vllm_tasks.predict_in_db` starts them; this function refuses more than one.
        shard: (i, n): process only the i-th, from 0, of n parts of the rows, chosen by a hash of their keys.
            n such calls, on as many machines, process the complete table. The task's `shards=n` makes them.
        same_source: Accept outputs of another source whose rows are the same: the table was renamed, or the
            SELECT was edited. Without it, a source other than that of the outputs is refused.
        sampling_columns: Columns with sampling parameters of the row's own, by the parameter's name, such as
            `{"max_tokens": "budget"}`. NULL means the call's own value. They count as input of the row.
        display: Displays the run; None: a live line in a terminal, else the log.
        **sampling: Sampling parameters of this call.

    Returns:
        The counts, timings and errors of the run.

    Raises:
        InvalidCall: The call could not succeed; mostly raised before any work.
        TooManyFailed: More rows failed than `max_failed` allows.
        ServerUnavailable: No server could be reached within the grace period.
        EngineFailed: The engine did not start, or died and did not come back.
        TablesUnavailable: The tables could not be reached or had no space, also after the retries.
    """
    tally = Tally(most_samples=site_settings().report_samples)
    opened = open_job(
        predict_in_db,
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
        max_total_tokens=max_total_tokens,
        max_seconds=max_seconds,
        max_cost=max_cost,
        prices=prices,
        limit=limit,
        context=context,
        shards=shards,
        shard=shard,
        same_source=same_source,
        sampling_columns=sampling_columns,
        **sampling,
    )
    with opened as (name, job, output):
        return commit_answers(name, job, output, display or Terminal(), tally)


def commit_answers(predict_id: str, job: Job, output: OutputTable, display: Display, tally: Tally) -> Report:
    """Process the rows that `job` selects and commit their outputs, as `predict_in_db` does."""
    with tally.phase("check"):
        check_job(job)
    with closing(display):
        verdict, counted = _run(predict_id, job, output, display, tally)
    report = _report(predict_id, job, tally, counted)
    job.over.call.warn_of_truncated(tally.truncated, tally.succeeded)
    if tally.replaced:
        logger.warning(
            "%s: %d outputs of an earlier prompt, sampling or model were replaced", predict_id, tally.replaced
        )
    if verdict:
        raise TooManyFailed(
            f"{verdict}; finished rows are committed. Look at `_error` in {report.outputs}, correct the "
            "cause, and process the failed rows again with retry_failed=True",
            report,
        )
    return report


def _run(
    predict_id: str, job: Job, output: OutputTable, display: Display, tally: Tally
) -> tuple[str | None, Counted]:
    writer = job.tables.writer(job.selection, output)
    run = Run(job, writer, display, tally)
    counted = Counted(job, run)
    try:
        with _sigterm_raises():
            verdict = run.run()
            writer.close()
    except BaseException:
        counted.wait(SHUTDOWN_TIMEOUT)
        if run.is_committed:
            display.stopped(_report(predict_id, job, tally, counted))
        raise
    counted.wait(COUNT_TIMEOUT)
    if tally.stopped_by:
        counted.count_remaining()
        counted.wait(COUNT_TIMEOUT)
        if counted.remaining == 0:  # the last row was finished before the run knew that it was the last
            tally.stopped_by = None
    counted.compare(tally.done, complete=not (verdict or tally.stopped_by))
    if not verdict:
        display.progress(tally.progress(run.to_process), last=True)
        tally.rows = counted.rows
        verdict = job.budget.exceeded(tally, at_end=not tally.stopped_by)
    return verdict, counted


def _report(predict_id: str, job: Job, tally: Tally, counted: Counted) -> Report:
    return Report(
        model=job.over.call.identifier,
        predict_id=predict_id,
        source=job.tables.read_from(name_of(job.selection.select)),
        outputs=job.tables.where(job.selection.outputs),
        fingerprint=job.selection.fingerprint,
        rows=counted.rows,
        up_to_date=counted.up_to_date,
        processed=tally.done,
        succeeded=tally.succeeded,
        failed=tally.failed,
        truncated=tally.truncated,
        prompt_tokens=tally.prompt_tokens,
        completion_tokens=tally.completion_tokens,
        commits=tally.commits,
        seconds=tally.timings(),
        errors=tally.errors(),
        worst=tuple(tally.worst),
        samples=tuple(tally.samples),
        served_by=counted.served_by,
        replaced=tally.replaced,
        unreadable=tally.unreadable,
        unreadable_lines=tuple(tally.unreadable_lines),
        chat=job.over.call.sends_chat(),
        stopped_by=tally.stopped_by,
        remaining=counted.remaining,
        reasked=tally.reasked,
        repaired=tally.repaired,
        to_review=tally.to_review,
        reviews=tuple(tally.reviews),
    )


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, unless someone else (such as Prefect) handles the signal.

    Without this, Python's default action would end the process at once, and finished rows would be lost.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, _frame: object) -> None:
        raise Terminated(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
