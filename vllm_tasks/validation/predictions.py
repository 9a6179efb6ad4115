"""Predictions of one validation run over one data set: processed, committed by run and row, and read again.

All runs of a model on a data set share one outputs table, `_outputs__<model>-on-<dataset>`, with the key
(`run`, `row`). So an interrupted run resumes where it stopped, and each figure can be traced to its rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from vllm_tasks.calls.call import Call, RowDecoder, TableCall, stored_columns
from vllm_tasks.calls.classes import is_of_classes
from vllm_tasks.calls.columns import Columns
from vllm_tasks.canonical import fingerprint
from vllm_tasks.datalayer import exact_json, vectors
from vllm_tasks.datalayer.lake.delta import quoted
from vllm_tasks.datalayer.selection import (
    CLASS_COLUMNS,
    POSITION,
    OutputColumn,
    OutputTable,
    Selection,
    Tables,
)
from vllm_tasks.datalayer.table_names import outputs_name
from vllm_tasks.datalayer.workspace import literal
from vllm_tasks.errors import InvalidCall, TooManyFailed
from vllm_tasks.metrics.classes import Label
from vllm_tasks.metrics.data import JsonText
from vllm_tasks.metrics.measure import Answer
from vllm_tasks.tables.arguments import commit_policy_of
from vllm_tasks.tables.budget import Budget
from vllm_tasks.tables.job import Display, Job
from vllm_tasks.tables.predict import commit_answers
from vllm_tasks.tables.report import Report
from vllm_tasks.tables.tally import Tally
from vllm_tasks.validation.snapshot import Case, Snapshot

Row = dict[str, Any]
PLAIN = [("output", "str")]
"""The columns of an outputs table whose answers are plain texts."""
ON = "-on-"
HASHED = re.compile(r"-[0-9a-f]{8}$")
"""The end of names that end with a hash."""
LONGEST_ID = 53
"""Bytes of a predict_id: `_outputs__` and a longer one would exceed PostgreSQL's limit for a name."""
KEPT = "_error", "_finish_reason", "_prompt_tokens", "_completion_tokens", "_seconds"


@dataclass(frozen=True)
class Calls:
    """The calls of a validation over inputs that are stored as JSON in one column."""

    own: TableCall
    """The call for the model's own answers."""
    likelihoods: TableCall
    """The call for likelihoods: of plain texts unless `chat` is set, as in lm-evaluation-harness."""

    @classmethod
    def of(cls, call: Call, X: Columns, sampling_columns: Mapping[str, str] | None = None) -> Calls:  # noqa: N803
        """The calls over the columns `X`."""
        return cls(*(packed(one, X, sampling_columns) for one in (call, call.of_texts())))


def packed(call: Call, X: Columns, sampling_columns: Mapping[str, str] | None = None) -> TableCall:  # noqa: N803
    """`call` over inputs that are stored as JSON in one column."""
    over = call.over(X, sampling_columns)
    return replace(
        over, columns=("input",), requests=lambda rows: over.requests([exact_json.loads(r[0]) for r in rows])
    )


def predict_id_of(model: str, dataset: str, decoder: RowDecoder, suffix: str | None = None) -> str:
    """The predict_id of a model's outputs on a data set; answers of another shape get another table.

    It is `<model>-on-<dataset>` for plain texts. Every name that could also be that of other outputs ends
    with a hash of what it stands for: model `a` on the set `b-on-c` is not model `a-on-b` on the set `c`. So
    does a name that is too long for a table, which is shortened.
    """
    name = f"{model}{ON}{dataset}" if suffix is None else f"{model}{ON}{dataset}-{suffix}"
    shape = [(column.name, column.kind) for column in stored_columns(decoder)]
    plain = suffix is None and shape == PLAIN and not decoder.flatten and not HASHED.search(dataset)
    is_split_once = sum(name.startswith(ON, i) for i in range(len(name))) == 1
    if plain and is_split_once and len(name.encode()) <= LONGEST_ID:
        return name
    end = (
        f"-{fingerprint({'of': [model, dataset, suffix], 'columns': shape, 'flatten': decoder.flatten})[:8]}"
    )
    return name.encode()[: LONGEST_ID - len(end)].decode(errors="ignore") + end


@dataclass(frozen=True)
class Round:
    """One run of a validation over one data set."""

    home: Tables
    run: str
    may_fail: int | None
    """Number of rows, None for any number. A fraction would be wrong for the rest that a resumed run has."""
    rows: int
    """All rows of the data set."""
    retry_failed: bool
    display: Callable[[str], Display]

    def process(
        self,
        over: TableCall,
        predict_id: str,
        table: str,
        key: Sequence[str] = ("row",),
        *,
        parts: int = 1,
        of_run: bool = False,
    ) -> int:
        """Process the rows of `table` that have no answer in this run yet; raises as `predict_in_db`.

        Returns the number of rows processed. `parts` is the largest number of rows in the table for one row
        of the data set. `of_run` means that the table holds rows of many runs.
        """
        budget = Budget(None if self.may_fail is None else self.may_fail * parts)
        columns = ", ".join(map(quoted, dict.fromkeys((*key, *over.columns))))
        run = f'CAST({literal(self.run)} AS VARCHAR(100)) AS "run"'
        where = f' WHERE "run" = {literal(self.run)}' if of_run else ""
        selection = Selection(
            select=f"SELECT {run}, {columns} FROM {quoted(table)}{where}",  # noqa: S608 - quoted
            key=("run", *key),
            columns=over.columns,
            outputs=outputs_name(predict_id),
            fingerprint=over.fingerprint,
            name=table,
        )
        retried = 0
        if self.retry_failed and self.home.has(selection.outputs):
            retried = self._commit(over, predict_id, replace(selection, refresh="failed"), budget).processed
        return retried + self._commit(over, predict_id, selection, budget).processed

    def _commit(self, over: TableCall, predict_id: str, selection: Selection, budget: Budget) -> Report:
        output = OutputTable(selection.outputs, stored_columns(over.decoder), over.decoder.flatten)
        job = Job.of(over, self.home, selection, commit_policy_of(None), budget, None)
        try:
            return commit_answers(predict_id, job, output, self.display(predict_id), Tally())
        except TooManyFailed as error:
            allowed = f"{self.may_fail} of {self.rows} rows may fail; a larger max_failed allows more"
            raise TooManyFailed(f"{error} ({allowed})", error.report) from error


class Source(Protocol):
    """The origin of a metric's answers: the model itself, its likelihoods, or a judge."""

    @property
    def over(self) -> TableCall:
        """The call that makes the requests."""

    @property
    def predict_id(self) -> str:
        """Names the outputs table."""

    def needed(self) -> list[Source]:
        """The sources to process, in this order: the ones that this source depends on, and itself."""

    def check(self, snapshot: Snapshot) -> None:
        """Raise `InvalidCall` for rows that cannot become requests, before any request is sent."""

    def process(self, round_: Round, snapshot: Snapshot) -> int:
        """Process the rows that this run has no answer for yet; returns the number of rows processed."""

    def answers(self, home: Tables, run: str, snapshot: Snapshot) -> list[Answer]:
        """The answers of `run`, one for each row, in row order; raises `Incomplete`."""


class Incomplete(InvalidCall):
    """A run has no answer for some rows: it belongs to other tables, or its rows were deleted."""


@dataclass(frozen=True)
class Own:
    """The model's own answers."""

    over: TableCall
    predict_id: str

    def needed(self) -> list[Source]:
        return [self]

    def check(self, snapshot: Snapshot) -> None:
        """Nothing to do: each row is checked when it is processed."""

    def process(self, round_: Round, snapshot: Snapshot) -> int:
        return round_.process(self.over, self.predict_id, snapshot.table)

    def answers(self, home: Tables, run: str, snapshot: Snapshot) -> list[Answer]:
        rows = {row["row"]: row for row in read(home, run, self.predict_id, self.over.decoder)}
        if missing := [case.row for case in snapshot.cases if case.row not in rows]:
            raise Incomplete(f"{run} has no answer for {len(missing)} rows, for example {missing[0]}")
        return [_answer(rows[case.row], case) for case in snapshot.cases]


def _answer(row: Row, case: Case) -> Answer:
    return Answer(
        row=case.row,
        target=case.target,
        prediction=None if row["_error"] is not None else _prediction(row["value"]),
        error=row["_error"],
        truncated=row["_finish_reason"] == "length",
        choices=case.choices,
        prompt_tokens=row["_prompt_tokens"],
        completion_tokens=row["_completion_tokens"],
        seconds=row["_seconds"],
    )


def _prediction(value: Any) -> Any:
    """JSON's null becomes a text, since None means that the row failed."""
    return "null" if value is None else value


def read(
    home: Tables, run: str, predict_id: str, decoder: RowDecoder, key: Sequence[str] = ("row",)
) -> Iterator[Row]:
    """The outputs of `run`, in key order: the key, `value` as plain data, and the columns `KEPT`.

    A value is the decoded answer: a text, data, a label with its probabilities, a dict if there are several
    columns otherwise, a list with `flatten`.
    """
    names = [*key, *KEPT, *((POSITION,) if decoder.flatten else ())]
    casts = [
        f"CAST({quoted(c.name)} AS VARCHAR) AS {quoted(c.name)}" if c.kind == "json" else quoted(c.name)
        for c in decoder.columns
    ]
    columns = ", ".join([*map(quoted, names), *casts])
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in home.stored(outputs_name(predict_id), columns, f'"run" = {literal(run)}'):
        found.setdefault(tuple(row[name] for name in key), []).append(dict(row))
    for _, items in sorted(found.items()):
        values = [
            _value(item, decoder.columns) for item in sorted(items, key=lambda item: item.get(POSITION) or 0)
        ]
        if decoder.flatten:
            value: Any = [] if items[0][POSITION] is None else values
        else:
            (value,) = values
        yield {name: items[0][name] for name in (*key, *KEPT)} | {"value": value}


def _value(row: Row, columns: Sequence[OutputColumn]) -> Any:
    values = {column.name: _python(row[column.name], column.kind) for column in columns}
    if is_of_classes(columns):
        label, _, probabilities = (values[column.name] for column in CLASS_COLUMNS)
        if not isinstance(probabilities, list):  # those of `task="classify"` have no names
            return None if label is None else Label.of(label, probabilities)
    return values["output"] if values.keys() == {"output"} else values


def _python(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "json":
        data = json.loads(value)
        return JsonText(data) if isinstance(data, str) else data
    if kind == "bytes":  # metrics and judges compare texts; the bytes of an answer are its text in UTF-8
        return bytes(value).decode(errors="backslashreplace")
    if kind == "vector" and isinstance(value, bytes):  # SQLite reports no types for a SELECT
        return vectors.of_bytes(value)
    return bool(value) if kind == "bool" else value  # SQLite stores booleans as 0 and 1
