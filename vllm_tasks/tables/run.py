"""Rows of a table to committed outputs: source, engine and writer side by side.

A reader thread turns rows into requests and hands them to the engine; the engine loop answers them in
any order; the calling thread decodes what is finished and commits it in groups. A group is made of
what finished, not of what was read together, so that a long row holds up nobody. The reader stops
while too much is unanswered or uncommitted, so that memory does not grow with the table.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from vllm_tasks.calls.call import TableCall
from vllm_tasks.canonical import input_hash
from vllm_tasks.datalayer.selection import POSITION, Key, Row, Selection, SourceRow, Tables, Writer
from vllm_tasks.engines import sharing
from vllm_tasks.engines.batching import sending_order
from vllm_tasks.engines.loop import Tasks
from vllm_tasks.engines.stopping import raise_if_stopped
from vllm_tasks.errors import InvalidCall, TablesUnavailable, VllmTasksError
from vllm_tasks.printable import printable
from vllm_tasks.rows import Completion, Request, Result, RowError
from vllm_tasks.tables.budget import Budget
from vllm_tasks.tables.commit_policy import Pace
from vllm_tasks.tables.earlier import holds_others
from vllm_tasks.tables.open_rows import Open, bytes_of_answer, bytes_of_request
from vllm_tasks.tables.report import Progress, Tally

logger = logging.getLogger(__name__)

ASKED_TOGETHER = 512
"""Rows that are folded and put in order together."""
RETRY_DELAYS = 1, 5, 15, 30
"""Seconds before each new attempt to reach lost tables."""
HASTE = 2.0
"""Seconds that a stopping run waits for its requests to end, and again for its reader: of 10 s, within which
what is finished must be committed."""
KEY_SHOWN = 100
"""Characters of a key in names and logs."""
MADE_TOGETHER = 64
"""Rows whose prompts are made at once, and are in memory beyond what `open_rows.HELD` counts."""
SLICE = 2**20
"""Bytes of prompts that are handed over together: with many more, one slow row would keep those of all the
others in memory. `ASKED_TOGETHER` rows of usual width are less."""
ERROR_KEPT = 4000
"""Characters of a row's error in its output."""


class Display(Protocol):
    """Where a run is shown, and who repeats its commits."""

    def commit(self, name: str, work: Callable[[], None]) -> None:
        """Do `work`, again after a `TablesUnavailable` as `RETRY_DELAYS` say."""

    def progress(self, progress: Progress, *, last: bool = False) -> None:
        """Called often; shows it when the last time is a while ago, and the `last` one in any case."""


@dataclass(frozen=True)
class Job:
    """All that a run needs, checked."""

    over: TableCall
    tables: Tables
    selection: Selection
    stamp: Row
    """Columns that are the same in all output rows."""
    pace: Pace
    budget: Budget
    limit: int | None
    source: str | None
    """What the rows are of; see `datalayer.source_id`. None where outputs are not told apart by it."""
    same_source: bool
    """Whether outputs of another source go on."""
    started: datetime
    _began: float = field(default_factory=time.monotonic)

    @property
    def now(self) -> datetime:
        """The time by the clock as it was at the start: when that is set back under the run, rows committed
        since must not seem older than the run."""
        return self.started + timedelta(seconds=time.monotonic() - self._began)

    @classmethod
    def of(
        cls,
        over: TableCall,
        tables: Tables,
        selection: Selection,
        pace: Pace,
        budget: Budget,
        limit: int | None,
        source: str | None = None,
        *,
        same_source: bool = False,
    ) -> Job:
        """A job that starts now."""
        stamp = {
            "_model": over.model_name,
            "_uuid": over.call.uuid,
            "_fingerprint": over.fingerprint,
            "_source": source,
        }
        return cls(
            over, tables, selection, stamp, pace, budget, limit, source, same_source, datetime.now(UTC)
        )


Hashed = tuple[SourceRow, str]
"""A row with the hash of its input."""
Prompted = tuple[SourceRow, str, Request | RowError]
"""A row, without its values, with the hash of its input and what it is asked."""


Arrived = tuple[SourceRow, str, Result, int]
"""A row with the hash of its input, its answer and how large that is."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A row of the source with the rows that its answer became."""

    row: SourceRow
    outputs: list[Row]
    size: int
    """Bytes of the answer."""


@dataclass(frozen=True)
class Failed:
    """Why the run cannot go on, from another thread."""

    error: BaseException


class Run:
    """One pass over the selected rows."""

    def __init__(self, job: Job, writer: Writer, display: Display, tally: Tally) -> None:
        self.job = job
        self.writer = writer
        self.display = display
        self.tally = tally
        self.to_ask: int | None = None
        self.begun = threading.Event()
        self._open = Open()
        self._queue: queue.SimpleQueue[Arrived | Failed | None] = queue.SimpleQueue()
        self._asks = Tasks()
        self._all_read = False
        self._group: list[Finished] = []
        self._group_size = 0
        self._group_since = self._last_commit = self._first_answer = 0.0

    def run(self) -> str | None:
        """Ask and commit until all is done; returns why it stopped early, None when it did not.

        Whatever ends it early (an engine that fails, Ctrl-C, a signal): what is finished by then is
        committed first.
        """
        reader = threading.Thread(target=self._read, name="vllm-tasks-reader", daemon=True)
        reader.start()
        try:
            verdict = self._commit_as_it_comes()
        except BaseException:
            self._end(reader)
            self._save()
            raise
        self._end(reader)
        if verdict and (lost := self._save()):
            raise lost
        return verdict

    # ------------------------------------------------------------------ source to engine

    def _read(self) -> None:
        try:
            for rows in self._wanted_rows():
                for group in self._slices(rows):
                    self._hand_over(*group)
                    if self._open.stopped:
                        break
                if self._open.stopped:
                    break
        except BaseException as error:  # noqa: BLE001 - handed to the thread that runs the job
            self._queue.put(Failed(error))
        self._queue.put(None)
        self.begun.set()

    def _wanted_rows(self) -> Iterator[list[Hashed]]:
        """Rows to ask, each with the hash of its input; stops at the limit."""
        left = self.job.limit
        for selected in self._selected_rows():
            with self.tally.phase("read"):
                rows = [(row, input_hash(row.values)) for row in selected]
            if self.job.selection.refresh == "changed":
                rows = [(row, digest) for row, digest in rows if row.input_hash != digest]
            if left is not None:
                rows = rows[:left]
                left -= len(rows)
                self._refuse_trial(row for row, _ in rows)
            if rows:
                yield rows
            if left == 0:
                return

    def _selected_rows(self) -> Iterator[list[SourceRow]]:
        """The source's rows; opened again where it left off when its connection is lost."""
        selection, size = self.job.selection, max(ASKED_TOGETHER, self.job.over.call.max_batch_size or 0)
        handled: set[Key] = set()
        failures = 0
        while True:
            try:
                for rows in self.job.tables.rows(selection, size):
                    failures = 0
                    self._count_unreadable()  # before the rows: with a `limit`, nobody may ask for more
                    yield [row for row in rows if row.key not in handled]
                self._count_unreadable()
                return
            except TablesUnavailable as error:
                if failures == len(RETRY_DELAYS):
                    raise
                logger.warning("the source was lost, reading on in %d s: %s", RETRY_DELAYS[failures], error)
                self._open.wait(RETRY_DELAYS[failures])
                failures += 1
            # In this order: a row that is committed in between is in one of the two.
            handled = self._open.snapshot()
            selection = replace(selection, since=self.job.started)

    def _count_unreadable(self) -> None:
        found = self.job.tables.unreadable()
        self.tally.unreadable, self.tally.unreadable_lines = found.count, list(found.examples)

    def _refuse_trial(self, rows: Iterable[SourceRow]) -> None:
        """A `limit` tries a few rows: it must not replace good outputs of another fingerprint by the way."""
        job = self.job
        if job.selection.refresh not in ("missing", "changed"):
            return
        if any(row.replaces_earlier for row in rows) and holds_others(job.tables, job.selection):
            raise InvalidCall(
                f"limit={job.limit} would replace outputs of another prompt, sampling or model in "
                f"{job.selection.outputs!r}: to try a few rows, preview(...) commits nothing and predict_id="
                "'...' keeps outputs of their own; without limit, all rows are processed again"
            )

    def _slices(self, rows: Sequence[Hashed]) -> Iterator[tuple[list[Prompted], int]]:
        """The rows with their prompts, in parts that have about `SLICE` bytes at most, with those bytes."""
        part: list[Prompted] = []
        held = 0
        for start in range(0, len(rows), MADE_TOGETHER):
            some = rows[start : start + MADE_TOGETHER]
            with self.tally.phase("read"):
                requests = self._requests([row for row, _ in some])
            for (row, digest), request in zip(some, requests, strict=True):
                # Its values are in the prompt; kept until the commit, they would be in memory twice.
                part.append((without_values(row), digest, request))
                held += bytes_of_request(request)
                if held >= SLICE:
                    yield part, held
                    part, held = [], 0
        if part:
            yield part, held

    def _requests(self, rows: Sequence[SourceRow]) -> list[Request | RowError]:
        """What the rows are asked; a row that could not be read is its error."""
        made = iter(self.job.over.requests([row.values for row in rows if row.error is None]))
        return [next(made) if row.error is None else RowError("read", row.error) for row in rows]

    def _hand_over(self, rows: Sequence[Prompted], size: int) -> None:
        asked = [(row, digest, request) for row, digest, request in rows if isinstance(request, Request)]
        room = self._asks.start(lambda: sharing.room(self.job.over.call.engine)).result() if asked else 0
        uncommitted = room + 2 * self.job.pace.most + len(rows)
        if not self._open.wait_for_room(room + len(rows), uncommitted, size):
            return
        keys = [row.key for row, _, _ in rows]
        if (twice := self._open.read(keys, size)) is not None:
            raise InvalidCall(
                f"the source changed while it was read: the key {shown_key(twice)!r:.200} came twice; "
                "correct it, and the same call goes on"
            )
        self.tally.begin(len(keys), (asked[i][0].key for i in sending_order([r for _, _, r in asked])))
        for row, digest, request in rows:
            if isinstance(request, RowError):
                self._finish(row, digest, request)
        if asked:
            self.tally.first_sent = self.tally.first_sent or time.monotonic()
            answers = self._asks.start(lambda: self._answer(asked))
            answers.add_done_callback(lambda future: self._end_of_slice(future, size))
            self.begun.set()

    async def _answer(self, rows: Sequence[tuple[SourceRow, str, Request]]) -> None:
        def done(i: int, result: Result) -> None:
            row, digest, _ = rows[i]
            self._finish(row, digest, result)

        requests = [request for _, _, request in rows]
        await sharing.answer(self.job.over.call.engine, requests, self.job.over.call.max_batch_size, done)

    def _finish(self, row: SourceRow, digest: str, result: Result) -> None:
        size = bytes_of_answer(result)
        self._queue.put((row, digest, result, size))
        self._open.answered(size)

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
            idle = self._all_read and not self._open.unanswered and self._queue.empty()
            if self._group and (idle or self._is_due()):
                self._commit_group(self.display.commit)
            self.display.progress(self.tally.progress(self.to_ask))
        return None

    def _is_due(self) -> bool:
        if self.job.pace.is_full(len(self._group), self._group_size):
            return True
        redo, now = self._group[0].row.redo, time.monotonic()
        ages = now - self._group_since, now - self._last_commit, now - self._first_answer
        return self.job.pace.is_due(len(self._group), *ages, redo=redo)

    def _news(self) -> Iterator[Arrived | Failed | None]:
        """What has arrived, waiting for it a moment; not more than a full group takes."""
        try:
            yield self._queue.get(timeout=0.2)
            while not self.job.pace.is_full(len(self._group), self._group_size):
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
            self._group.append(self._finished(*item))
            self._group_size += self._group[-1].size
            self.tally.last_answer = time.monotonic()

    def _finished(self, row: SourceRow, digest: str, answer: Result, size: int) -> Finished:
        """Decode an answer; what cannot be decoded or stored becomes an error of its row."""
        outcome = answer if isinstance(answer, RowError) else self.job.over.decoder.rows(answer)
        outputs = list(self._output_rows(row, digest, answer, outcome))
        for output in outputs:
            if problem := self.writer.unstorable(output):
                outcome = RowError("output", problem)
                outputs = list(self._output_rows(row, digest, answer, outcome))
                self._check_key(row.key, outputs[0])
                break
        self.tally.count(row.key, answer, outcome if isinstance(outcome, RowError) else answer)
        self.tally.replaced += row.replaces_earlier
        return Finished(row, outputs, size)

    def _check_key(self, key: Key, error: Row) -> None:
        """Where not even an error can be written, it is the key that the table cannot hold."""
        if problem := self.writer.unstorable(error):
            raise InvalidCall(
                f"the row with the key {shown_key(key)!r:.200} can have no output: {problem}; leave it out "
                "by a SELECT ... WHERE, or give another primary_id"
            )

    def _commit_group(self, commit: Callable[[str, Callable[[], None]], None]) -> None:
        group, size = self._group, self._group_size
        keys = [finished.row.key for finished in group]
        redo = {finished.row.key for finished in group if finished.row.redo}
        rows = [row for finished in group for row in finished.outputs]

        def work() -> None:
            self.writer.commit(rows, redo)
            # At once: an interrupt from here on finds nothing to commit again.
            self._group, self._group_size = [], 0
            self._last_commit = time.monotonic()
            self.tally.commits += 1
            self._open.committed(keys, size)

        with self.tally.phase("commit"):
            commit(key_range(keys), work)

    def _output_rows(
        self, source: SourceRow, digest: str, answer: Result, outcome: list[tuple[Any, ...]] | RowError
    ) -> Iterator[Row]:
        """The output rows of one source row: one, or with `flatten` one for each item."""
        job = self.job
        row = {
            **dict(zip(job.selection.key, source.key, strict=True)),
            **{column.name: None for column in job.over.decoder.columns},
            **({POSITION: None} if job.over.decoder.flatten else {}),
            "_error": None,
            **_of_answer(answer),
            **job.stamp,
            "_input_hash": digest,
            "_created_at": job.now,
        }
        if isinstance(answer, Completion) and answer.model:
            row["_model"] = answer.model
        if isinstance(outcome, RowError):
            yield {**row, "_error": _storable(f"{outcome.kind}: {outcome.message}")}
            return
        names = [column.name for column in job.over.decoder.columns]
        if not job.over.decoder.flatten:
            yield {**row, **dict(zip(names, outcome[0], strict=True))}
            return
        for position, values in enumerate(outcome):
            yield {**row, **dict(zip(names, values, strict=True)), POSITION: position}
        if not outcome:
            yield row

    # ------------------------------------------------------------------ the end

    def _end(self, reader: threading.Thread) -> None:
        """Read and ask no more."""
        self._open.stop()
        self._asks.end(HASTE)
        reader.join(HASTE)

    def _save(self) -> VllmTasksError | None:
        """Commit what is finished, once and at once; returns why it could not."""
        lost = None
        try:
            while not self._queue.empty():
                item = self._queue.get_nowait()
                if item is not None and not isinstance(item, Failed):
                    with suppress(InvalidCall):  # a key that no table holds must not cost the other rows
                        self._take(item)
            if self._group:
                self._commit_group(lambda _name, work: work())
        except VllmTasksError as error:
            logger.warning("%d finished rows could not be committed: %s", len(self._group), error)
            lost = error
        next_time = "the same call goes on from there"
        if self.job.selection.refresh == "all":
            next_time = "with overwrite=True the same call asks all rows again"
        logger.warning(
            "stopped: %s rows of this run are committed, %d dropped; %s",
            f"{self.tally.done - len(self._group):,}",
            len(self._open.keys),
            next_time,
        )
        return lost


def without_values(row: SourceRow) -> SourceRow:
    """The row without its values."""
    return SourceRow(row.key, (), row.redo, row.input_hash, row.error)


def _of_answer(answer: Result) -> dict[str, Any]:
    if isinstance(answer, RowError):
        return dict.fromkeys(("_finish_reason", "_prompt_tokens", "_completion_tokens", "_seconds"))
    reasons = [choice.finish_reason for choice in answer.choices]
    return {
        "_finish_reason": "length" if "length" in reasons else reasons[0],
        "_prompt_tokens": answer.prompt_tokens,
        "_completion_tokens": answer.completion_tokens,
        "_seconds": answer.seconds,
    }


def _storable(words: str) -> str:
    """Words that any table can hold: without the character 0 and halves of characters, at no great length."""
    if len(words) > ERROR_KEPT:
        words = f"{words[:ERROR_KEPT]}... ({len(words):,} characters)"
    return words.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def key_range(keys: Sequence[Key]) -> str:
    """`first..last` of the keys in a group, for people."""
    try:
        first, last = min(keys), max(keys)
    except (TypeError, ArithmeticError):  # of several types, as SQLite allows, or not a number
        first, last = min(keys, key=repr), max(keys, key=repr)
    if first == last:
        return shown_key(first)
    # What they have in common, such as the run of a validation, tells nothing.
    ends = [
        tuple(a for a, b in zip(key, other, strict=True) if a != b)
        for key, other in ((first, last), (last, first))
    ]
    return "..".join(map(shown_key, ends))


def shown_key(key: Key) -> str:
    """A key for people: the bare value of a single column, as a log may show it and not at any length."""
    text = str(key[0]) if len(key) == 1 else f"({', '.join(map(str, key))})"
    return printable(text if len(text) <= KEY_SHOWN else f"{text[:KEY_SHOWN]}…")
