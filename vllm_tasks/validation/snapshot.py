"""The rows of a data set as a validation asks them: drawn, put in order, hashed and kept beside the outputs.

Which rows a sample has, and their order, follows from their contents and the seed alone: the same on every
machine and from every kind of table. The snapshot table, `_dataset__<identifier>__<hash>`, has the columns
`row` (from 0), `input` (the values of X's columns), `target` and, for a metric, `choices`, as `exact_json`
writes them: a prompt is made of the values that the source gave, as in `predict_in_db`.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vllm_tasks.canonical import canonical
from vllm_tasks.datalayer import exact_json
from vllm_tasks.datalayer.join import read
from vllm_tasks.datalayer.lake.delta import quoted
from vllm_tasks.datalayer.opening import source_of
from vllm_tasks.datalayer.selection import PAGE, Tables
from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.validation import Dataset
from vllm_tasks.validation.expected import NotComparable, expected

SHOWN_TEXT = 100


@dataclass(frozen=True, slots=True)
class Case:
    """One row. `inputs` are the values of X's columns; `choices` those of a multiple choice."""

    row: int
    inputs: list[Any]
    target: Any
    """As metrics compare it: see `expected`."""
    choices: list[Any] | None = None


@dataclass(frozen=True)
class Snapshot:
    """A data set's rows, as they are asked and scored."""

    dataset: str
    table: str
    hash: str
    """Of all rows: 64 hexadecimal digits."""
    cases: list[Case]


@dataclass(frozen=True)
class Columns:
    """Columns of a data set that a validation needs."""

    inputs: tuple[str, ...]
    target: str
    choices: str | None = None

    @property
    def all(self) -> list[str]:
        extra = () if self.choices is None else (self.choices,)
        return list(dict.fromkeys((*self.inputs, self.target, *extra)))


def kept(dataset: str, table: str, columns: Columns, home: Tables) -> Snapshot:
    """The rows that a validation froze as `table`."""
    cases = _kept(home, table, columns)
    return Snapshot(dataset, table, _hash(cases), cases)


def take_snapshot(dataset: Dataset, columns: Columns, home: Tables) -> Snapshot:
    """The rows of `dataset`, kept in `home`.

    Raises `InvalidCall` for a column that is not there, a set without rows, answers that are NULL, fewer rows
    than `sample_size`, values of types that no source has, and targets that no answer could be compared with.
    """
    pinned = f"_dataset__{dataset.identifier}__pinned-{_spec(dataset, columns)[:12]}" if dataset.pin else None
    if pinned is not None and has_rows(home, pinned):
        return kept(dataset.identifier, pinned, columns, home)
    cases = _drawn(dataset, columns, home)
    digest = _hash(cases)
    table = pinned or f"_dataset__{dataset.identifier}__{digest[:12]}"
    if not has_rows(home, table):
        home.put(table, _as_table(cases), ["row"])
    if pinned is not None:
        return kept(dataset.identifier, table, columns, home)  # a rival may have been first
    return Snapshot(dataset.identifier, table, digest, cases)


def has_rows(home: Tables, table: str) -> bool:
    """A kill while it was made may have left a table without rows."""
    if not home.has(table):
        return False
    return any(batch for batch in home.read(f"SELECT 1 AS one FROM {quoted(table)} LIMIT 1"))  # noqa: S608


def _spec(dataset: Dataset, columns: Columns) -> str:
    """What the rows of a pinned set were drawn by: another sample is another pin."""
    drawn_by = dataset.model_dump(include={"select", "raw_data", "db", "sample_size", "random_seed"})
    text = canonical([drawn_by, columns.inputs, columns.target, columns.choices])
    return hashlib.sha256(text.encode()).hexdigest()


def _drawn(dataset: Dataset, columns: Columns, home: Tables) -> list[Case]:
    rows = enumerate(_rows(dataset, columns, home))
    ranked = (_ranked(dataset, {name: row[name] for name in columns.all}, i) for i, row in rows)
    if dataset.sample_size is None:
        drawn = sorted(ranked, key=lambda pair: pair[0])
    else:
        drawn = heapq.nsmallest(dataset.sample_size, ranked, key=lambda pair: pair[0])
    if not drawn:
        raise InvalidCall(f"dataset {dataset.identifier!r} has no rows: there is nothing to validate with")
    if dataset.sample_size is not None and len(drawn) < dataset.sample_size:
        raise InvalidCall(
            f"dataset {dataset.identifier!r} has {len(drawn)} rows, fewer than sample_size="
            f"{dataset.sample_size}; ask for fewer, or leave sample_size out for all"
        )
    cases = [_case(dataset, i, values, columns) for i, (_, values) in enumerate(drawn)]
    _refuse_nulls(dataset, columns, cases)
    return cases


def _rows(dataset: Dataset, columns: Columns, home: Tables) -> Iterator[Mapping[str, Any]]:
    if dataset.raw_data is not None:
        for i, row in enumerate(dataset.raw_data):
            for name in columns.all:
                if name not in row:
                    raise InvalidCall(
                        f"row {i} of dataset {dataset.identifier!r} has no {name!r}{near(name, row)}; it has "
                        f"{', '.join(map(repr, row)) or 'nothing'}"
                    )
        yield from dataset.raw_data
        return
    assert dataset.select is not None
    if (elsewhere := source_of(dataset.db)) is None:
        for batch in home.read(dataset.select, columns.all):
            yield from batch
        return
    with closing(elsewhere.source(dataset.select)) as source:
        for batch in read(source, dataset.select, columns.all, PAGE):
            yield from batch


def _ranked(dataset: Dataset, values: dict[str, Any], i: int) -> tuple[bytes, dict[str, Any]]:
    """A row with its place in the order of all rows."""
    try:
        text = exact_json.identity([dataset.random_seed, values])
    except (TypeError, RecursionError) as error:
        raise InvalidCall(
            f"row {i} of dataset {dataset.identifier!r}: {error}, which no source gives; pass data: texts, "
            "numbers, dates, bytes, lists, dicts"
        ) from error
    return hashlib.blake2b(text.encode(), digest_size=16).digest(), values


def _case(dataset: Dataset, i: int, values: Mapping[str, Any], columns: Columns) -> Case:
    inputs = [values[name] for name in columns.inputs]
    try:
        target = expected(values[columns.target])
    except NotComparable as error:
        raise InvalidCall(
            f"dataset {dataset.identifier!r}: {columns.target!r} of {inputs!r:.{SHOWN_TEXT}} {error}; leave "
            "such rows out, or CAST it in the SELECT"
        ) from error
    choices = None if columns.choices is None else values[columns.choices]
    # As it will be read again, so that a run is the same when it is gone on with.
    return Case(i, *exact_json.loads(exact_json.dumps([inputs, target, choices])))


def _refuse_nulls(dataset: Dataset, columns: Columns, cases: Sequence[Case]) -> None:
    empty = [case for case in cases if case.target is None]
    if empty:
        raise InvalidCall(
            f"{len(empty)} of {len(cases)} rows of dataset {dataset.identifier!r} have no answer "
            f"({columns.target!r} is NULL), for example {empty[0].inputs!r:.{SHOWN_TEXT}}; leave them "
            f"out with SELECT ... WHERE {columns.target} IS NOT NULL"
        )


def _hash(cases: Iterable[Case]) -> str:
    digest = hashlib.sha256()
    for case in cases:
        digest.update(exact_json.identity([case.inputs, case.target, case.choices]).encode() + b"\n")
    return digest.hexdigest()


def _as_table(cases: Sequence[Case]) -> pa.Table:
    columns: dict[str, Any] = {
        "row": pa.array([case.row for case in cases], pa.int64()),
        "input": [exact_json.dumps(case.inputs) for case in cases],
        "target": [exact_json.dumps(case.target) for case in cases],
    }
    if cases[0].choices is not None:
        columns["choices"] = [exact_json.dumps(case.choices) for case in cases]
    return pa.table(columns)


def _kept(home: Tables, table: str, columns: Columns) -> list[Case]:
    names = ["row", "input", "target", *(["choices"] if columns.choices is not None else [])]
    rows = sorted(
        (row for batch in home.read(table, names) for row in batch), key=lambda row: int(row["row"])
    )
    read = exact_json.loads
    return [
        Case(row["row"], read(row["input"]), read(row["target"]), read(row.get("choices") or "null"))
        for row in rows
    ]
