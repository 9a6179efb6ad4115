"""`estimate`: the tokens, time and cost of a run, from a trial with some of its rows."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from vllm_tasks.calls.call import Call, Model, TableCall
from vllm_tasks.calls.columns import Columns
from vllm_tasks.calls.prompts import Context
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.arguments import named_columns
from vllm_tasks.datalayer.opening import Store, name_of, open_tables, source_of
from vllm_tasks.datalayer.selection import Selection, SourceRow, Tables
from vllm_tasks.datalayer.table_names import outputs_name
from vllm_tasks.engines import loop, sharing
from vllm_tasks.engines.stopping import raise_if_stopped
from vllm_tasks.errors import InvalidCall
from vllm_tasks.printable import printable
from vllm_tasks.rows import Completion, Request, Result, RowError
from vllm_tasks.tables.arguments import datalayer_of
from vllm_tasks.tables.prices import Prices
from vllm_tasks.tables.progress import duration
from vllm_tasks.tables.source_rows import requests_of
from vllm_tasks.tables.tally import tokens_of
from vllm_tasks.tables.totals import Total

LEAST, MOST = 8, 1000
"""Rows of a trial: for more, use a run with a budget, which commits them."""
CHOSEN_FROM = 8
"""The sample is drawn from a part of the rows, chosen by a hash of their keys, that has about this many times
as many. All other rows are counted, and their values are not read."""
SEED = 0
"""Rows of a trial are the same each time."""
REASON_LENGTH = 200
"""Characters of an error that are printed."""


@dataclass(frozen=True)
class Estimate:
    """The result of `estimate`. Printed, it is a readable page.

    Totals are over the missing rows, with 95 % intervals, which describe the choice of the rows; they are
    points if all missing rows were tried. A run keeps more rows in flight than a small trial and refills the
    slots of finished rows, so it is usually faster: `seconds`, and a cost per hour, are upper estimates.

    Attributes:
        model: Identifier of the model.
        predict_id: Name of the outputs.
        source: Where the rows are read.
        rows: Rows in the source, counted.
        missing: How many of them `predict_in_db` would process, counted.
        sample: How many of these were tried.
        failed: How many of the tried rows failed.
        prompt_tokens: Total of the prompts' tokens.
        completion_tokens: Total of the answers' tokens.
        seconds: The time at the rate of the trial, without the start of the engine.
        trial_seconds: The time that the trial took.
        cost: The total cost; None without prices.
        error: Why the first of the failed rows failed; None if none did.
    """

    model: str
    predict_id: str
    source: str
    rows: int
    missing: int
    sample: int
    failed: int
    prompt_tokens: Total
    completion_tokens: Total
    seconds: float
    trial_seconds: float
    cost: Total | None = None
    error: str | None = None

    def __str__(self) -> str:
        head = f"{self.predict_id}: {self.model} over {printable(self.source)}; nothing is committed"
        return "\n".join([head, *(f"{name}: {text}" for name, text in lines_of(self).items())])


def lines_of(estimate: Estimate) -> dict[str, str]:
    """The texts to display of an estimate, by name."""
    e = estimate
    lines = {"rows to process": f"{e.missing:,} of {e.rows:,}"}
    if e.missing:
        lines |= {
            "prompt tokens": str(e.prompt_tokens),
            "completion tokens": str(e.completion_tokens),
            "time": f"about {duration(e.seconds)} at the rate of the trial ({e.sample:,} rows in "
            f"{e.trial_seconds:,.1f} s), less with more rows in flight",
        }
    if e.cost is not None:
        lines["cost"] = f"{e.cost:,.2f}"
    if e.failed:
        lines["failed in the trial"] = f"{e.failed:,} of {e.sample:,}, the first: {printable(e.error or '')}"
    return lines


def estimate(
    model: Model,
    X: Columns,  # noqa: N803 - the name in predict_in_db
    select: Any,
    sample: int = 32,
    *,
    predict_id: str | None = None,
    primary_id: str | Sequence[str] = "id",
    db: Datalayer | str | None = None,
    source: Store | None = None,
    prices: Mapping[str, float] | None = None,
    context: Context = None,
    sampling_columns: Mapping[str, str] | None = None,
    routed: Callable[[Call], Call] = lambda call: call,
    **sampling: Any,
) -> Estimate:
    """Estimate the tokens, time and cost of `predict_in_db` by a trial with a few of its rows.

    The missing rows are counted as `predict_in_db` finds them. A random sample of them is processed all at
    once; nothing is committed. Tokens are counted by the server or engine, as in a run.

    Args:
        model: The model that answers.
        X: The columns of a record, as in `predict_in_db`.
        select: The table or SELECT, as in `predict_in_db`.
        sample: The number of rows of the trial, from 8 to 1,000; fewer if fewer are missing. More rows make
            the intervals narrower, and the rate closer to that of a run.
        predict_id: Names the outputs, as in `predict_in_db`.
        primary_id: The column or columns that identify a row.
        db: Where the outputs are, and the rows unless `source` is given; the model's own when None.
        source: Where the rows are read, if not in `db`.
        prices: As in `predict_in_db`: `per_hour`, `per_million_prompt_tokens`,
            `per_million_completion_tokens`; None: those of the site's settings.
        context: Fills `{context}` in every prompt.
        sampling_columns: Columns with sampling parameters of the row's own, as in `predict_in_db`.
        routed: Replaces the call by one that is processed elsewhere, see `vllm_tasks.placement`.
        **sampling: Sampling parameters of this call.

    Returns:
        The estimate.

    Raises:
        InvalidCall: The call could not succeed, or the server does not count tokens.
        ServerUnavailable: No server came back within the grace period.
        EngineFailed: The engine failed.
        TablesUnavailable: The tables cannot be reached or are locked.
    """
    call = routed(model.prepare(estimate, context, sampling))
    if type(sample) is not int or not LEAST <= sample <= MOST:
        raise InvalidCall(f"sample={sample!r:.100} must be a whole number of rows from {LEAST} to {MOST}")
    predict_id = model.identifier if predict_id is None else predict_id
    outputs = model.model_update_kwargs.get("table") or outputs_name(predict_id)
    key, known_prices = named_columns("primary_id", primary_id), Prices.of(prices)
    tables, named = open_tables(datalayer_of(db, model), select, source_of(source))
    try:
        over = call.over(X, sampling_columns)
        selection = Selection(named, key, over.columns, outputs, over.fingerprint)
        tables.check(selection)
        rows, missing = tables.count(selection)
        chosen = _sampled(tables, selection, missing, sample)
        shown = tables.read_from(name_of(named))
    finally:
        tables.close()
    answers, seconds = _tried(call, requests_of(over, chosen))
    counts = [_tokens(answer) for answer in answers]
    failed = [error for answer in answers if (error := _error(over, answer))]
    per_row = seconds / max(len(chosen), 1)
    costs = [known_prices.cost(per_row, *tokens) for tokens in counts]
    return Estimate(
        model=model.identifier,
        predict_id=predict_id,
        source=shown,
        rows=rows,
        missing=missing,
        sample=len(chosen),
        failed=len(failed),
        prompt_tokens=Total.of([prompt for prompt, _ in counts], missing),
        completion_tokens=Total.of([completion for _, completion in counts], missing),
        seconds=per_row * missing,
        trial_seconds=seconds,
        cost=Total.of(costs, missing) if known_prices.are_set else None,
        error=f"{failed[0].kind}: {failed[0].reason[:REASON_LENGTH]}" if failed else None,
    )


def _sampled(tables: Tables, selection: Selection, missing: int, sample: int) -> list[SourceRow]:
    """A random sample of the `missing` rows, or all of them if they are fewer."""
    if not missing:
        return []
    rng = random.Random(SEED)
    parts = max(missing // (CHOSEN_FROM * sample), 1)
    part = replace(selection, shard=(rng.randrange(parts), parts)) if parts > 1 else selection
    with closing(iter(tables.rows(part, sample))) as batches:  # type: ignore[type-var]  # generators
        chosen = drawn((row for rows in batches for row in rows), sample, rng)
    if len(chosen) < min(sample, missing):
        raise InvalidCall(
            "the table or its outputs changed while the rows to process were counted: call estimate again, "
            "while no run works on them"
        )
    return chosen


def drawn(rows: Iterable[SourceRow], sample: int, rng: random.Random) -> list[SourceRow]:
    """A simple random sample of rows of unknown number (Vitter 1985, algorithm R); others are not kept."""
    chosen: list[SourceRow] = []
    for i, row in enumerate(rows):
        if i < sample:
            chosen.append(row)
        elif (place := rng.randrange(i + 1)) < sample:
            chosen[place] = row
    return chosen


def _tried(call: Call, requests: Sequence[Request | RowError]) -> tuple[list[Result], float]:
    """The answers, and the seconds that they took, without the start of the engine."""
    if call.answerer is not None:  # by a flow run elsewhere: its start and its engine's count for nothing
        answers = call.answers(requests)
        longest = max((a.seconds or 0.0 for a in answers if isinstance(a, Completion)), default=0.0)
        return answers, longest
    if any(isinstance(request, Request) for request in requests):
        loop.run(sharing.capacity(call.engine), raise_if_stopped)  # starts the engine
    began = time.monotonic()
    answers = call.answers(requests)
    return answers, time.monotonic() - began


def _tokens(answer: Result) -> tuple[int, int]:
    """The tokens of prompt and answer as a report counts them: none for a row without an answer."""
    if isinstance(answer, RowError):
        return 0, 0
    if (tokens := tokens_of(answer)) is None:
        raise InvalidCall(
            "the server has reported no numbers of tokens (no `usage`), from which alone a run is estimated"
        )
    return tokens


def _error(over: TableCall, answer: Result) -> RowError | None:
    outcome = answer if isinstance(answer, RowError) else over.decoder.rows(answer)
    return outcome if isinstance(outcome, RowError) else None
