"""The rows of the source that a run processes, with what each asks of the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from vllm_tasks.calls.call import TableCall
from vllm_tasks.canonical import input_hash
from vllm_tasks.datalayer.selection import Key, SourceRow
from vllm_tasks.errors import InvalidCall, TablesUnavailable
from vllm_tasks.rows import Request, RowError
from vllm_tasks.tables.earlier import holds_others
from vllm_tasks.tables.job import RETRY_DELAYS, Job
from vllm_tasks.tables.open_rows import Open, bytes_of_request
from vllm_tasks.tables.report import Tally

logger = logging.getLogger(__name__)

ASKED_TOGETHER = 512
"""Rows that are folded and put in order together."""
MADE_TOGETHER = 64
"""Rows whose prompts are made at once, and are in memory beyond what `open_rows.HELD` counts."""
SLICE = 2**20
"""Bytes of prompts that are handed over together: with many more, one slow row would keep those of all the
others in memory. `ASKED_TOGETHER` rows of usual width are less."""

Hashed = tuple[SourceRow, str]
"""A row with the hash of its input."""
Prompted = tuple[SourceRow, str, Request | RowError]
"""A row, without its values, with the hash of its input and what it is asked."""


class SourceRows:
    """The rows to process, read once."""

    def __init__(self, job: Job, open_rows: Open, tally: Tally) -> None:
        self.job, self.tally = job, tally
        self._open = open_rows

    def slices(self) -> Iterator[tuple[list[Prompted], int]]:
        """The rows with their prompts, in parts that have about `SLICE` bytes at most, with those bytes."""
        for rows in self._wanted_rows():
            yield from self._slices(rows)

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
        part: list[Prompted] = []
        held = 0
        for start in range(0, len(rows), MADE_TOGETHER):
            some = rows[start : start + MADE_TOGETHER]
            with self.tally.phase("read"):
                requests = requests_of(self.job.over, [row for row, _ in some])
            for (row, digest), request in zip(some, requests, strict=True):
                # Its values are in the prompt; kept until the commit, they would be in memory twice.
                part.append((without_values(row), digest, request))
                held += bytes_of_request(request)
                if held >= SLICE:
                    yield part, held
                    part, held = [], 0
        if part:
            yield part, held


def requests_of(over: TableCall, rows: Sequence[SourceRow]) -> list[Request | RowError]:
    """What the rows are asked; a row that could not be read is its error."""
    made = iter(over.requests([row.values for row in rows if row.error is None]))
    return [next(made) if row.error is None else RowError("read", row.error) for row in rows]


def without_values(row: SourceRow) -> SourceRow:
    """The row without its values."""
    return SourceRow(row.key, (), row.redo, row.input_hash, row.error)
