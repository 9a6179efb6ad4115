"""Which rows of a source are missing from its outputs, wherever each of them is: a join in DuckDB.

The outputs' keys are loaded once, into a table that spills. The source comes in parts, whose keys alone are
matched with it; so a row's values are read only when it is wanted, and pass through no join.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vllm_tasks.datalayer.lake.delta import arrow_column
from vllm_tasks.datalayer.selection import Key, Row, Selection, SourceRow
from vllm_tasks.datalayer.sources import Part, Source, Unreadable
from vllm_tasks.datalayer.sources.keys import listed
from vllm_tasks.datalayer.workspace import Workspace
from vllm_tasks.errors import InvalidCall, near

logger = logging.getLogger(__name__)

DONE, IDS, PART = "_vllm_tasks_done", "_vllm_tasks_ids", "_vllm_tasks_part"
STRANGE = "{0} < '0001-01-01' OR {0} >= '10000-01-01'"
"""Whether Python has no such date: it has the years 1 to 9999, and no infinity."""
WANTED = {
    "missing": "same IS NOT TRUE",
    "changed": "true",
    "failed": "failed IS TRUE AND NOT coalesce(same AND created >= $since, false)",
    "all": "NOT coalesce(same AND created >= $since, false)",
}
"""`Refresh` as a condition on a row joined with its output."""
NO_ROWS = pa.schema([])


class Outputs(Protocol):
    """The store that the outputs are in."""

    def key_types(self, name: str, key: Sequence[str]) -> dict[str, pa.DataType] | None:
        """Of the outputs `name` there: what its columns `key` are in Arrow, without those that are missing;
        None when there is no such table."""

    def done(self, cursor: duckdb.DuckDBPyConnection, name: str, key: pa.Schema) -> str:
        """A query, on `cursor`, of the outputs' keys: once each, as k0, k1, ..., in the types of `key`, with
        `_fingerprint`, `_error`, `_input_hash` and `_created_at`."""

    def where(self, name: str) -> str:
        """Where a person finds them."""


@dataclass(frozen=True)
class States:
    """The rows of a part that are wanted: their numbers, ascending; whether there is an output; its hash."""

    rows: np.ndarray
    redo: np.ndarray
    hashes: list[str | None] | None


class Join:
    """The rows of one source beside the outputs of one selection."""

    def __init__(self, source: Source, outputs: Outputs, selection: Selection, workspace: Workspace) -> None:
        self._source = source
        self._outputs = outputs
        self.selection = selection
        self._workspace = workspace
        self._named = f"cannot read {selection.display!r}"
        self._key: pa.Schema | None = None
        self._there = False
        """Whether there are outputs, once the key is known."""
        self._some = False
        """Whether a key was seen."""
        self.unreadable = Unreadable()
        """Of the latest `rows`."""

    @property
    def key(self) -> pa.Schema:
        """The key's columns in the types in which outputs keep them; empty when the source has no rows.

        Raises `InvalidCall` for columns that are not there and for types that the outputs do not have.
        """
        if self._key is None:
            self._key = self._found_key()
        return self._key

    @property
    def key_to_write(self) -> pa.Schema:
        """The key of outputs that are to be made: empty when the source has no rows, and none are made.

        Raises as `key`.
        """
        if not self._there:
            self._key = None  # a rival may have made them since `check`
        if self.key.names and (self._some or any(keys.num_rows for keys in self._keys())):
            return self.key
        return NO_ROWS

    def _keys(self) -> Iterator[pa.Table]:
        for keys in self._source.keys(self.key):
            self._some = self._some or keys.num_rows > 0
            yield keys

    def _found_key(self) -> pa.Schema:
        key, wanted = self.selection.key, (*self.selection.key, *self.selection.columns)
        columns = self._source.columns()
        if not columns:
            return NO_ROWS
        refuse_missing(self.selection.display, wanted, columns)
        found = dict(zip(key, self._source.key_types(key), strict=True))
        there = self._outputs.key_types(self.selection.outputs, key)
        self._there = there is not None
        if there is None:
            return pa.schema(list(found.items()))
        wrong = [
            f"{name!r} is {there.get(name, 'missing')}, not {kind}"
            for name, kind in found.items()
            if name not in there or not alike(there[name], kind)
        ]
        if wrong:
            raise InvalidCall(
                f"the outputs {self._outputs.where(self.selection.outputs)!r} have another shape: "
                f"{'; '.join(wrong)}; give another predict_id"
            )
        return pa.schema([(name, there[name]) for name in key])

    # ------------------------------------------------------------------ the key identifies the rows

    def check(self) -> None:
        """Refuse keys that are NULL, doubled, or have dates that Python has not; see `Tables.check`."""
        key = self.key
        if not key.names:
            return
        if self.selection.ids is not None:
            self._ids()  # refused before the pass
        if self._source.identified_by(key.names) or ascending(self._keys(), key):
            return
        named = ", ".join(key.names)
        logger.info("checking that %s is unique in %s: one pass", named, self.selection.display)
        with self._workspace.cursor(self._named) as cursor:
            stream = pa.RecordBatchReader.from_batches(_numbered(key), _renamed(self._keys(), key))
            cursor.register(PART, stream)
            nulls, strange, doubled, rows, *examples = cursor.execute(_faults(key)).fetchall()[0]
        display, width = self.selection.display, len(key.names)

        def example(values: Sequence[Any]) -> str:
            return ", ".join(f"{n}={v!r:.100}" for n, v in zip(key.names, values, strict=True))

        if nulls:
            raise InvalidCall(
                f"{nulls} rows of {display!r} have NULL for {named}; leave them out with "
                "SELECT ... WHERE ... IS NOT NULL, or give another primary_id"
            )
        if strange:
            raise InvalidCall(
                f"{strange} rows of {display!r} have a key with a date that Python lacks, for example "
                f"{example(examples[width:])}; CAST it to VARCHAR in a SELECT, leave them out with "
                "SELECT ... WHERE, or give another primary_id"
            )
        if doubled:
            raise InvalidCall(
                f"{named} does not identify the rows of {display!r}: {doubled} keys have {rows} rows, "
                f"for example {example(examples[:width])}; give another primary_id, or several columns"
            )

    # ------------------------------------------------------------------ the wanted rows

    def rows(self, size: int) -> Iterator[list[SourceRow]]:
        """See `Tables.rows`."""
        self.unreadable = Unreadable()
        if not self.key.names:  # no row can be read, but lines may be there that are none
            for _ in self._source.parts(NO_ROWS, (), self.unreadable):
                pass
            return
        with self._workspace.cursor(self._named) as cursor:
            match = self._matching(cursor)
            for part in self._source.parts(self.key, self.selection.columns, self.unreadable):
                yield from _source_rows(part, match(part.keys), size)

    def count(self) -> tuple[int, int]:
        """See `Tables.count`."""
        rows = wanted = 0
        if not self.key.names:
            return 0, 0
        with self._workspace.cursor(self._named) as cursor:
            count = self._counting(cursor)
            for keys in self._keys():
                some, of_them = count(keys)
                rows, wanted = rows + some, wanted + of_them
        return rows, wanted

    def _matching(self, cursor: duckdb.DuckDBPyConnection) -> Any:
        """A function from the keys of a part to the `States` of its wanted rows."""
        if not self._loaded(cursor):
            none = np.zeros(0, dtype=bool)
            if self.selection.refresh == "failed":
                return lambda keys: States(np.zeros(0, dtype=np.int64), none, None)
            return lambda keys: States(np.arange(keys.num_rows), np.zeros(keys.num_rows, dtype=bool), None)
        hashes = self.selection.refresh != "missing"
        columns = f"n, same IS NOT NULL AS redo, {'if(same, hash, NULL)' if hashes else 'NULL'} AS hash"
        query = f"SELECT {columns} {self._joined()} WHERE {WANTED[self.selection.refresh]}"

        def match(keys: pa.Table) -> States:
            cursor.register(PART, _with_numbers(keys))
            found = cursor.sql(query, params=self._parameters()).to_arrow_table().sort_by("n")
            cursor.unregister(PART)
            return States(
                found["n"].to_numpy(),
                found["redo"].to_numpy(zero_copy_only=False).astype(bool),
                found["hash"].to_pylist() if hashes else None,
            )

        return match

    def _counting(self, cursor: duckdb.DuckDBPyConnection) -> Any:
        """A function from keys to how many there are (of the `ids` and the shard), and are wanted."""
        if not self._loaded(cursor):
            none = self.selection.refresh == "failed"
            return lambda keys: (keys.num_rows, 0 if none else keys.num_rows)
        wanted = WANTED[self.selection.refresh]
        query = f"SELECT count(*), count(*) FILTER ({wanted}) {self._joined()}"

        def count(keys: pa.Table) -> tuple[int, int]:
            cursor.register(PART, _with_numbers(keys))
            found = cursor.execute(query, self._parameters()).fetchall()[0]
            cursor.unregister(PART)
            return found[0], found[1]

        return count

    def _loaded(self, cursor: duckdb.DuckDBPyConnection) -> bool:
        """Make the tables that parts are joined with on `cursor`; False when none is needed."""
        selection, key = self.selection, self.key
        names = [f"k{i}" for i in range(len(key.names))]
        using = f"USING ({', '.join(names)})"
        restricted = ""
        if selection.ids is not None:
            cursor.register(f"{IDS}_given", self._ids())
            cursor.execute(f"CREATE TEMP TABLE {IDS} AS SELECT DISTINCT * FROM {IDS}_given")  # noqa: S608
            restricted = f"SEMI JOIN {IDS} {using}"
        if self._there:
            state = ["_fingerprint IS NOT DISTINCT FROM $fingerprint AS same"]
            if selection.refresh != "missing":
                state += ["_error IS NOT NULL AS failed", "_created_at AS created", "_input_hash AS hash"]
            done = self._outputs.done(cursor, selection.outputs, key)
            cursor.execute(
                f"CREATE TEMP TABLE {DONE} AS SELECT {', '.join(names + state)} FROM ({done}) {restricted}",  # noqa: S608
                {"fingerprint": selection.fingerprint},
            )
        elif selection.ids is not None or selection.shard is not None:
            none = ["NULL::BOOLEAN AS same", "false AS failed", "NULL::TIMESTAMPTZ AS created"]
            typed = pa.table([pa.array([], f.type) for f in key], names=names)
            cursor.register(f"{DONE}_none", typed)
            cursor.execute(
                f"CREATE TEMP TABLE {DONE} AS SELECT *, {', '.join(none)}, '' AS hash FROM {DONE}_none"  # noqa: S608
            )
        return self._there or selection.ids is not None or selection.shard is not None

    def _joined(self) -> str:
        """The FROM clause of a part beside its outputs."""
        names = [f"k{i}" for i in range(len(self.key.names))]
        using = f"USING ({', '.join(names)})"
        clause = f"FROM {PART}"
        if self.selection.ids is not None:
            clause += f" SEMI JOIN {IDS} {using}"
        if self.selection.shard is not None:
            clause = f"FROM (SELECT * {clause} WHERE {_in_shard(self.selection.shard, len(names))})"
        return f"{clause} LEFT JOIN {DONE} {using}"

    def _parameters(self) -> dict[str, datetime | None]:
        return {"since": self.selection.since} if "$since" in WANTED[self.selection.refresh] else {}

    def _ids(self) -> pa.Table:
        ids = [_plain_key(i, self.key) for i in self.selection.ids or ()]
        columns = []
        for i, field in enumerate(self.key):
            try:
                columns.append(arrow_column(field.name, field.type, [row[i] for row in ids]))
            except ValueError as e:
                raise InvalidCall(f"ids: {e}") from e
        return pa.table(columns, names=[f"k{i}" for i in range(len(self.key))])


def read(source: Source, select: str, columns: Sequence[str] | None, size: int) -> Iterator[list[Row]]:
    """All rows of a source as mappings of column to value, in lists of at most `size`.

    Raises `InvalidCall` for columns that are not there, and at the end for rows that could not be read.
    """
    there = source.columns()
    names = list(dict.fromkeys(there if columns is None or not there else columns))
    refuse_missing(select, names, there)
    unreadable = Unreadable()
    for part in source.parts(NO_ROWS, names, unreadable):
        for number, why in part.errors.items():
            unreadable.add(f"row {number}", why)
        good = [i for i in range(part.count) if i not in part.errors]
        for values in part.values(good):
            rows: list[Row] = [dict(zip(names, row, strict=True)) for row in values if row is not None]
            for start in range(0, len(rows), size):
                yield rows[start : start + size]
    refuse_unreadable(select, unreadable)


def refuse_unreadable(select: str, unreadable: Unreadable) -> None:
    """Raise `InvalidCall` where rows could not be read, of which all are needed."""
    if unreadable.count:
        raise InvalidCall(
            f"{unreadable.count:,} rows of {select!r} cannot be read: {'; '.join(unreadable.examples[:3])}; "
            "correct them, or leave them out of the file"
        )


def ascending(tables: Iterator[pa.Table], key: pa.Schema) -> bool:
    """Whether each key is larger than the one before, so that none is there twice: told at once where not."""
    if len(key) != 1 or pa.types.is_temporal(key[0].type):
        return False
    last = None
    for table in tables:
        column = pa.concat_arrays(table[0].chunks) if table[0].num_chunks else pa.array([], key[0].type)
        if not len(column):
            continue
        begins = last is None or pc.less(last, column[0]).as_py()
        if not begins or not pc.all(pc.less(column[:-1], column[1:]), skip_nulls=False).as_py():
            return False
        last = column[-1]
    return last is None or last.is_valid


def refuse_missing(select: str, wanted: Sequence[str], there: Sequence[str]) -> None:
    """Raise `InvalidCall` for a wanted column that is not there, or is there twice."""
    if missing := [name for name in dict.fromkeys(wanted) if name not in there]:
        hints = "".join(near(name, there) for name in missing[:3])
        raise InvalidCall(
            f"{select!r} has no column {', '.join(map(repr, missing))}{hints}; "
            f"it has {', '.join(map(repr, there[:50]))}"
        )
    if twice := [name for name in wanted if there.count(name) > 1]:
        raise InvalidCall(f"{select!r} has two columns {twice[0]!r}; name one otherwise with AS")


def alike(there: pa.DataType, here: pa.DataType) -> bool:
    """Whether keys of the type `here` may be kept as `there`, each that fits: widened numbers are."""
    exact = (pa.types.is_integer, pa.types.is_decimal)
    numbers = any(is_one(there) for is_one in exact) and any(is_one(here) for is_one in exact)
    return bool(there == here or numbers)


def _faults(key: pa.Schema) -> str:
    """A query for how many rows have NULL in the key, a date that Python has not, and a key of others.

    Its columns: the rows with NULL; with such a date; the doubled keys; their rows; one such key; one with
    such a date, as text.
    """
    keys = [f"k{i}" for i in range(len(key.names))]
    null = f"({' OR '.join(f'{k} IS NULL' for k in keys)})"
    dates = [k for k, field in zip(keys, key, strict=True) if pa.types.is_temporal(field.type)]
    strange = f"({' OR '.join(STRANGE.format(k) for k in dates) or 'false'})"
    return f"""
        SELECT coalesce(sum(n) FILTER ({null}), 0)::BIGINT,
            coalesce(sum(n) FILTER ({strange}), 0)::BIGINT,
            count(*) FILTER (NOT {null}), coalesce(sum(n) FILTER (NOT {null}), 0)::BIGINT,
            {", ".join(f"first({k}) FILTER (NOT {null})" for k in keys)},
            {", ".join(f"first({k}::VARCHAR) FILTER ({strange})" for k in keys)}
        FROM (
            SELECT {", ".join(keys)}, count(*) AS n FROM {PART}
            GROUP BY ALL HAVING count(*) > 1 OR {null} OR {strange}
        )
        """  # noqa: S608 - names of our own


def _in_shard(shard: tuple[int, int], keys: int) -> str:
    """A condition on k0... By MD5, the same in every version of DuckDB: shards run on many machines."""
    index, count = shard
    texts = ", ".join(f"CAST(k{i} AS VARCHAR)" for i in range(keys))
    return f"md5_number_lower(concat_ws(chr(31), {texts})) % {count:d} = {index:d}"


def _numbered(key: pa.Schema) -> pa.Schema:
    return pa.schema([(f"k{i}", field.type) for i, field in enumerate(key)])


def _renamed(tables: Iterator[pa.Table], key: pa.Schema) -> Iterator[pa.RecordBatch]:
    for table in tables:
        yield from table.rename_columns(_numbered(key).names).cast(_numbered(key)).to_batches()


def _with_numbers(keys: pa.Table) -> pa.Table:
    """`keys` as k0..., and the number of each row as n."""
    names = [f"k{i}" for i in range(keys.num_columns)]
    return keys.rename_columns(names).append_column("n", pa.array(np.arange(keys.num_rows)))


def _source_rows(part: Part, states: States, size: int) -> Iterator[list[SourceRow]]:
    """The wanted rows of a part, those that could not be read first."""
    bad = np.array([i in part.errors for i in states.rows], dtype=bool) if part.errors else None
    if bad is not None:
        where = np.flatnonzero(bad)
        keys = listed(part.keys, states.rows[where])
        yield [
            SourceRow(key, (), bool(states.redo[at]), None, part.errors[int(states.rows[at])])
            for key, at in zip(keys, where, strict=True)
        ]
    good = np.arange(len(states.rows)) if bad is None else np.flatnonzero(~bad)
    done = 0
    for values in part.values(states.rows[good].tolist()) if len(good) else ():
        for start in range(0, len(values), size):
            some = values[start : start + size]
            at = good[done : done + len(some)]
            done += len(some)
            redo = states.redo[at].tolist()
            hashes = [None] * len(some) if states.hashes is None else [states.hashes[i] for i in at]
            keys = listed(part.keys, states.rows[at])
            yield [
                SourceRow(key, row, *state)
                for key, row, *state in zip(keys, some, redo, hashes, strict=True)
                if row is not None  # gone from the source a moment ago
            ]


def _plain_key(key: Key, wanted: pa.Schema) -> Key:
    if len(key) != len(wanted) or any(value is None for value in key):
        raise InvalidCall(f"ids: {key!r:.200} is no key of {len(wanted)} values, none of them None")
    return tuple(_as_kept(value, field.type) for value, field in zip(key, wanted, strict=True))


def _as_kept(value: Any, kind: pa.DataType) -> Any:
    """A UUID, and where keys are text (as in CSV) a whole number, by its text."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool) and pa.types.is_string(kind)
    return str(value) if whole or isinstance(value, UUID) else value
