"""The snapshot of a data set: its rows are drawn, put in order, hashed, and stored next to the outputs.

The rows of a sample, and their order, depend on their contents and the seed only, so they are the same on
every machine and from every kind of table. The snapshot table, `_dataset__<identifier>__<hash>`, has the
columns `row` (from 0), `input` (the values of X's columns), `target` and, if a metric needs it, `choices`.
`exact_json` writes them, so that prompts are made from the values of the source, as in `predict_in_db`.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vllm_tasks.canonical import canonical
from vllm_tasks.datalayer import exact_json
from vllm_tasks.datalayer.all_rows import read
from vllm_tasks.datalayer.opening import source_of
from vllm_tasks.datalayer.selection import PAGE, Tables
from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.validation import Dataset
from vllm_tasks.validation.expected import NotComparable, expected
from vllm_tasks.validation.sets import rows_of

SHOWN_TEXT = 100


@dataclass(frozen=True, slots=True)
class Case:
    """One row. `inputs` holds the values of X's columns; `choices` is set if a metric needs it."""

    row: int
    inputs: list[Any]
    target: Any
    """The known answer as metrics compare it: see `expected`."""
    choices: list[Any] | None = None
    cluster: Any = None
    """The value of the cluster column; None without one."""


@dataclass(frozen=True)
class Snapshot:
    """The rows of a data set that are processed and scored."""

    dataset: str
    table: str
    hash: str
    """The hash of all rows: 64 hexadecimal digits."""
    cases: list[Case]

    def clusters(self) -> list[int]:
        """For each row, the first row that it is not independent of: one with equal inputs, or with an equal
        value in the cluster column, or one that such rows connect it with."""
        first: dict[str, int] = {}
        leader = list(range(len(self.cases)))

        def found(row: int) -> int:
            while leader[row] != row:
                leader[row] = row = leader[leader[row]]
            return row

        for case in self.cases:
            marks = [exact_json.identity(["input", case.inputs])]
            if case.cluster is not None:
                marks.append(exact_json.identity(["cluster", case.cluster]))
            for mark in marks:
                one, other = sorted((found(case.row), found(first.setdefault(mark, case.row))))
                leader[other] = one
        return [found(row) for row in leader]


@dataclass(frozen=True)
class Columns:
    """The columns of a data set that a validation needs."""

    inputs: tuple[str, ...]
    target: str
    choices: str | None = None
    cluster: str | None = None

    @property
    def all(self) -> list[str]:
        extra = [name for name in (self.choices, self.cluster) if name is not None]
        return list(dict.fromkeys((*self.inputs, self.target, *extra)))


def read_snapshot(dataset: str, table: str, columns: Columns, home: Tables) -> Snapshot:
    """Read the snapshot that an earlier validation stored as `table`."""
    cases = _stored(home, table, columns)
    return Snapshot(dataset, table, _hash(cases), cases)


def take_snapshot(
    dataset: Dataset, columns: Columns, home: Tables, check: Callable[[Snapshot], None] = lambda _: None
) -> Snapshot:
    """Draw the rows of `dataset` and store them in `home`.

    `check` raises for rows that cannot be used. It is called before they are stored, since pinned rows stay.

    Raises `InvalidCall` for a missing column, a data set without rows, targets that are NULL, fewer rows than
    `sample_size`, values of types that no source has, and targets that no answer could be compared with.
    """
    pinned = f"_dataset__{dataset.identifier}__pinned-{_spec(dataset, columns)[:12]}" if dataset.pin else None
    if pinned is not None and has_rows(home, pinned):
        kept = read_snapshot(dataset.identifier, pinned, columns, home)
        try:
            check(kept)
        except InvalidCall as error:
            raise InvalidCall(f"{error} (the rows are pinned: for others drop {pinned!r})") from error
        return kept
    cases = _drawn(dataset, columns, home)
    digest = _hash(cases)
    table = pinned or f"_dataset__{dataset.identifier}__{digest[:12]}"
    drawn = Snapshot(dataset.identifier, table, digest, cases)
    check(drawn)
    if not has_rows(home, table):
        home.put(table, _as_table(cases), ["row"])
    # Pinned ones are read again: a concurrent writer may have stored other rows first.
    return drawn if pinned is None else read_snapshot(dataset.identifier, table, columns, home)


def has_rows(home: Tables, table: str) -> bool:
    """Whether the table has rows; `kill -9` while it was written may have left it without any."""
    return bool(home.stored(table, "1 AS one", "1 = 1 LIMIT 1"))


def _spec(dataset: Dataset, columns: Columns) -> str:
    """A hash of all that decides the rows of a pinned set, so that another sample gets another snapshot."""
    drawn_by = dataset.model_dump(include={"select", "raw_data", "db", "sample_size", "random_seed"})
    more = [*_given(columns.cluster), *_given(dataset.reference)]
    text = canonical([drawn_by, columns.inputs, columns.target, columns.choices, *more])
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
            f"{dataset.sample_size}; lower it, or leave it out for all rows"
        )
    cases = [_case(dataset, i, values, columns) for i, (_, values) in enumerate(drawn)]
    _refuse_nulls(dataset, columns, cases)
    return cases


def _rows(dataset: Dataset, columns: Columns, home: Tables) -> Iterator[Mapping[str, Any]]:
    given = rows_of(dataset.reference) if dataset.reference is not None else dataset.raw_data
    if given is not None:
        for i, row in enumerate(given):
            for name in columns.all:
                if name not in row:
                    raise InvalidCall(
                        f"row {i} of dataset {dataset.identifier!r} has no {name!r}{near(name, row)}; it has "
                        f"{', '.join(map(repr, row)) or 'nothing'}"
                    )
        yield from given
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
    """A row with its sort key."""
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
            "such rows out, or CAST the column in the SELECT"
        ) from error
    choices = None if columns.choices is None else values[columns.choices]
    cluster = None if columns.cluster is None else values[columns.cluster]
    # Through JSON and back, so that a resumed run, which reads the snapshot, has the same values.
    return Case(i, *exact_json.loads(exact_json.dumps([inputs, target, choices, cluster])))


def _given(value: Any) -> list[Any]:
    """A list with the value if there is one, so that hashes of sets without it are as they were."""
    return [] if value is None else [value]


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
        digest.update(
            exact_json.identity([case.inputs, case.target, case.choices, *_given(case.cluster)]).encode()
            + b"\n"
        )
    return digest.hexdigest()


def _as_table(cases: Sequence[Case]) -> pa.Table:
    columns: dict[str, Any] = {
        "row": pa.array([case.row for case in cases], pa.int64()),
        "input": [exact_json.dumps(case.inputs) for case in cases],
        "target": [exact_json.dumps(case.target) for case in cases],
    }
    if any(case.choices is not None for case in cases):
        columns["choices"] = [exact_json.dumps(case.choices) for case in cases]
    if any(case.cluster is not None for case in cases):
        columns["cluster"] = [exact_json.dumps(case.cluster) for case in cases]
    return pa.table(columns)


def _stored(home: Tables, table: str, columns: Columns) -> list[Case]:
    wanted = {name for name in ("choices", "cluster") if getattr(columns, name) is not None}

    def value(row: Mapping[str, Any], name: str) -> Any:
        """None if it is NULL in this row, or in all rows, when its column is not stored."""
        return exact_json.loads(row.get(name) or "null") if name in wanted else None

    rows = sorted((row for batch in home.read(table) for row in batch), key=lambda row: int(row["row"]))
    return [
        Case(
            row["row"],
            exact_json.loads(row["input"]),
            exact_json.loads(row["target"]),
            value(row, "choices"),
            value(row, "cluster"),
        )
        for row in rows
    ]
