"""The tally of a run over a table: what is counted of its finished rows."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from vllm_tasks.rows import Attempted, Completion, Result, RowError
from vllm_tasks.tables.progress import Progress
from vllm_tasks.tables.report import (
    EXAMPLES,
    PROBABILITY,
    WORST,
    ErrorKind,
    FailedRow,
    Report,
    ReviewRow,
    Sample,
)

SAMPLE_LENGTH = 500
"""Characters of a sample answer that are kept."""
FIRST = 50
"""A run is hopeless when this many rows, the first that were sent, have all failed alike."""
UNSENT = {"prompt", "read"}
"""Kinds of errors of rows that were never sent: they say nothing about the rows that were."""


def tokens_of(answer: Completion) -> tuple[int, int] | None:
    """The tokens of prompt and answer, None if the server has not counted them. Numbers, as those of an
    embedding, are not tokens."""
    answered = answer.completion_tokens if answer.choices[0].data is None else 0
    return None if answer.prompt_tokens is None or answered is None else (answer.prompt_tokens, answered)


def _is_text(answer: Completion) -> bool:
    """Whether there is a text to show: the label of a class is one, and a vector has none."""
    return answer.text != "" or answer.choices[0].data is None


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
            self.uncounted += tokens_of(answer) is None
            self.prompt_tokens += answer.prompt_tokens or 0
            self.completion_tokens += answer.completion_tokens or 0
            self.truncated += any(c.finish_reason == "length" for c in answer.choices)
        if isinstance(answer, Attempted) and answer.attempts > 1:
            self.reasked += 1
            self.repaired += not isinstance(outcome, RowError)
        if not isinstance(outcome, RowError):
            self.succeeded += 1
            if isinstance(answer, Completion) and len(self.samples) < self.most_samples and _is_text(answer):
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
        insort(self.reviews, row, key=PROBABILITY)
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
