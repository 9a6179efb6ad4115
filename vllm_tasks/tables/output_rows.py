"""The output rows of a finished row: its values, or its error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm_tasks.calls.call import stored_columns
from vllm_tasks.calls.classes import LABEL, PROBABILITY
from vllm_tasks.datalayer.selection import POSITION, REVIEW, Key, Row, SourceRow, Writer
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Completion, Request, Result, RowError
from vllm_tasks.tables.earlier import length_of_vectors
from vllm_tasks.tables.job import Job
from vllm_tasks.tables.keys import display_key
from vllm_tasks.tables.report import ReviewRow
from vllm_tasks.tables.tally import Tally

ERROR_KEPT = 4000
"""Characters of a row's error that are kept in its output."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A row of the source with its output rows."""

    row: SourceRow
    outputs: list[Row]
    size: int
    """Bytes of the answer."""


class OutputRows:
    """Makes output rows from answers, and counts the outcome of each row."""

    def __init__(self, job: Job, writer: Writer, tally: Tally) -> None:
        self._job, self._writer, self._tally = job, writer, tally
        decoder = job.over.decoder
        self._names = [column.name for column in decoder.columns]
        self._empty: Row = {
            **{column.name: None for column in stored_columns(decoder)},
            **({POSITION: None} if decoder.flatten else {}),
        }
        self._lengths = {
            c.name: length_of_vectors(job.tables, job.selection, c.name)
            for c in decoder.columns
            if c.kind == "vector"
        }

    def of(self, row: SourceRow, digest: str, request: Request | None, answer: Result, size: int) -> Finished:
        """Decode an answer; if it cannot be decoded or stored, the row gets an error."""
        outcome = answer if isinstance(answer, RowError) else self._job.over.decoder.rows(answer)
        outputs = list(self._rows(row, digest, answer, outcome, request))
        for output in outputs:
            if problem := self._writer.unstorable(output) or self._other_length(output):
                outcome = RowError("output", problem)
                outputs = list(self._rows(row, digest, answer, outcome))
                self._check_key(row.key, outputs[0])
                break
        self._tally.count(row.key, answer, outcome if isinstance(outcome, RowError) else answer)
        self._tally.replaced += row.replaces_earlier
        if outputs[0].get(REVIEW):
            self._tally.review(ReviewRow(row.key, outputs[0][LABEL], outputs[0][PROBABILITY]))
        return Finished(row, outputs, size)

    def _other_length(self, output: Row) -> str | None:
        """Why a vector cannot be compared with those of other rows, None if it can."""
        for name, length in self._lengths.items():
            if (vector := output[name]) is not None and len(vector) != (length or len(vector)):
                return f"column {name!r}: {len(vector)} numbers, and the vectors before it have {length}"
            self._lengths[name] = length or (vector and len(vector))
        return None

    def _check_key(self, key: Key, error: Row) -> None:
        """Refuse a key that the table cannot hold: then not even the row's error can be written."""
        if problem := self._writer.unstorable(error):
            raise InvalidCall(
                f"the row with the key {display_key(key)!r:.200} can have no output: {problem}; exclude it "
                "with a SELECT ... WHERE, or give another primary_id"
            )

    def _rows(
        self,
        source: SourceRow,
        digest: str,
        answer: Result,
        outcome: list[tuple[Any, ...]] | RowError,
        request: Request | None = None,
    ) -> Iterator[Row]:
        """The output rows of one source row: one, or with `flatten` one for each item."""
        job, decoder, names = self._job, self._job.over.decoder, self._names
        row = {
            **dict(zip(job.selection.key, source.key, strict=True)),
            **self._empty,
            **decoder.kept.attempts_of(answer),
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
        assert isinstance(answer, Completion)
        kept = decoder.kept.rows(request, answer)
        if not decoder.flatten:
            yield {**row, **dict(zip(names, outcome[0], strict=True)), **kept[0]}
            return
        for position, values in enumerate(outcome):
            of_answer = kept[position if len(kept) > 1 else 0]
            yield {**row, **dict(zip(names, values, strict=True)), POSITION: position, **of_answer}
        if not outcome:
            yield {**row, **kept[0]}


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
    """Text that any table can hold: without NUL and lone surrogates, and of limited length."""
    if len(words) > ERROR_KEPT:
        words = f"{words[:ERROR_KEPT]}... ({len(words):,} characters)"
    return words.replace("\0", "\\0").encode(errors="backslashreplace").decode()
