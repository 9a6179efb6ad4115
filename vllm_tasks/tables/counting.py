"""Counts the rows of a run and reads the facts about its server while it runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import replace

from vllm_tasks.engines import loop, sharing
from vllm_tasks.engines.http.transport import HttpConfig
from vllm_tasks.errors import VllmTasksError
from vllm_tasks.tables.job import Job
from vllm_tasks.tables.run import Run

logger = logging.getLogger(__name__)


class Counted:
    """The size of the job and the facts about its server, found by a thread beside the run."""

    def __init__(self, job: Job, run: Run) -> None:
        self.rows: int | None = None
        self.up_to_date: int | None = None
        self.remaining: int | None = 0
        self._passed_over: int | None = None
        """The number of rows that needed no request when they were counted; None if only a reader knows."""
        self._found: int | None = None
        """The number of `ids` that the source has, in any shard."""
        self.served_by: dict[str, str] = {}
        self._job, self._run = job, run
        self._thread = self._begin(self._count)

    def _begin(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(
            target=copy_context().run, args=(work,), name="vllm-tasks-count", daemon=True
        )
        thread.start()
        return thread

    def _count(self) -> None:
        self._run.begun.wait()  # the first request comes first
        job, run = self._job, self._run
        try:
            if run.tally.first_sent is not None:
                self.served_by = served_by(job.over.call.engine)
            rows, selected = job.tables.count(job.selection)
            if job.selection.shard is None:
                self._found = rows
            elif job.selection.ids is not None and job.selection.shard[0] == 0:  # one of the runs warns
                self._found, _ = job.tables.count(replace(job.selection, shard=None))
        except VllmTasksError as error:  # if it matters, the run fails with it
            logger.warning("the rows to process could not be counted: %s", error)
            return
        self.rows = rows
        if job.selection.refresh != "changed":  # changed rows are known only when they are read
            self._passed_over = rows - selected
            # Rows committed before the count are among those that it did not select.
            to_process = min(selected + run.tally.done, rows)
            run.to_process = to_process if job.limit is None else min(to_process, job.limit)

    def count_remaining(self) -> None:
        """Begin to count the rows that are left after a budget has ended the run."""
        self.remaining = None
        # A table is counted by one thread at a time.
        if not self._thread.is_alive() and self._job.selection.refresh != "changed":
            self._thread = self._begin(self._count_remaining)

    def _count_remaining(self) -> None:
        job = self._job
        try:
            _, left = job.tables.count(replace(job.selection, since=job.started))
        except VllmTasksError as error:
            logger.warning("the remaining rows could not be counted: %s", error)
            return
        self.remaining = left if job.limit is None else min(left, job.limit - self._run.tally.done)

    def compare(self, processed: int, *, complete: bool) -> None:
        """Set `up_to_date` if all rows that were not processed are; warn of `ids` that the source lacks."""
        selection = self._job.selection
        if self.rows is not None and complete and self._job.limit is None and selection.refresh != "failed":
            # The source may have got rows since it was read, which have no output, or lost some.
            others = self.rows - processed
            self.up_to_date = max(0, others if self._passed_over is None else min(others, self._passed_over))
        ids = set(selection.ids or ())
        if self._found is not None and self._found < len(ids):
            logger.warning("%d of %d ids are not in the source", len(ids) - self._found, len(ids))

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)


def served_by(config: sharing.Config) -> dict[str, str]:
    """Facts that the server reports about itself; empty if there is no server."""
    if not isinstance(config, HttpConfig) or config.protocol == "legacy":
        return {}
    return loop.run(sharing.facts(config))
