"""The result of a run over a table: the `Report`, and the `Tally` that counts finished rows."""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

from vllm_tasks.printable import printable
from vllm_tasks.rows import Attempted, Completion, Result, RowError, reason_of, without_sender

EXAMPLES = 5
"""Keys that are listed for each kind of error."""
WORST = 50
"""Failed rows whose key and message are kept for the table of errors, and rows for that of reviews."""
SAMPLE_LENGTH = 500
"""Characters of a sample answer that are kept."""
LINE_LENGTH = 200
"""Characters that are logged about a line that could not be read."""
FIRST = 50
"""A run is hopeless when this many rows, the first that were sent, have all failed alike."""
UNSENT = {"prompt", "read"}
"""Kinds of errors of rows that were never sent: they say nothing about the rows that were."""


@dataclass(frozen=True)
class FailedRow:
    """Why one row has no output. `key` has one value for each column of the key, as in the table."""

    key: tuple[Any, ...]
    kind: str
    message: str

    @property
    def reason(self) -> str:
        """The message for logs and pages, without text that the model wrote."""
        return reason_of(self.kind, self.message)

    @property
    def short_reason(self) -> str:
        """The reason without the status and the address of a server."""
        return without_sender(self.reason)


@dataclass(frozen=True)
class ErrorKind:
    """The number of rows that failed in one way, with the keys of some of them."""

    kind: str
    rows: int
    keys: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class ReviewRow:
    """One row that the run marked for a person: the model's label and its probability."""

    key: tuple[Any, ...]
    label: str
    probability: float


@dataclass(frozen=True)
class Sample:
    """One answer of a run, for people to look at: the first choice, or the beginning of a long one."""

    key: tuple[Any, ...]
    answer: str


@dataclass(frozen=True)
class Report:
    """The result of `predict_in_db`. Counts are of source rows, tokens are as vLLM counts them.

    `rows` is the number of rows in the source (with the `ids`), None when they were not counted in time.
    `up_to_date` is how many of them needed no request; None with `limit` or `retry_failed`, or when the run
    stopped early. `processed` = `succeeded` + `failed`, all of them committed. `replaced` is how many of them
    had an output of an earlier prompt, sampling or model, which was removed. `unreadable` is the number of
    source lines without a readable key, which have no output; `unreadable_lines` says where some of them are,
    and why. `stopped_by` names the argument (`max_seconds`, ...) whose limit ended the run before its last
    row; `remaining` is the number of rows that are left to the next run then, None when they were not counted
    in time. `samples` are some answers, as many as VLLM_TASKS_REPORT_SAMPLES says. `chat` is True if texts
    were sent through the model's chat template, False if as plain text. `seconds` has the `total` and its
    parts, which overlap: `check` (the call, the source and its keys), `first_row` (from the start to the
    first row that was sent), `read` (source and prompts), `answer` (from the first row sent to the last
    answer), `commit`.
    `to_review` is how many rows were marked for a person (`review_below` of `Classes`), and `reviews` are
    the least probable of them.
    `unreported_shards` is the number of shards that were cancelled, because another one had failed, and that
    did not report what they had committed by then: no count includes their rows. `reasked` is the number of
    rows with more than one attempt (`repair`, `resample`), and `repaired` how many of them have an output.
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
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    served_by: dict[str, str] = field(default_factory=dict)
    replaced: int = 0
    unreadable: int = 0
    unreadable_lines: tuple[str, ...] = ()
    chat: bool | None = None
    stopped_by: str | None = None
    remaining: int | None = 0
    unreported_shards: int = 0
    reasked: int = 0
    repaired: int = 0
    to_review: int = 0
    reviews: tuple[ReviewRow, ...] = field(default=(), repr=False)

    @property
    def sent_as(self) -> str:
        """How texts were sent: `chat template`, `plain text`, or empty if that is not known."""
        return {True: "chat template", False: "plain text", None: ""}[self.chat]

    @classmethod
    def of_shards(
        cls, reports: Sequence[Report], total: float, *, shards: int, unreported: int = 0
    ) -> Report:
        """Merge the reports of a run that was split into shards.

        Counts are added up, except for unreadable lines, which every shard meets. Each phase has the seconds
        of the shard that took longest.

        Args:
            reports: The reports of the shards, at least one.
            total: Seconds that the complete run took.
            shards: Number of shards; with fewer reports, the rows of the source are not known.
            unreported: Number of shards that may have committed rows, but did not report them.

        Returns:
            The report of the complete run.
        """
        counts = (
            *("processed", "succeeded", "failed", "truncated", "replaced", "to_review"),
            *("prompt_tokens", "completion_tokens", "commits", "reasked", "repaired"),
        )
        most = max(reports, key=lambda r: r.unreadable)
        most_samples = max(len(r.samples) for r in reports)
        longest = {
            phase: max(r.seconds.get(phase, 0.0) for r in reports)
            for report in reports
            for phase in report.seconds
        }
        return replace(
            reports[0],
            rows=None if len(reports) < shards else _sum([r.rows for r in reports]),
            up_to_date=None if len(reports) < shards else _sum([r.up_to_date for r in reports]),
            **{name: sum(getattr(r, name) for r in reports) for name in counts},
            seconds={**longest, "total": round(total, 3)},
            errors=_merged([e for r in reports for e in r.errors]),
            worst=_some_of_each_kind([row for r in reports for row in r.worst]),
            samples=tuple(islice(chain.from_iterable(r.samples for r in reports), most_samples)),
            reviews=tuple(sorted([row for r in reports for row in r.reviews], key=_doubt)[:WORST]),
            unreadable=most.unreadable,
            unreadable_lines=most.unreadable_lines,
            stopped_by=next((r.stopped_by for r in reports if r.stopped_by), None),
            remaining=_sum([r.remaining for r in reports]),
            unreported_shards=unreported,
        )

    def __str__(self) -> str:
        others = "" if self.up_to_date is None else f", {self.up_to_date:,} were up to date"
        if self.to_review:
            others += f", {self.to_review:,} are for review"
        if self.unreadable:
            others += f", {self.unreadable:,} lines could not be read"
        if self.stopped_by:
            rest = "some" if self.remaining is None else f"{self.remaining:,}"
            others += f", stopped by {self.stopped_by} with {rest} rows left"
        if self.reasked:
            others += f", {self.repaired:,} of {self.reasked:,} rows that were attempted again were repaired"
        if self.unreported_shards:
            others += f", without the rows of {self.unreported_shards} cancelled shards, which did not report"
        if not self.processed:
            done = "no row processed" if self.stopped_by else "nothing to process"
            return f"{self.predict_id}: {done}{others}{self._lines}; outputs: {self.outputs}"
        if self.replaced:
            others += f", {self.replaced:,} outputs of an earlier prompt, sampling or model replaced"
        kinds = "".join(f"; {e.kind}: {e.rows:,}" for e in self.errors)
        return (
            f"{self.predict_id}: {self.succeeded:,} rows succeeded, {self.failed:,} failed{others}, "
            f"{self.completion_tokens:,} tokens in {self.seconds['total']:.1f} s"
            f"{self.sent_as and f' ({self.sent_as})'}{kinds}{self._lines}; outputs: {self.outputs}"
        )

    def example_of(self, kind: str) -> str:
        """Return why a row of this kind failed, without the address of a server; empty if none was kept."""
        return next((row.short_reason for row in self.worst if row.kind == kind), "")

    def __repr__(self) -> str:
        return f"<Report of {self}>"

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        from vllm_tasks.tables.notebook import html_of

        return html_of(self)

    @property
    def _lines(self) -> str:
        return "".join(f"; {printable(line[:LINE_LENGTH])}" for line in self.unreadable_lines[:EXAMPLES])


@dataclass(frozen=True)
class Progress:
    """The progress of a run. `to_process` is None until the source has been counted; `stopped_by` is None
    unless a budget has ended the run."""

    to_process: int | None
    succeeded: int
    failed: int
    tokens: int
    seconds: float
    stopped_by: str | None = None

    @classmethod
    def of_parts(cls, parts: Sequence[Progress], *, complete: bool) -> Progress:
        """The sum over the parts of a run that have reported; `complete` when all parts have."""
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
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        if self.stopped_by:
            left = f", stopped by {self.stopped_by}"
        return (
            f"{self.done:,}{of} rows done, {self.failed:,} failed, {self.done / self.seconds:,.1f} rows/s, "
            f"{self.tokens / self.seconds:,.0f} tokens/s{left}"
        )


def duration(seconds: float) -> str:
    """Seconds as text for people."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02} min" if hours else f"{m} min {s:02} s" if m else f"{s} s"


def _sum(numbers: Sequence[int | None]) -> int | None:
    """The sum, None if one of the numbers is not known."""
    known = [number for number in numbers if number is not None]
    return sum(known) if len(known) == len(numbers) else None


def _some_of_each_kind(failed: Sequence[FailedRow]) -> tuple[FailedRow, ...]:
    """The first `WORST` rows, and the first few of each kind: an error quotes the most frequent kind."""
    of_kind: Counter[str] = Counter()
    found: list[FailedRow] = []
    for row in failed:
        of_kind[row.kind] += 1
        if len(found) < WORST or of_kind[row.kind] <= EXAMPLES:
            found.append(row)
    return tuple(found)


def _doubt(row: ReviewRow) -> float:
    return row.probability


def _merged(errors: Sequence[ErrorKind]) -> tuple[ErrorKind, ...]:
    """One entry for each kind of error, the most frequent first."""
    kinds = {e.kind: [other for other in errors if other.kind == e.kind] for e in errors}
    merged = [
        ErrorKind(kind, sum(e.rows for e in same), tuple(key for e in same for key in e.keys)[:EXAMPLES])
        for kind, same in kinds.items()
    ]
    return tuple(sorted(merged, key=lambda e: -e.rows))


@dataclass
class Tally:
    """Counts finished rows. The reading thread writes what is read and sent, the committing one all else."""

    started: float = field(default_factory=time.monotonic)
    first_sent: float | None = None
    last_answer: float | None = None
    read: int = 0
    succeeded: int = 0
    failed: int = 0
    truncated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    """Answers whose tokens the server has not counted."""
    commits: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    keys: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    worst: list[FailedRow] = field(default_factory=list)
    most_samples: int = 0
    """Answers to keep as samples."""
    samples: list[Sample] = field(default_factory=list)
    rows: int | None = None
    """Rows of the source, once they have been counted."""
    stopped_by: str | None = None
    """The argument whose limit has ended the run."""
    replaced: int = 0
    reasked: int = 0
    """Rows with more than one attempt."""
    repaired: int = 0
    """Those of them that have an output."""
    to_review: int = 0
    reviews: list[ReviewRow] = field(default_factory=list)
    """The least probable of them, by probability."""
    unreadable: int = 0
    unreadable_lines: list[str] = field(default_factory=list)
    _first: set[tuple[Any, ...]] = field(default_factory=set)
    """Keys of those among the `FIRST` rows sent that have no outcome yet."""
    _sent: int = 0
    """Number of rows that were ever added to `_first`."""

    @classmethod
    def of(cls, report: Report) -> Tally:
        """The tally of a run that has ended."""
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
        """Count `rows` that were read; `sent` are the keys of those that are sent, in the order of sending.

        To be called before any of them is finished.
        """
        self.read += rows
        first = list(islice(sent, FIRST - self._sent))
        self._first.update(first)
        self._sent += len(first)

    @property
    def hopeless(self) -> bool:
        """Whether all finished rows failed in one way, including the rows that were sent first."""
        if self.done < FIRST or self.succeeded or len(self.kinds) != 1 or self._first:
            return False
        return not self.kinds.keys() <= UNSENT or self.done == self.read

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase `name`."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun

    def count(self, key: tuple[Any, ...], answer: Result, outcome: Result) -> None:
        """Count one row: `answer` is the engine's, `outcome` an error if the answer could not be decoded."""
        self._first.discard(key)
        if isinstance(answer, Completion):
            self.uncounted += answer.prompt_tokens is None or answer.completion_tokens is None
            self.prompt_tokens += answer.prompt_tokens or 0
            self.completion_tokens += answer.completion_tokens or 0
            self.truncated += any(c.finish_reason == "length" for c in answer.choices)
        if isinstance(answer, Attempted) and answer.attempts > 1:
            self.reasked += 1
            self.repaired += not isinstance(outcome, RowError)
        if not isinstance(outcome, RowError):
            self.succeeded += 1
            if isinstance(answer, Completion) and len(self.samples) < self.most_samples:
                self.samples.append(Sample(key, answer.text[:SAMPLE_LENGTH]))
            return
        self.failed += 1
        self.kinds[outcome.kind] = self.kinds.get(outcome.kind, 0) + 1
        keys = self.keys.setdefault(outcome.kind, [])
        if len(self.worst) < WORST or len(keys) < EXAMPLES:  # rare kinds of errors are kept, too
            self.worst.append(FailedRow(key, outcome.kind, outcome.message))
        if len(keys) < EXAMPLES:
            keys.append(key)

    def review(self, row: ReviewRow) -> None:
        """Count one row that is marked for a person."""
        self.to_review += 1
        insort(self.reviews, row, key=_doubt)
        del self.reviews[WORST:]

    @property
    def done(self) -> int:
        return self.succeeded + self.failed

    def progress(self, to_process: int | None) -> Progress:
        since = self.first_sent or self.started
        seconds = max(time.monotonic() - since, 1e-3)
        counts = self.succeeded, self.failed, self.completion_tokens
        return Progress(to_process, *counts, seconds, self.stopped_by)

    def timings(self) -> dict[str, float]:
        """Seconds of all phases, including those that are known only at the end."""
        timings = {"total": time.monotonic() - self.started, **self.seconds}
        if self.first_sent is not None:
            timings["first_row"] = self.first_sent - self.started
            timings["answer"] = (self.last_answer or time.monotonic()) - self.first_sent
        return {name: round(seconds, 3) for name, seconds in timings.items()}

    def errors(self) -> tuple[ErrorKind, ...]:
        by_rows = sorted(self.kinds.items(), key=lambda item: -item[1])
        return tuple(ErrorKind(kind, rows, tuple(self.keys[kind])) for kind, rows in by_rows)
