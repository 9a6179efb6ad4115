"""A run from the rows of a table to committed outputs: source, engine and writer work side by side.

A reader thread turns rows into requests and hands them to the engine; the engine loop completes them in
any order; the calling thread decodes finished rows and commits them in groups. A group consists of rows
that finished together, not of rows that were read together, so a long row delays no other. The reader
pauses while too much is pending or uncommitted, so that memory does not grow with the table.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

from vllm_tasks.datalayer.selection import SourceRow, Writer
from vllm_tasks.engines import sharing
from vllm_tasks.engines.batching import sending_order
from vllm_tasks.engines.loop import Tasks
from vllm_tasks.engines.stopping import raise_if_stopped
from vllm_tasks.errors import InvalidCall, VllmTasksError
from vllm_tasks.rows import Request, Result, RowError
from vllm_tasks.tables.job import Display, Job
from vllm_tasks.tables.keys import display_key, key_range
from vllm_tasks.tables.open_rows import OpenRows, bytes_of_answer, bytes_of_request
from vllm_tasks.tables.output_rows import Finished, OutputRows
from vllm_tasks.tables.source_rows import Prompted, SourceRows
from vllm_tasks.tables.tally import Tally

logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT = 2.0
"""Seconds that a stopping run waits for its requests to end, and then again for its reader. Finished rows
must be committed within 10 s after the stop."""
Arrived = tuple[SourceRow, str, Request | None, Result, int]
"""A row with the hash of its input, its request if the outputs keep it, its answer, and the bytes of both."""
Commit = Callable[[str, Callable[[], None]], None]
"""Commits a group of this name by calling a function, perhaps more than once."""


@dataclass(frozen=True)
class Failed:
    """The error of another thread that ends the run."""

    error: BaseException


class Run:
    """One pass over the selected rows."""

    def __init__(self, job: Job, writer: Writer, display: Display, tally: Tally) -> None:
        self.job = job
        self.writer = writer
        self.display = display
        self.tally = tally
        self.to_process: int | None = None
        self.begun = threading.Event()
        self._open = OpenRows()
        self._source = SourceRows(job, self._open, tally)
        self._outputs = OutputRows(job, writer, tally)
        self._queue: queue.SimpleQueue[Arrived | Failed | None] = queue.SimpleQueue()
        self._requests = Tasks()
        self._all_read = False
        self._group: list[Finished] = []
        self._group_size = 0
        self._group_since = self._last_commit = self._first_answer = 0.0

    @property
    def is_committed(self) -> bool:
        """Whether all rows that are counted are committed."""
        return not self._group

    def run(self) -> str | None:
        """Process and commit rows until all are done or a budget is spent; returns why the run has failed, or
        None.

        Whatever ends the run early (a failed engine, Ctrl-C, a signal), finished rows are committed first.
        """
        reader = threading.Thread(
            target=copy_context().run, args=(self._read,), name="vllm-tasks-reader", daemon=True
        )
        try:
            reader.start()
            verdict = self._commit_as_it_comes()
            if self.tally.stopped_by:
                self._end(reader)
                self._finish_group(self.display.commit)
        except BaseException:
            self._end(reader)
            self._save()
            raise
        self._end(reader)
        if self.tally.stopped_by:
            self._log_end(logging.INFO, f"stopped by {self.tally.stopped_by}")
        elif verdict and (lost := self._save()):
            raise lost
        return verdict

    # ------------------------------------------------------------------ source to engine

    def _read(self) -> None:
        try:
            for rows, size in self._source.slices():
                self._hand_over(rows, size)
                if self._open.stopped:
                    break
        except BaseException as error:  # noqa: BLE001 - handed to the thread that runs the job
            self._queue.put(Failed(error))
        self._queue.put(None)
        self.begun.set()

    def _hand_over(self, rows: Sequence[Prompted], size: int) -> None:
        sent = [(row, digest, request) for row, digest, request in rows if isinstance(request, Request)]
        capacity = (
            self._requests.start(lambda: sharing.capacity(self.job.over.call.engine)).result() if sent else 0
        )
        uncommitted = capacity + 2 * self.job.commit_policy.most + len(rows)
        if not self._open.wait_for_capacity(capacity + len(rows), uncommitted, size):
            return
        keys = [row.key for row, _, _ in rows]
        if (twice := self._open.read(keys, size)) is not None:
            raise InvalidCall(
                f"the source changed while it was read: the key {display_key(twice)!r:.200} came twice; "
                "correct it and run it again to resume"
            )
        self.tally.begin(len(keys), (sent[i][0].key for i in sending_order([r for _, _, r in sent])))
        for row, digest, request in rows:
            if isinstance(request, RowError):
                self._finish(row, digest, None, request)
        if sent:
            self.tally.first_sent = self.tally.first_sent or time.monotonic()
            answers = self._requests.start(lambda: self._answer(sent))
            answers.add_done_callback(lambda future: self._end_of_slice(future, size))
            self.begun.set()

    async def _answer(self, rows: Sequence[tuple[SourceRow, str, Request]]) -> None:
        def done(i: int, result: Result) -> None:
            row, digest, request = rows[i]
            self._finish(row, digest, request if keeps_request else None, result)

        keeps_request = self.job.over.decoder.kept.needs_request
        requests = [request for _, _, request in rows]
        call, follow_up = self.job.over.call, self.job.over.decoder.follow_up
        await sharing.generate(call.engine, requests, call.max_batch_size, done, follow_up)

    def _finish(self, row: SourceRow, digest: str, request: Request | None, result: Result) -> None:
        size = bytes_of_answer(result) + (bytes_of_request(request) if request else 0)
        self._queue.put((row, digest, request, result, size))
        self._open.completed(size)

    def _end_of_slice(self, future: Future[Any], size: int) -> None:
        self._open.sent(size)
        if not future.cancelled() and (error := future.exception()):
            self._queue.put(Failed(error))

    # ------------------------------------------------------------------ answers to commits

    def _commit_as_it_comes(self) -> str | None:
        while not (self._all_read and not self._open.keys):
            raise_if_stopped()
            for item in self._news():
                self._take(item)
            if verdict := self.job.budget.exceeded(self.tally, at_end=False):
                return verdict
            open_rows = len(self._open.keys) > len(self._group) or not self._all_read
            if open_rows and (limit := self.job.budget.spent(self.tally)):
                self.tally.stopped_by = limit
                return None
            idle = self._all_read and not self._open.pending and self._queue.empty()
            if self._group and (idle or self._is_due()):
                self._commit_group(self.display.commit)
            self.display.progress(self.tally.progress(self.to_process))
        return None

    def _is_due(self) -> bool:
        if self.job.commit_policy.is_full(len(self._group), self._group_size):
            return True
        redo, now = self._group[0].row.redo, time.monotonic()
        ages = now - self._group_since, now - self._last_commit, now - self._first_answer
        return self.job.commit_policy.is_due(len(self._group), *ages, redo=redo)

    def _news(self) -> Iterator[Arrived | Failed | None]:
        """Items that have arrived, after a short wait; no more than a full group takes."""
        try:
            yield self._queue.get(timeout=0.2)
            while not self.job.commit_policy.is_full(len(self._group), self._group_size):
                yield self._queue.get_nowait()
        except queue.Empty:
            return

    def _take(self, item: Arrived | Failed | None) -> None:
        if item is None:
            self._all_read = True
        elif isinstance(item, Failed):
            raise item.error
        else:
            if not self._group:
                self._group_since = time.monotonic()
                self._first_answer = self._first_answer or self._group_since
            self._group.append(self._outputs.of(*item))
            self._group_size += self._group[-1].size
            self.tally.last_answer = time.monotonic()

    def _commit_group(self, commit: Commit) -> None:
        group, size = self._group, self._group_size
        keys = [finished.row.key for finished in group]
        redo = {finished.row.key for finished in group if finished.row.redo}
        rows = [row for finished in group for row in finished.outputs]

        def work() -> None:
            # A concurrent run may have begun the same outputs, from another source, since `check_job`.
            self.writer.commit(rows, redo, None if self.tally.commits else self.job.check_source)
            # Immediately after the commit: an interrupt from here on must find nothing to commit again.
            self._group, self._group_size = [], 0
            self._last_commit = time.monotonic()
            self.tally.commits += 1
            self._open.committed(keys, size)

        with self.tally.phase("commit"):
            commit(key_range(keys), work)

    # ------------------------------------------------------------------ the end

    def _end(self, reader: threading.Thread) -> None:
        """Stop reading and sending."""
        self._open.stop()
        self.begun.set()
        self._requests.end(SHUTDOWN_TIMEOUT)
        if reader.is_alive():  # else it has not started, and finds that the run has stopped
            reader.join(SHUTDOWN_TIMEOUT)

    def _finish_group(self, commit: Commit) -> None:
        """Commit the rows that are finished."""
        while not self._queue.empty():
            item = self._queue.get_nowait()
            if item is not None and not isinstance(item, Failed):
                with suppress(InvalidCall):  # a key that the table cannot hold must not cost other rows
                    self._take(item)
        if self._group:
            self._commit_group(commit)

    def _save(self) -> VllmTasksError | None:
        """Commit the finished rows now, in one attempt; returns the error if that failed."""
        lost = None
        try:
            self._finish_group(lambda _name, work: work())
        except VllmTasksError as error:
            logger.warning("%d finished rows could not be committed: %s", len(self._group), error)
            lost = error
        self._log_end(logging.WARNING, "stopped")
        return lost

    def _log_end(self, level: int, how: str) -> None:
        next_time = "run it again to resume from there"
        if self.job.selection.refresh == "all":
            next_time = "run again with overwrite=True, it processes all rows"
        logger.log(
            level,
            "%s: %s rows of this run are committed, %d cancelled; %s",
            how,
            f"{self.tally.done - len(self._group):,}",
            len(self._open.keys),
            next_time,
        )
