"""Finds the rows of a source that its outputs lack, wherever the two are, by a join in DuckDB.

The outputs' keys are loaded once into a table that spills. The source comes in parts, and only their keys are
joined with it; so a row's values are read only when it is selected, and pass through no join.
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

from vllm_tasks.datalayer.lake.columns import arrow_column
from vllm_tasks.datalayer.selection import Key, Row, Selection, SourceRow
from vllm_tasks.datalayer.sources import Part, Source, Unreadable
from vllm_tasks.datalayer.sources.keys import listed
from vllm_tasks.datalayer.workspace import Workspace
from vllm_tasks.errors import InvalidCall, near

logger = logging.getLogger(__name__)

DONE, IDS, PART = "_vllm_tasks_done", "_vllm_tasks_ids", "_vllm_tasks_part"
STRANGE = "{0} < '0001-01-01' OR {0} >= '10000-01-01'"
"""Condition on a date that Python lacks: it has the years 1 to 9999, and no infinity."""
WANTED = {
    "missing": "same IS NOT TRUE",
    "changed": "true",
    "failed": "failed IS TRUE AND NOT coalesce(same AND created >= $since, false)",
    "all": "NOT coalesce(same AND created >= $since, false)",
}
"""`Refresh` as a condition on a row joined with its output."""
NO_ROWS = pa.schema([])


class Outputs(Protocol):
    """The store that keeps the outputs."""

    def key_types(self, name: str, key: Sequence[str]) -> dict[str, pa.DataType] | None:
        """The Arrow types of the columns `key` in the outputs `name`, without missing columns; None if there
        is no such table."""

    def done(self, cursor: duckdb.DuckDBPyConnection, name: str, key: pa.Schema) -> str:
        """A query for `cursor` that returns each of the outputs' keys once, as k0, k1, ... in the types of
        `key`, with `_fingerprint`, `_error`, `_input_hash` and `_created_at`."""

    def where(self, name: str) -> str:
        """The place of the outputs, as text for people."""


@dataclass(frozen=True)
class States:
    """The selected rows of a part: their numbers, ascending; whether there is an output; its input hash."""

    rows: np.ndarray
    redo: np.ndarray
    hashes: list[str | None] | None


class Join:
    """The join of one source with the outputs of one selection."""

    def __init__(self, source: Source, outputs: Outputs, selection: Selection, workspace: Workspace) -> None:
        self._source = source
        self._outputs = outputs
        self.selection = selection
        self._workspace = workspace
        self._named = f"cannot read {selection.display!r}"
        self._key: pa.Schema | None = None
        self._there = False
        """Whether the outputs exist, once the key is known."""
        self._some = False
        """Whether the source has returned a key."""
        self.unreadable = Unreadable()
        """The unreadable rows of the latest `rows`."""

    @property
    def key(self) -> pa.Schema:
        """The key's columns in the types in which outputs keep them; empty if the source has no rows.

        Raises `InvalidCall` for missing columns and for types that differ from those of the outputs.
        """
        if self._key is None:
            self._key = self._found_key()
        return self._key

    @property
    def key_to_write(self) -> pa.Schema:
        """The key for outputs to create; empty if the source has no rows, and then none are created.

        Raises as `key`.
        """
        if not self._there:
            self._key = None  # a concurrent writer may have created them since `check`
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
        """Refuse keys that are NULL, not unique, or have dates that Python lacks; see `Tables.check`."""
        key = self.key
        if not key.names:
            return
        if self.selection.ids is not None:
            self._ids()  # raises before the pass over all keys
        if self._source.identified_by(key.names) or ascending(self._keys(), key):
            return
        named = ", ".join(key.names)
        logger.info("checking in one pass that %s is unique in %s", named, self.selection.display)
        with self._workspace.cursor(self._named) as cursor:
            stream = pa.RecordBatchReader.from_batches(_numbered(key), _renamed(self._keys(), key))
            cursor.register(PART, stream)
            nulls, strange, doubled, rows, *examples = cursor.execute(_faults(key)).fetchall()[0]
        display, width = self.selection.display, len(key.names)

        def example(values: Sequence[Any]) -> str:
            return ", ".join(f"{n}={v!r:.100}" for n, v in zip(key.names, values, strict=True))

        if nulls:
            raise InvalidCall(
                f"{nulls} rows of {display!r} have NULL for {named}; exclude them with "
                "SELECT ... WHERE ... IS NOT NULL, or give another primary_id"
            )
        if strange:
            raise InvalidCall(
                f"{strange} rows of {display!r} have a key with a date that Python lacks, for example "
                f"{example(examples[width:])}; CAST it to VARCHAR in a SELECT, exclude them with "
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
        if not self.key.names:  # there are no rows, but there may be unreadable lines
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
        """A function from the keys of a part to the `States` of its selected rows."""
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
        """A function from keys to their number (within the `ids` and the shard) and the number selected."""
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
        """Create the tables on `cursor` that parts are joined with; False if none is needed."""
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
        """The FROM clause that joins a part with the outputs."""
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

    Raises `InvalidCall` for missing columns, and at the end for rows that could not be read.
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
    """Raise `InvalidCall` if rows could not be read where all are needed."""
    if unreadable.count:
        raise InvalidCall(
            f"{unreadable.count:,} rows of {select!r} cannot be read: {'; '.join(unreadable.examples[:3])}; "
            "correct them, or remove them from the file"
        )


def ascending(tables: Iterator[pa.Table], key: pa.Schema) -> bool:
    """Whether each key is larger than the one before, so that none occurs twice; stops at once if not."""
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
    """Raise `InvalidCall` for a wanted column that is missing or occurs twice."""
    if missing := [name for name in dict.fromkeys(wanted) if name not in there]:
        hints = "".join(near(name, there) for name in missing[:3])
        raise InvalidCall(
            f"{select!r} has no column {', '.join(map(repr, missing))}{hints}; "
            f"it has {', '.join(map(repr, there[:50]))}"
        )
    if twice := [name for name in wanted if there.count(name) > 1]:
        raise InvalidCall(f"{select!r} has two columns {twice[0]!r}; rename one with AS")


def alike(there: pa.DataType, here: pa.DataType) -> bool:
    """Whether keys of the type `here` can be kept as `there`; numbers of another width can, if they fit."""
    exact = (pa.types.is_integer, pa.types.is_decimal)
    numbers = any(is_one(there) for is_one in exact) and any(is_one(here) for is_one in exact)
    return bool(there == here or numbers)


def _faults(key: pa.Schema) -> str:
    """A query that counts rows whose key is NULL, has a date that Python lacks, or is repeated.

    Its columns: the rows with NULL; those with such a date; the repeated keys; their rows; one such key; a
    key with such a date, as text.
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
    """A condition on k0, ... by MD5: shards run on many machines, and MD5 is the same in every DuckDB."""
    index, count = shard
    texts = ", ".join(f"CAST(k{i} AS VARCHAR)" for i in range(keys))
    return f"md5_number_lower(concat_ws(chr(31), {texts})) % {count:d} = {index:d}"


def _numbered(key: pa.Schema) -> pa.Schema:
    return pa.schema([(f"k{i}", field.type) for i, field in enumerate(key)])


def _renamed(tables: Iterator[pa.Table], key: pa.Schema) -> Iterator[pa.RecordBatch]:
    for table in tables:
        yield from table.rename_columns(_numbered(key).names).cast(_numbered(key)).to_batches()


def _with_numbers(keys: pa.Table) -> pa.Table:
    """`keys` as k0, ..., with the number of each row as n."""
    names = [f"k{i}" for i in range(keys.num_columns)]
    return keys.rename_columns(names).append_column("n", pa.array(np.arange(keys.num_rows)))


def _source_rows(part: Part, states: States, size: int) -> Iterator[list[SourceRow]]:
    """The selected rows of a part, with the unreadable ones first."""
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
                if row is not None  # removed from the source since its key was read
            ]


def _plain_key(key: Key, wanted: pa.Schema) -> Key:
    if len(key) != len(wanted) or any(value is None for value in key):
        raise InvalidCall(f"ids: {key!r:.200} must be a key of {len(wanted)} values, none of them None")
    return tuple(_as_kept(value, field.type) for value, field in zip(key, wanted, strict=True))


def _as_kept(value: Any, kind: pa.DataType) -> Any:
    """A value of `ids` as the outputs keep it: a UUID, or a number where keys are text, becomes text."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool) and pa.types.is_string(kind)
    return str(value) if whole or isinstance(value, UUID) else value
