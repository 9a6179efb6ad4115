"""What a run over a table did: the `Report`, and the `Tally` that it is counted up in."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from vllm_tasks.printable import printable
from vllm_tasks.rows import Completion, Result, RowError, reason_of

EXAMPLES = 5
"""Keys that are shown for each kind of error."""
WORST = 50
"""Failed rows of which key and message are kept for the table of errors."""
LINE_SHOWN = 200
"""Characters of what is told about a line that could not be read."""
FIRST = 50
"""A run is hopeless when so many rows, the first that were sent, have all failed alike."""
UNASKED = {"prompt", "read"}
"""Kinds of errors of rows that were never sent: they say nothing about those that are."""


@dataclass(frozen=True)
class FailedRow:
    """Why one row has no output. `key` as in the table, with one value per column of the key."""

    key: tuple[Any, ...]
    kind: str
    message: str

    @property
    def reason(self) -> str:
        """The message for logs and pages."""
        return reason_of(self.kind, self.message)


@dataclass(frozen=True)
class ErrorKind:
    """How many rows failed in one way, with the keys of some of them."""

    kind: str
    rows: int
    keys: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Report:
    """What `predict_in_db` did. Rows of the source, counted; tokens as vLLM counts them; seconds.

    `rows` of the source (with the `ids`), None when they were not counted in time; `up_to_date` of them
    needed no asking, None where that is not known: with `limit` or `retry_failed`, or when the run stopped
    early. `processed` = `succeeded` + `failed`, all of them committed. `replaced` of them had an output of an
    earlier prompt, sampling or model, which is gone. `unreadable` lines of the source have no key, hence
    no output; `unreadable_lines` tells of some of them where they are, and why. `chat`: texts were sent
    through the model's chat template, or as plain text.
    `seconds` has `total` and its parts, which overlap: `check` (the call, the source and its keys),
    `first_row` (from the start to the first row that was sent), `read` (source and prompts), `answer`
    (from the first row sent to the last answer), `commit`.
    """

    model: str
    predict_id: str
    source: str
    outputs: str
    fingerprint: str
    rows: int | None
    up_to_date: int | None
    processed: int
    succeeded: int
    failed: int
    truncated: int
    prompt_tokens: int
    completion_tokens: int
    commits: int
    seconds: dict[str, float]
    errors: tuple[ErrorKind, ...] = ()
    worst: tuple[FailedRow, ...] = field(default=(), repr=False)
    served_by: dict[str, str] = field(default_factory=dict)
    replaced: int = 0
    unreadable: int = 0
    unreadable_lines: tuple[str, ...] = ()
    chat: bool | None = None

    @property
    def sent_as(self) -> str:
        """How texts were sent; empty where that is not known."""
        return {True: "chat template", False: "plain text", None: ""}[self.chat]

    @classmethod
    def of_shards(cls, reports: Sequence[Report], total: float) -> Report:
        """That of a run in parts, one or more, `total` seconds long, from those of the parts.

        Counts are added up, but for lines that could not be read, which each part meets. Of a phase, the
        seconds of the part that took longest.
        """
        counts = (
            *("processed", "succeeded", "failed", "truncated", "replaced"),
            *("prompt_tokens", "completion_tokens", "commits"),
        )
        most = max(reports, key=lambda r: r.unreadable)
        longest = {
            phase: max(r.seconds.get(phase, 0.0) for r in reports)
            for report in reports
            for phase in report.seconds
        }
        return replace(
            reports[0],
            rows=_sum([r.rows for r in reports]),
            up_to_date=_sum([r.up_to_date for r in reports]),
            **{name: sum(getattr(r, name) for r in reports) for name in counts},
            seconds={**longest, "total": round(total, 3)},
            errors=_merged([e for r in reports for e in r.errors]),
            worst=tuple(row for r in reports for row in r.worst)[:WORST],
            unreadable=most.unreadable,
            unreadable_lines=most.unreadable_lines,
        )

    def __str__(self) -> str:
        done_before = "" if self.up_to_date is None else f", {self.up_to_date:,} were up to date"
        if self.unreadable:
            done_before += f", {self.unreadable:,} lines could not be read"
        if not self.processed:
            return f"{self.predict_id}: nothing to ask{done_before}{self._lines}; outputs: {self.outputs}"
        if self.replaced:
            done_before += f", {self.replaced:,} outputs of an earlier prompt, sampling or model replaced"
        kinds = "".join(f"; {e.kind}: {e.rows:,}" for e in self.errors)
        return (
            f"{self.predict_id}: {self.succeeded:,} rows answered, {self.failed:,} failed{done_before}, "
            f"{self.completion_tokens:,} tokens in {self.seconds['total']:.1f} s"
            f"{self.sent_as and f' ({self.sent_as})'}{kinds}{self._lines}; outputs: {self.outputs}"
        )

    @property
    def _lines(self) -> str:
        return "".join(f"; {printable(line[:LINE_SHOWN])}" for line in self.unreadable_lines[:EXAMPLES])


@dataclass(frozen=True)
class Progress:
    """Where a run stands. `to_process` is None until the source has been counted."""

    to_process: int | None
    succeeded: int
    failed: int
    tokens: int
    seconds: float

    @classmethod
    def of_parts(cls, parts: Sequence[Progress], *, complete: bool) -> Progress:
        """That of a run in parts, some of which have told; `complete` when all have."""
        return cls(
            _sum([p.to_process for p in parts]) if complete else None,
            sum(p.succeeded for p in parts),
            sum(p.failed for p in parts),
            sum(p.tokens for p in parts),
            max([p.seconds for p in parts], default=1e-3),
        )

    @property
    def done(self) -> int:
        return self.succeeded + self.failed

    @property
    def seconds_left(self) -> float | None:
        if self.to_process is None or not self.done:
            return None
        return max(self.to_process - self.done, 0) * self.seconds / self.done

    def __str__(self) -> str:
        of = "" if self.to_process is None else f" of {self.to_process:,}"
        left = "" if self.seconds_left is None else f", {_duration(self.seconds_left)} left"
        return (
            f"{self.done:,}{of} rows done, {self.failed:,} failed, {self.done / self.seconds:,.1f} rows/s, "
            f"{self.tokens / self.seconds:,.0f} tokens/s{left}"
        )


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02} min" if hours else f"{m} min {s:02} s" if m else f"{s} s"


def _sum(numbers: Sequence[int | None]) -> int | None:
    """None where one is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _merged(errors: Sequence[ErrorKind]) -> tuple[ErrorKind, ...]:
    """One entry for each kind, the most frequent first."""
    kinds = {e.kind: [other for other in errors if other.kind == e.kind] for e in errors}
    merged = [
        ErrorKind(kind, sum(e.rows for e in same), tuple(key for e in same for key in e.keys)[:EXAMPLES])
        for kind, same in kinds.items()
    ]
    return tuple(sorted(merged, key=lambda e: -e.rows))


@dataclass
class Tally:
    """Counts up finished rows; used by the committing thread, `read` and timings also by others."""

    started: float = field(default_factory=time.monotonic)
    first_sent: float | None = None
    last_answer: float | None = None
    read: int = 0
    succeeded: int = 0
    failed: int = 0
    truncated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    commits: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    keys: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    worst: list[FailedRow] = field(default_factory=list)
    rows: int | None = None
    """Of the source, once they have been counted."""
    replaced: int = 0
    unreadable: int = 0
    unreadable_lines: list[str] = field(default_factory=list)
    _first: set[tuple[Any, ...]] = field(default_factory=set)
    """Of the `FIRST` rows that were sent, those without an outcome."""
    _sent: int = 0
    """How many rows were in `_first` at any time."""

    @classmethod
    def of(cls, report: Report) -> Tally:
        """That of a run that has ended."""
        return cls(
            read=report.processed,
            succeeded=report.succeeded,
            failed=report.failed,
            kinds={e.kind: e.rows for e in report.errors},
            keys={e.kind: list(e.keys) for e in report.errors},
            worst=list(report.worst),
            rows=report.rows,
            unreadable=report.unreadable,
            unreadable_lines=list(report.unreadable_lines),
        )

    def begin(self, rows: int, sent: Iterable[tuple[Any, ...]]) -> None:
        """So many rows were read, of which these keys are `sent`, in this order; before any is finished."""
        self.read += rows
        first = list(islice(sent, FIRST - self._sent))
        self._first.update(first)
        self._sent += len(first)

    @property
    def hopeless(self) -> bool:
        """Whether all that is finished has failed in one way, and among it the rows that were sent first."""
        if self.done < FIRST or self.succeeded or len(self.kinds) != 1 or self._first:
            return False
        return not self.kinds.keys() <= UNASKED or self.done == self.read

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase `name`."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun

    def count(self, key: tuple[Any, ...], answer: Result, outcome: Result) -> None:
        """`answer` is what the engine said, `outcome` the same unless it could not be decoded."""
        self._first.discard(key)
        if isinstance(answer, Completion):
            self.prompt_tokens += answer.prompt_tokens or 0
            self.completion_tokens += answer.completion_tokens or 0
            self.truncated += any(c.finish_reason == "length" for c in answer.choices)
        if not isinstance(outcome, RowError):
            self.succeeded += 1
            return
        self.failed += 1
        self.kinds[outcome.kind] = self.kinds.get(outcome.kind, 0) + 1
        keys = self.keys.setdefault(outcome.kind, [])
        if len(self.worst) < WORST or len(keys) < EXAMPLES:  # of a rare kind, too
            self.worst.append(FailedRow(key, outcome.kind, outcome.message))
        if len(keys) < EXAMPLES:
            keys.append(key)

    @property
    def done(self) -> int:
        return self.succeeded + self.failed

    def progress(self, to_process: int | None) -> Progress:
        since = self.first_sent or self.started
        seconds = max(time.monotonic() - since, 1e-3)
        return Progress(to_process, self.succeeded, self.failed, self.completion_tokens, seconds)

    def timings(self) -> dict[str, float]:
        """Seconds, with the phases that are known only at the end."""
        timings = {"total": time.monotonic() - self.started, **self.seconds}
        if self.first_sent is not None:
            timings["first_row"] = self.first_sent - self.started
            timings["answer"] = (self.last_answer or time.monotonic()) - self.first_sent
        return {name: round(seconds, 3) for name, seconds in timings.items()}

    def errors(self) -> tuple[ErrorKind, ...]:
        by_rows = sorted(self.kinds.items(), key=lambda item: -item[1])
        return tuple(ErrorKind(kind, rows, tuple(self.keys[kind])) for kind, rows in by_rows)
