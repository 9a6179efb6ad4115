"""`preview`: processes a few rows of a table and commits nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any
from uuid import uuid4

from vllm_tasks.calls.answers import Decoder
from vllm_tasks.calls.call import Call, Model
from vllm_tasks.calls.columns import Columns
from vllm_tasks.calls.media import without_media
from vllm_tasks.calls.prompts import Context
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.arguments import named_columns
from vllm_tasks.datalayer.opening import Store, open_tables, source_of
from vllm_tasks.datalayer.selection import Selection, SourceRow, Tables
from vllm_tasks.errors import InvalidCall
from vllm_tasks.printable import printable
from vllm_tasks.rows import Completion, Prompt, Request, Result, RowError
from vllm_tasks.tables.arguments import datalayer_of
from vllm_tasks.tables.keys import display_key
from vllm_tasks.tables.source_rows import requests_of

MOST = 1000
"""Rows of a preview at most: for more, use a run, which commits them."""
TEXT_LENGTH = 500
"""Characters of a prompt or an answer that are printed."""


@dataclass(frozen=True)
class PreviewRow:
    """One row: its key, the prompt as it was sent, the answer's text and value, or the error.

    `prompt` is a text, chat messages or token ids, None if there is none. `answer` is the text of the first
    choice, None without an answer. `value` is what `predict` would return; `error` is what the column
    `_error` would have.
    """

    key: tuple[Any, ...]
    prompt: Prompt | None
    answer: str | None
    value: Any
    error: str | None


@dataclass(frozen=True)
class Preview:
    """The result of `preview`. Printed, it is a readable page with long texts truncated."""

    model: str
    source: str
    rows: tuple[PreviewRow, ...]

    def __str__(self) -> str:
        rows = "1 row" if len(self.rows) == 1 else f"{len(self.rows):,} rows"
        head = f"{self.model} over {rows} of {self.source}; nothing is committed"
        return "\n\n".join([head, *map(_page, self.rows)])


def preview(
    model: Model,
    X: Columns,  # noqa: N803 - the name in predict_in_db
    select: Any,
    n: int = 5,
    *,
    primary_id: str | Sequence[str] = "id",
    db: Datalayer | str | None = None,
    source: Store | None = None,
    context: Context = None,
    sampling_columns: Mapping[str, str] | None = None,
    routed: Callable[[Call], Call] = lambda call: call,
    **sampling: Any,
) -> Preview:
    """Process the first `n` rows that the source returns, done or not, and commit nothing.

    Args:
        model: The model that answers.
        X: The columns of a record, as in `predict_in_db`.
        select: The table or SELECT, as in `predict_in_db`.
        n: The number of rows, from 1 to 1,000.
        primary_id: The column or columns that identify a row.
        db: Where the rows are, unless `source` is given; the model's own when None.
        source: Where the rows are read, if not in `db`.
        context: Fills `{context}` in every prompt.
        sampling_columns: Columns with sampling parameters of the row's own, as in `predict_in_db`.
        routed: Replaces the call by one that is processed elsewhere, see `vllm_tasks.placement`.
        **sampling: Sampling parameters of this call.

    Returns:
        The rows with their prompts and answers, in the order of the source. A failed row has its error.

    Raises:
        InvalidCall: The call could not succeed.
        ServerUnavailable: No server came back within the grace period.
        EngineFailed: The engine failed.
        TablesUnavailable: The tables cannot be reached or are locked.
    """
    call = routed(model.prepare(preview, context, sampling))
    if type(n) is not int or not 1 <= n <= MOST:
        raise InvalidCall(f"n={n!r:.100} must be a whole number of rows from 1 to {MOST}")
    key = named_columns("primary_id", primary_id)
    datalayer = datalayer_of(db, model)
    over = call.over(X, sampling_columns)
    tables, named = open_tables(datalayer, select, source_of(source))
    # A name without outputs: whatever earlier calls committed has no effect on a preview.
    selection = Selection(named, key, over.columns, f"_preview_{uuid4().hex}", over.fingerprint, "all")
    try:
        rows = _first(tables, selection, n)
    finally:
        tables.close()
    requests = requests_of(over, rows)
    answers = call.answers(requests) if requests else []
    found = [_row(call.decoder, *each) for each in zip(rows, requests, answers, strict=True)]
    return Preview(
        model.identifier, named if len(named) <= TEXT_LENGTH else f"{named[:TEXT_LENGTH]}...", tuple(found)
    )


def _first(tables: Tables, selection: Selection, n: int) -> list[SourceRow]:
    with closing(iter(tables.rows(selection, n))) as batches:  # type: ignore[type-var]  # generators
        return list(islice((row for rows in batches for row in rows), n))


def _row(decoder: Decoder, row: SourceRow, request: Request | RowError, answer: Result) -> PreviewRow:
    prompt = request.prompt if isinstance(request, Request) else None
    text = answer.text if isinstance(answer, Completion) else None
    outcome = answer if isinstance(answer, RowError) else decoder.rows(answer)
    if isinstance(outcome, RowError):
        return PreviewRow(row.key, prompt, text, None, f"{outcome.kind}: {outcome.message}")
    assert isinstance(answer, Completion)
    return PreviewRow(row.key, prompt, text, decoder.values(answer), None)


def as_cells(row: PreviewRow) -> dict[str, str]:
    """The texts to display for a row, by name; long ones are truncated."""
    texts = {
        "key": display_key(row.key),
        "prompt": "" if row.prompt is None else _text_of(without_media(row.prompt)),
        "answer": row.answer or "",
        "value": "" if row.error is not None or row.value == row.answer else repr(row.value),
        "error": row.error or "",
    }
    return {name: printable_lines(_cut(text)) for name, text in texts.items()}


def _text_of(prompt: Any) -> str:
    """A text as it is, messages of texts with their roles, and anything else as JSON."""
    if isinstance(prompt, str):
        return prompt
    match prompt:
        case [{"role": str(), "content": str()}, *_] if all(map(_is_text, prompt)):
            return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return json.dumps(prompt, ensure_ascii=False, default=str)


def _is_text(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and isinstance(message["content"], str)
    )


def printable_lines(text: str) -> str:
    """As `printable`, but line breaks are kept."""
    return "\n".join(map(printable, text.split("\n")))


def _page(row: PreviewRow) -> str:
    cells = as_cells(row)
    lines = [f"--- {cells.pop('key')}"]
    lines += [f"{name}: {text}" for name, text in cells.items() if text]
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH]}... ({len(text):,} characters)"
