"""Finds the rows of a source that its outputs lack, wherever the two are, by a join in DuckDB.

The outputs' keys are loaded once into a table that spills. The source comes in parts, and only their keys are
joined with it; so a row's values are read only when it is selected, and pass through no join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import duckdb
import numpy as np
import pyarrow as pa

from vllm_tasks.datalayer.all_rows import refuse_missing
from vllm_tasks.datalayer.ids import key_table
from vllm_tasks.datalayer.selection import Selection, SourceRow
from vllm_tasks.datalayer.shards import in_shard
from vllm_tasks.datalayer.sources import Part, Source, Unreadable
from vllm_tasks.datalayer.sources.keys import listed
from vllm_tasks.datalayer.unique_keys import ascending, refuse_bad_keys
from vllm_tasks.datalayer.workspace import Workspace
from vllm_tasks.errors import InvalidCall

DONE, IDS = "_vllm_tasks_done", "_vllm_tasks_ids"
PART, FOUND = "_vllm_tasks_part", "_vllm_tasks_found"
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
    def _names(self) -> list[str]:
        """The columns of a part, one for each of the key."""
        return [f"k{i}" for i in range(len(self.key.names))]

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
            key_table(self.selection.ids, key)  # raises before the pass over all keys
        if self._source.identified_by(key.names) or ascending(self._keys(), key):
            return
        with self._workspace.cursor(self._named) as cursor:
            refuse_bad_keys(cursor, self._keys(), key, self.selection.display)

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

    def _matching(self, cursor: duckdb.DuckDBPyConnection) -> Callable[[pa.Table], States]:
        """A function from the keys of a part to the `States` of its selected rows."""
        if not self._loaded(cursor):
            none = np.zeros(0, dtype=bool)
            if self.selection.refresh == "failed":
                return lambda keys: States(np.zeros(0, dtype=np.int64), none, None)
            return lambda keys: States(np.arange(keys.num_rows), np.zeros(keys.num_rows, dtype=bool), None)
        hashes = self.selection.refresh != "missing"
        hash_ = "if(same, hash, NULL) AS hash" if hashes else "NULL AS hash"
        columns = ", ".join([*self._names, "n", "same IS NOT NULL AS redo", hash_])
        wanted = f"SELECT {columns} {self._joined()} WHERE {WANTED[self.selection.refresh]}"

        def match(keys: pa.Table) -> States:
            cursor.register(PART, _with_numbers(keys))
            query, parameters = wanted, self._parameters()
            if self.selection.shard is not None:
                # In a statement of its own: otherwise DuckDB computes MD5, which takes longer than the
                # join, also for the rows that are done.
                cursor.execute(f"CREATE OR REPLACE TEMP TABLE {FOUND} AS {wanted}", parameters)
                query, parameters = f"SELECT n, redo, hash FROM {FOUND}{self._sharded()}", {}  # noqa: S608 - ours
            found = cursor.sql(query, params=parameters).to_arrow_table().sort_by("n")
            cursor.unregister(PART)
            return States(
                found["n"].to_numpy(),
                found["redo"].to_numpy(zero_copy_only=False).astype(bool),
                found["hash"].to_pylist() if hashes else None,
            )

        return match

    def _counting(self, cursor: duckdb.DuckDBPyConnection) -> Callable[[pa.Table], tuple[int, int]]:
        """A function from keys to their number (within the `ids` and the shard) and the number selected."""
        if not self._loaded(cursor):
            none = self.selection.refresh == "failed"
            return lambda keys: (keys.num_rows, 0 if none else keys.num_rows)
        wanted = WANTED[self.selection.refresh]
        query = f"SELECT count(*), count(*) FILTER ({wanted}) {self._joined()}{self._sharded()}"

        def count(keys: pa.Table) -> tuple[int, int]:
            cursor.register(PART, _with_numbers(keys))
            found = cursor.execute(query, self._parameters()).fetchall()[0]
            cursor.unregister(PART)
            return found[0], found[1]

        return count

    def _loaded(self, cursor: duckdb.DuckDBPyConnection) -> bool:
        """Create the tables on `cursor` that parts are joined with; False if none is needed."""
        selection, key = self.selection, self.key
        names = self._names
        using = f"USING ({', '.join(names)})"
        restricted = ""
        if selection.ids is not None:
            cursor.register(f"{IDS}_given", key_table(selection.ids, key))
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
        using = f"USING ({', '.join(self._names)})"
        clause = f"FROM {PART}"
        if self.selection.ids is not None:
            clause += f" SEMI JOIN {IDS} {using}"
        return f"{clause} LEFT JOIN {DONE} {using}"

    def _sharded(self) -> str:
        """The WHERE clause that leaves the rows of the shard, as a part of its own after the join."""
        shard = self.selection.shard
        return "" if shard is None else f" WHERE {in_shard(shard, self._names)}"

    def _parameters(self) -> dict[str, datetime | None]:
        return {"since": self.selection.since} if "$since" in WANTED[self.selection.refresh] else {}


def alike(there: pa.DataType, here: pa.DataType) -> bool:
    """Whether keys of the type `here` can be kept as `there`; numbers of another width can, if they fit."""
    exact = (pa.types.is_integer, pa.types.is_decimal)
    numbers = any(is_one(there) for is_one in exact) and any(is_one(here) for is_one in exact)
    return bool(there == here or numbers)


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
