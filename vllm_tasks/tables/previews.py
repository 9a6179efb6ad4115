"""`preview`: some rows of a table asked for a look, and nothing committed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any
from uuid import uuid4

from vllm_tasks.calls.answers import Decoder
from vllm_tasks.calls.call import Call, Columns, Model, named_columns
from vllm_tasks.calls.prompts import Context
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.opening import Store, open_tables, source_of
from vllm_tasks.datalayer.selection import Selection, SourceRow, Tables
from vllm_tasks.errors import InvalidCall
from vllm_tasks.printable import printable
from vllm_tasks.rows import Completion, Message, Request, Result, RowError
from vllm_tasks.tables.arguments import datalayer_of
from vllm_tasks.tables.keys import shown_key
from vllm_tasks.tables.source_rows import requests_of

MOST = 1000
"""Rows of a preview: more are a run, which commits them."""
SHOWN = 500
"""Characters of a prompt or an answer that are printed."""


@dataclass(frozen=True)
class PreviewRow:
    """One row: its key, the prompt as it was sent, the answer's text and value, or why there is none.

    `prompt` is a text or chat messages, None where there is no prompt. `answer` is the text of the first
    choice, None without an answer. `value` is what `predict` would give; `error` what `_error` would say.
    """

    key: tuple[Any, ...]
    prompt: str | list[Message] | None
    answer: str | None
    value: Any
    error: str | None


@dataclass(frozen=True)
class Preview:
    """What `preview` found; printed, a readable page with long texts cut."""

    model: str
    source: str
    rows: tuple[PreviewRow, ...]

    def __str__(self) -> str:
        head = f"{self.model} over {len(self.rows)} rows of {self.source}; nothing is committed"
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
    routed: Callable[[Call], Call] = lambda call: call,
    **sampling: Any,
) -> Preview:
    """Ask `model` for the first `n` rows that the source gives, done or not, and commit nothing.

    The arguments are those of `predict_in_db`. A row that fails has its error in the preview.
    routed: the call as it is answered elsewhere, see `vllm_tasks.placement`.

    Raises `InvalidCall`, `ServerUnavailable`, `EngineFailed`, `TablesUnavailable`.
    """
    call = routed(model.prepare(preview, context, sampling))
    if type(n) is not int or not 1 <= n <= MOST:
        raise InvalidCall(f"n={n!r:.100} must be a whole number of rows from 1 to {MOST}")
    key = named_columns("primary_id", primary_id)
    datalayer = datalayer_of(db, model)
    over = call.over(X)
    tables, named = open_tables(datalayer, select, source_of(source))
    # Outputs that are not there: what earlier calls committed, under whatever key, is of no concern.
    selection = Selection(named, key, over.columns, f"_preview_{uuid4().hex}", over.fingerprint, "all")
    try:
        rows = _first(tables, selection, n)
    finally:
        tables.close()
    requests = requests_of(over, rows)
    answers = call.answers(requests) if requests else []
    found = [_row(call.decoder, *each) for each in zip(rows, requests, answers, strict=True)]
    return Preview(model.identifier, named if len(named) <= SHOWN else f"{named[:SHOWN]}...", tuple(found))


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
    """What is shown of a row, by what it is; long texts are cut."""
    prompt = "" if row.prompt is None else row.prompt
    texts = {
        "key": shown_key(row.key),
        "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, default=str),
        "answer": row.answer or "",
        "value": "" if row.error is not None or row.value == row.answer else repr(row.value),
        "error": row.error or "",
    }
    return {name: printable_lines(_cut(text)) for name, text in texts.items()}


def printable_lines(text: str) -> str:
    """As `printable`, but lines stay lines."""
    return "\n".join(map(printable, text.split("\n")))


def _page(row: PreviewRow) -> str:
    cells = as_cells(row)
    lines = [f"--- {cells.pop('key')}"]
    lines += [f"{name}: {text}" for name, text in cells.items() if text]
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"
