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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from vllm_tasks import sharing
from vllm_tasks.datalayer.selection import POSITION, Key, Row, Selection, SourceRow, Tables, Writer
from vllm_tasks.errors import InvalidCall, TablesUnavailable, VllmTasksError, printable
from vllm_tasks.fingerprint import input_hash
from vllm_tasks.loop import Tasks
from vllm_tasks.plan import Plan
from vllm_tasks.report import Progress, Tally
from vllm_tasks.rows import Completion, Request, Result, RowError

logger = logging.getLogger(__name__)

ASKED_TOGETHER = 512
"""Rows that are folded and put in order together."""
FULLEST = 16
"""A commit takes what has finished by then, up to so many times the rows that close a group."""
APART = 2.0
"""Seconds between two commits, unless the second one is as full as can be: at a thousand rows a second,
groups of 512 would cost Prefect and the log more than they are worth."""
AT_RISK = 0.1
"""The share of a run's time that a crash may undo: early groups close early, as a small job is one group
otherwise, and all of it would be asked again."""
RETRY_DELAYS = 1, 5, 15, 30
"""Seconds before each new attempt to reach lost tables."""
HASTE = 2.0
"""Seconds that a stopping run waits for its requests to end, and again for its reader: of 10 s, within which
what is finished must be committed."""
SAME_FATE = 50
"""A run whose first rows, so many, all fail alike is hopeless."""
KEY_SHOWN = 100
"""Characters of a key in names and logs."""
FEW = 500
"""A share of failed rows is taken of at least so many."""


@dataclass(frozen=True)
class Pace:
    """When a commit group closes: at `rows` finished rows or `seconds` after its first; early ones sooner."""

    rows: int
    seconds: float
    most: int
    apart: float

    @classmethod
    def of(cls, max_chunk_size: int | None, commit_rows: int, commit_seconds: float) -> Pace:
        """A size that the caller gives is kept; else groups are larger where rows are fast."""
        if max_chunk_size is not None:
            return cls(max_chunk_size, commit_seconds, max_chunk_size, 0.0)
        return cls(commit_rows, commit_seconds, FULLEST * commit_rows, APART)

    def is_due(self, finished: int, age: float, since_commit: float, elapsed: float, *, redo: bool) -> bool:
        """Whether a group of `finished` rows closes now.

        In seconds: the `age` of its first row, the time since the last commit, and since the first answer of
        the run. Where rows are redone, groups are as large as can be: a lake copies each file that one is in.
        """
        patience = self.seconds if redo else min(self.seconds, max(APART, AT_RISK * elapsed))
        if finished >= self.most or age >= patience:
            return True
        return finished >= self.rows and since_commit >= self.apart and not (redo and self.apart)


@dataclass(frozen=True)
class Budget:
    """How many rows may fail: a share of those finished, a count, or None for any number."""

    max_failed: float | int | None

    def exceeded(self, tally: Tally, *, at_end: bool) -> str | None:
        """Why the run must stop, or None."""
        limit = self.max_failed
        if limit is None or not tally.failed:
            return None
        if isinstance(limit, float) and limit >= 1.0:
            return None
        # Rows that become no prompt come before any answer: they say nothing of those that are asked.
        told = tally.kinds.keys() != {"prompt"} or tally.done == tally.read
        if tally.done >= SAME_FATE and tally.failed == tally.done and len(tally.kinds) == 1 and told:
            (kind,) = tally.kinds
            why = printable(tally.worst[0].reason[:300])
            return f"the first {tally.done} rows all failed alike ({kind}: {why})"
        # Rows that fail before they are asked come first, so the share is taken of all that were read.
        base = tally.done if at_end else max(tally.read, FEW)
        allowed = limit * base if isinstance(limit, float) else limit
        if tally.failed <= allowed:
            return None
        most = tally.errors()[0]
        example = next(row.reason for row in tally.worst if row.kind == most.kind)
        return (
            f"{tally.failed:,} of {tally.done:,} rows failed, more than max_failed={limit!r} allows; "
            f"{most.rows:,} of them {most.kind}, as {printable(example[:300])}"
        )


class Display(Protocol):
    """Where a run is shown, and who repeats its commits."""

    def commit(self, name: str, work: Callable[[], None]) -> None:
        """Do `work`, again after a `TablesUnavailable` as `RETRY_DELAYS` say."""

    def progress(self, progress: Progress, *, last: bool = False) -> None:
        """Called often; shows it when the last time is a while ago, and the `last` one in any case.

        May raise to stop the run.
        """


@dataclass(frozen=True)
class Job:
    """All that a run needs, checked."""

    plan: Plan
    tables: Tables
    selection: Selection
    stamp: Row
    """Columns that are the same in all output rows."""
    pace: Pace
    budget: Budget
    limit: int | None
    started: datetime
    _began: float = field(default_factory=time.monotonic)

    @property
    def now(self) -> datetime:
        """The time by the clock as it was at the start: when that is set back under the run, rows committed
        since must not seem older than the run."""
        return self.started + timedelta(seconds=time.monotonic() - self._began)

    @classmethod
    def of(
        cls, plan: Plan, tables: Tables, selection: Selection, pace: Pace, budget: Budget, limit: int | None
    ) -> Job:
        """A job that starts now."""
        stamp = {"_model": plan.model_name, "_uuid": plan.model.uuid, "_fingerprint": plan.fingerprint}
        return cls(plan, tables, selection, stamp, pace, budget, limit, datetime.now(UTC))


Hashed = tuple[SourceRow, str]
"""A row with the hash of its input."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A row of the source with the rows that its answer became."""

    row: SourceRow
    outputs: list[Row]


@dataclass(frozen=True)
class Failed:
    """Why the run cannot go on, from another thread."""

    error: BaseException


@dataclass
class Open:
    """The rows between source and commit; all threads meet here."""

    keys: set[Key] = field(default_factory=set)
    unanswered: int = 0
    stopped: bool = False
    _wanted: tuple[int, int] | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for_room(self, unanswered: int, uncommitted: int) -> bool:
        """Wait until fewer rows than these are open; False when the run stops."""
        with self._changed:
            self._wanted = unanswered, uncommitted
            self._changed.wait_for(self._has_room)
            self._wanted = None
            return not self.stopped

    def wait(self, seconds: float) -> None:
        """Wait so long, or until the run stops."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopped, seconds)

    def _has_room(self) -> bool:
        if self._wanted is None:
            return False
        unanswered, uncommitted = self._wanted
        return self.stopped or (self.unanswered < unanswered and len(self.keys) < uncommitted)

    def _tell(self) -> None:
        if self._has_room():  # not for every row: waking the reader costs more than the row
            self._changed.notify_all()

    def read(self, keys: Collection[Key]) -> Key | None:
        """Add rows; a key that is open already is returned, and none is added then."""
        with self._changed:
            seen: set[Key] = set()
            for key in keys:
                if key in self.keys or key in seen:
                    return key
                seen.add(key)
            self.keys |= seen
            self.unanswered += len(seen)
            return None

    def answered(self) -> None:
        with self._changed:
            self.unanswered -= 1
            self._tell()

    def committed(self, keys: Iterable[Key]) -> None:
        with self._changed:
            self.keys.difference_update(keys)
            self._tell()

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()

    def snapshot(self) -> set[Key]:
        with self._changed:
            return set(self.keys)


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
        self._queue: queue.SimpleQueue[tuple[SourceRow, str, Result] | Failed | None] = queue.SimpleQueue()
        self._asks = Tasks()
        self._all_read = False
        self._group: list[Finished] = []
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
                with self.tally.phase("read"):
                    requests = self.job.plan.requests([row.values for row, _ in rows])
                self._hand_over(rows, requests)
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
            if rows:
                yield rows
            if left == 0:
                return

    def _selected_rows(self) -> Iterator[list[SourceRow]]:
        """The source's rows; opened again where it left off when its connection is lost."""
        selection, size = self.job.selection, max(ASKED_TOGETHER, self.job.plan.model.max_batch_size or 0)
        handled: set[Key] = set()
        failures = 0
        while True:
            try:
                for rows in self.job.tables.rows(selection, size):
                    failures = 0
                    yield [row for row in rows if row.key not in handled]
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

    def _hand_over(self, rows: Sequence[Hashed], requests: Sequence[Request | RowError]) -> None:
        asked = [i for i, request in enumerate(requests) if isinstance(request, Request)]
        room = self._asks.start(lambda: sharing.room(self.job.plan.config)).result() if asked else 0
        uncommitted = room + 2 * self.job.pace.most + len(rows)
        if not self._open.wait_for_room(room + len(rows), uncommitted):
            return
        if (twice := self._open.read([row.key for row, _ in rows])) is not None:
            raise InvalidCall(
                f"the source changed while it was read: the key {shown_key(twice)!r:.200} came twice; "
                "correct it, and the same call goes on"
            )
        self.tally.read += len(rows)
        for row, request in zip(rows, requests, strict=True):
            if isinstance(request, RowError):
                self._finish(*row, request)
        if asked:
            self.tally.first_sent = self.tally.first_sent or time.monotonic()
            mine, theirs = [rows[i] for i in asked], [requests[i] for i in asked]
            self._asks.start(lambda: self._answer(mine, theirs)).add_done_callback(self._tell_failure)
            self.begun.set()

    async def _answer(self, rows: Sequence[Hashed], requests: Sequence[Request | RowError]) -> None:
        def done(i: int, result: Result) -> None:
            self._finish(*rows[i], result)

        await sharing.answer(self.job.plan.config, requests, self.job.plan.model.max_batch_size, done)

    def _finish(self, row: SourceRow, digest: str, result: Result) -> None:
        self._queue.put((row, digest, result))
        self._open.answered()

    def _tell_failure(self, future: Future[Any]) -> None:
        if not future.cancelled() and (error := future.exception()):
            self._queue.put(Failed(error))

    # ------------------------------------------------------------------ answers to commits

    def _commit_as_it_comes(self) -> str | None:
        while not (self._all_read and not self._open.keys):
            for item in self._news():
                self._take(item)
            if verdict := self.job.budget.exceeded(self.tally, at_end=False):
                return verdict
            idle = self._all_read and not self._open.unanswered and self._queue.empty()
            if self._group and (idle or self._is_due()):
                self._commit_group(self.display.commit)
            self.display.progress(self.tally.progress(self.to_ask))
        return self.job.budget.exceeded(self.tally, at_end=True)

    def _is_due(self) -> bool:
        redo, now = self._group[0].row.redo, time.monotonic()
        ages = now - self._group_since, now - self._last_commit, now - self._first_answer
        return self.job.pace.is_due(len(self._group), *ages, redo=redo)

    def _news(self) -> Iterator[tuple[SourceRow, str, Result] | Failed | None]:
        """What has arrived, waiting for it a moment; not more than a full group takes."""
        try:
            yield self._queue.get(timeout=0.2)
            while len(self._group) < self.job.pace.most:
                yield self._queue.get_nowait()
        except queue.Empty:
            return

    def _take(self, item: tuple[SourceRow, str, Result] | Failed | None) -> None:
        if item is None:
            self._all_read = True
        elif isinstance(item, Failed):
            raise item.error
        else:
            if not self._group:
                self._group_since = time.monotonic()
                self._first_answer = self._first_answer or self._group_since
            self._group.append(self._finished(*item))
            self.tally.last_answer = time.monotonic()

    def _finished(self, row: SourceRow, digest: str, answer: Result) -> Finished:
        """Decode an answer; what cannot be decoded or stored becomes an error of its row."""
        outcome = answer if isinstance(answer, RowError) else self.job.plan.decoder.rows(answer)
        outputs = list(self._output_rows(row, digest, answer, outcome))
        for output in outputs:
            if problem := self.writer.unstorable(output):
                outcome = RowError("output", problem)
                outputs = list(self._output_rows(row, digest, answer, outcome))
                self._check_key(row.key, outputs[0])
                break
        self.tally.count(row.key, answer, outcome if isinstance(outcome, RowError) else answer)
        return Finished(row, outputs)

    def _check_key(self, key: Key, error: Row) -> None:
        """Where not even an error can be written, it is the key that the table cannot hold."""
        if problem := self.writer.unstorable(error):
            raise InvalidCall(
                f"the row with the key {shown_key(key)!r:.200} can have no output: {problem}; leave it out "
                "by a SELECT ... WHERE, or give another primary_id"
            )

    def _commit_group(self, commit: Callable[[str, Callable[[], None]], None]) -> None:
        group = self._group
        keys = [finished.row.key for finished in group]
        redo = {finished.row.key for finished in group if finished.row.redo}
        rows = [row for finished in group for row in finished.outputs]

        def work() -> None:
            self.writer.commit(rows, redo)
            self._group = []  # at once: an interrupt from here on finds nothing to commit again
            self._last_commit = time.monotonic()
            self.tally.commits += 1
            self._open.committed(keys)

        with self.tally.phase("commit"):
            commit(key_range(keys), work)

    def _output_rows(
        self, source: SourceRow, digest: str, answer: Result, outcome: list[tuple[Any, ...]] | RowError
    ) -> Iterator[Row]:
        """The output rows of one source row: one, or with `flatten` one for each item."""
        job = self.job
        row = {
            **dict(zip(job.selection.key, source.key, strict=True)),
            **{column.name: None for column in job.plan.decoder.columns},
            **({POSITION: None} if job.plan.decoder.flatten else {}),
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
        names = [column.name for column in job.plan.decoder.columns]
        if not job.plan.decoder.flatten:
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
    """Words that any table can hold: without the character 0 and halves of characters."""
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
