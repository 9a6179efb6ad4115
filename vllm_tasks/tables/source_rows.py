"""The rows of the source that a run processes, with their requests."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from vllm_tasks.calls.call import TableCall
from vllm_tasks.calls.media import media_parts
from vllm_tasks.canonical import input_hash
from vllm_tasks.datalayer.selection import Key, SourceRow
from vllm_tasks.engines.batching import chunks
from vllm_tasks.errors import InvalidCall, TablesUnavailable
from vllm_tasks.rows import Request, RowError
from vllm_tasks.tables.earlier import holds_others
from vllm_tasks.tables.job import RETRY_DELAYS, Job
from vllm_tasks.tables.open_rows import OpenRows, bytes_of_request
from vllm_tasks.tables.tally import Tally

logger = logging.getLogger(__name__)

BATCH_ROWS = 512
"""Rows whose equal requests are folded and that are put in order together."""
PROMPT_ROWS = 64
"""Rows whose prompts are made at once; until then, they are in memory beyond what `open_rows.HELD` counts.
Rows with pictures, audio or video are large, and are made one after the other."""
SLICE = 2**20
"""Bytes of prompts that are handed over together: with many more, one slow row would keep the prompts of all
others in memory. `BATCH_ROWS` rows of usual width are smaller."""

Prompted = tuple[SourceRow, str, Request | RowError]
"""A row without its values, with the hash of its input and its request."""


class SourceRows:
    """The rows to process, read once."""

    def __init__(self, job: Job, open_rows: OpenRows, tally: Tally) -> None:
        self.job, self.tally = job, tally
        self._open = open_rows

    def slices(self) -> Iterator[tuple[list[Prompted], int]]:
        """The rows with their prompts, in parts of about `SLICE` bytes at most, each with its bytes."""
        left = self.job.limit
        for selected in self._selected_rows():
            part: list[Prompted] = []
            held = 0
            for rows in chunks(selected, rows_at_once(self.job.over)):
                prompted = self._prompted(rows, left)
                left = left and left - len(prompted)
                for each in prompted:
                    part.append(each)
                    held += bytes_of_request(each[2])
                    if held >= SLICE:
                        yield part, held
                        part, held = [], 0
                if left == 0:
                    break
            if part:
                yield part, held
            if left == 0:
                return

    def _selected_rows(self) -> Iterator[list[SourceRow]]:
        """The source's rows; after a lost connection, the source is reopened and reading resumes."""
        selection, size = self.job.selection, max(BATCH_ROWS, self.job.over.call.max_batch_size or 0)
        handled: set[Key] = set()
        failures = 0
        while True:
            try:
                for rows in self.job.tables.rows(selection, size):
                    failures = 0
                    self._count_unreadable()  # before the rows: with a `limit`, these may be the last
                    yield [row for row in rows if row.key not in handled]
                self._count_unreadable()
                return
            except TablesUnavailable as error:
                if failures == len(RETRY_DELAYS):
                    raise
                logger.warning(
                    "the source was lost, reading resumes in %d s: %s", RETRY_DELAYS[failures], error
                )
                self._open.wait(RETRY_DELAYS[failures])
                failures += 1
            # The order matters: a row that is committed in between is in one of the two.
            handled = self._open.snapshot()
            selection = replace(selection, since=self.job.started)

    def _count_unreadable(self) -> None:
        found = self.job.tables.unreadable()
        self.tally.unreadable, self.tally.unreadable_lines = found.count, list(found.examples)

    def _refuse_trial(self, rows: Iterable[SourceRow]) -> None:
        """Refuse a trial with `limit` that would replace good outputs of another fingerprint."""
        job = self.job
        if job.selection.refresh not in ("missing", "changed"):
            return
        if any(row.replaces_earlier for row in rows) and holds_others(job.tables, job.selection):
            raise InvalidCall(
                f"limit={job.limit} would replace outputs of another prompt, sampling or model in "
                f"{job.selection.outputs!r}: to try a few rows, use preview(...), which commits nothing, or "
                "predict_id='...' for separate outputs; without limit, all rows are processed again"
            )

    def _prompted(self, rows: Sequence[SourceRow], left: int | None) -> list[Prompted]:
        """Those of the rows that are processed, `left` at most, with the hash of their input and their
        requests."""
        over = self.job.over
        with self.tally.phase("read"):
            # The hash of a picture is that of its bytes, which the request has.
            early = requests_of(over, rows) if over.media else [None] * len(rows)
            hashed = [(row, _hash(over, row, made), made) for row, made in zip(rows, early, strict=True)]
            if self.job.selection.refresh == "changed":
                hashed = [each for each in hashed if each[0].input_hash != each[1]]
            hashed = hashed[:left]
            if left is not None:
                self._refuse_trial(row for row, _, _ in hashed)
            late = iter([] if over.media else requests_of(over, [row for row, _, _ in hashed]))
        # The prompt holds the values; if the row kept them too, they would be in memory twice.
        return [(without_values(row), digest, made or next(late)) for row, digest, made in hashed]


def first_prompts(job: Job) -> None:
    """Make the prompts of the first rows; raises what a run would raise before its first request."""
    with closing(SourceRows(job, OpenRows(), Tally()).slices()) as slices:  # type: ignore[type-var]  # a generator
        next(slices, None)


def requests_of(over: TableCall, rows: Sequence[SourceRow]) -> list[Request | RowError]:
    """The requests of the rows; a row that could not be read has an error instead."""
    made = iter(over.requests([row.values for row in rows if row.error is None]))
    return [next(made) if row.error is None else RowError("read", row.error) for row in rows]


def rows_at_once(over: TableCall) -> int:
    """The number of rows whose prompts are made at once."""
    return 1 if over.media else PROMPT_ROWS


def _hash(over: TableCall, row: SourceRow, made: Request | RowError | None) -> str:
    """The hash of a row's input: of the media that are sent, wherever they are, and of all other values."""
    if not isinstance(made, Request):
        return input_hash(row.values)
    others = [value for i, value in enumerate(row.values) if i not in over.media]
    return input_hash([*others, *media_parts(made.prompt)])


def without_values(row: SourceRow) -> SourceRow:
    """The row without its values."""
    return SourceRow(row.key, (), row.redo, row.input_hash, row.error)
