"""Commits to a Delta table: one row, or one set of positions, per key, despite concurrent writers."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Sequence

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError

from vllm_tasks.datalayer.lake.columns import arrow_column, problem_of
from vllm_tasks.datalayer.lake.delta import ONCE, columns_of, dataset, local_files, open_table, quoted
from vllm_tasks.datalayer.lake.delta_shape import added_columns, arrow_schema, refuse_unwritable, with_added
from vllm_tasks.datalayer.selection import POSITION, Key, Row, Shard
from vllm_tasks.datalayer.shards import in_shard
from vllm_tasks.datalayer.storable import last_outputs
from vllm_tasks.datalayer.storage_errors import plain, storage_errors
from vllm_tasks.errors import TablesUnavailable
from vllm_tasks.places import without_secrets

logger = logging.getLogger(__name__)

ATTEMPTS = 100
FILE_BYTES = 4 << 20
"""Target size of compaction and merges. A redone row costs a new copy of its file, and the old copy stays for
readers of earlier versions: large files would make redoing expensive, in time and in disk."""
SMALL_FILES = 50
"""Small files from which on a table is compacted."""
COMPACT_EVERY = 200
"""Commits of this writer between two compactions."""
TAKEN = "_vllm_tasks_taken"
"""Hashes of the keys that the outputs hold and the caller does not know. 10 M keys take 80 MB, which DuckDB
spills, and 30 ms a commit; text keys themselves would take 400 MB and 400 ms. Two keys with the same hash
cost a merge, and nothing else."""


class DeltaWriter:
    """Commits to the Delta table at `url`, starting from the loaded version `delta`."""

    def __init__(
        self,
        url: str,
        schema: pa.Schema,
        key: Sequence[str],
        properties: WriterProperties,
        delta: DeltaTable,
        cursor: duckdb.DuckDBPyConnection,
        shard: Shard | None = None,
        *,
        redo_complete: bool = True,
    ) -> None:
        """`shard`: no other rows will be written, so others' keys need not be known.

        `redo_complete`: the caller's `redo` names all keys of a commit that the version `delta` holds.
        """
        self._url = url
        self._display = without_secrets(url)
        self._schema = schema
        self._key = pa.schema([schema.field(name) for name in key])
        self._properties = properties
        self._delta: DeltaTable | None = delta
        partitions = delta.metadata().partition_columns
        self._problems = [(f.name, problem_of(f, f.name in partitions)) for f in schema]
        self._known = set(delta.file_uris()) if redo_complete else set()
        """Files whose keys are in the caller's `redo` or in `TAKEN`."""
        self._cursor = cursor
        names = [f"n.{quoted(name)}" for name in key]
        self._in_shard = "" if shard is None else f" WHERE {in_shard(shard, names)}"
        with storage_errors("cannot keep the keys of the outputs"):
            cursor.execute(f"CREATE TEMP TABLE {TAKEN} (hash UBIGINT)")
        self._mine: pa.Table | None = None
        """The keys of the last commit, written or not; the next commit adds them to `TAKEN`."""
        self._commits = 0

    def commit(
        self, rows: Sequence[Row], redo: Collection[Key], before: Callable[[], None] | None = None
    ) -> None:
        """See `Writer.commit`; if `rows` has two outputs of one key, the later one is written."""
        self.replace(self._table(last_outputs(rows, self._key.names)), self._keys(redo), before)

    def replace(self, new: pa.Table, old: pa.Table, before: Callable[[], None] | None = None) -> None:
        """Commit the rows `new`, in the table's own columns, and remove the rows with the keys `old`."""
        if not (new.num_rows or old.num_rows):
            return
        if self._mine is not None:
            with storage_errors(f"cannot keep the keys of {self._display}"):
                self._remember(self._mine)
        # Set before anything is written: however this call ends (an interrupt, a lost acknowledgement), its
        # repetition must replace these keys and not append them again.
        self._mine = new.select(self._key.names)
        for attempt in range(ATTEMPTS):
            try:
                with storage_errors(f"cannot write {self._display}"):
                    delta = self._latest()
                    base = delta.version()
                    if before:
                        before()  # reads `base` or a later version, with which this attempt would conflict
                    self._write(delta, new, self._distinct(old, self._taken(new)))
                    self._know(delta, base)
                break
            except CommitFailedError as e:
                # A concurrent writer committed this version: read its keys, and try the next version. The
                # table stays open: its state is still that of `base`, and opening it takes 8 times as long.
                lost = e
                time.sleep(random.uniform(0, min(1.0, 0.02 * 1.5**attempt)))
            except BaseException:
                self._delta = None
                raise
        else:
            raise TablesUnavailable(
                f"cannot write {self._display}: concurrent writers were faster {ATTEMPTS} times: {lost}"
            ) from lost
        self._commits += 1
        if self._commits % COMPACT_EVERY == 0:
            self._compact()

    def unstorable(self, row: Row) -> str | None:
        """See `Writer.unstorable`."""
        for name, problem_of_value in self._problems:
            if problem := problem_of_value(row[name]):
                return f"column {name!r}: {problem}"
        for name in self._key.names:
            if row[name] is None:
                return f"column {name!r}: a key must not be NULL"
        return None

    def close(self) -> None:
        """See `Writer.close`."""
        if self._commits and self._compact():
            self._clean()
        self._commits = 0
        self._cursor.close()

    def _table(self, rows: Sequence[Row]) -> pa.Table:
        columns = [
            arrow_column(f.name, f.type, [row[f.name] for row in rows], bool((f.metadata or {}).get(b"json")))
            for f in self._schema
        ]
        return pa.table(columns, schema=self._schema)

    def _keys(self, keys: Collection[Key]) -> pa.Table:
        listed = list(keys)
        columns = [arrow_column(f.name, f.type, [k[i] for k in listed]) for i, f in enumerate(self._key)]
        return pa.table(columns, schema=self._key)

    def _distinct(self, *tables: pa.Table) -> pa.Table:
        return pa.concat_tables(tables).group_by(self._key.names).aggregate([]).select(self._key.names)

    def _latest(self) -> DeltaTable:
        """The latest version, after adding the keys that concurrent writers wrote since to `TAKEN`."""
        if self._delta is None:
            self._delta = open_table(self._url)
        else:
            self._delta.update_incremental()
        files = set(self._delta.file_uris())
        if files - self._known:
            # Files of a compaction or merge also hold keys known before: reading them again does no harm.
            self._remember(_only(self._delta, files - self._known, self._key))
            self._known = files
        return self._delta

    def _know(self, delta: DeltaTable, base: int) -> None:
        """After our own commit, mark its files as known if it is the only version since `base`.

        Otherwise there are files of concurrent writers, too, and the next `_latest` must read all their keys.
        """
        if delta.version() == base + 1:
            self._known = set(delta.file_uris())

    def _remember(self, rows: pa.Table | ds.Dataset) -> None:
        """Add the keys of `rows`, those of the shard, to `TAKEN`.

        DuckDB spills it: there may be more than memory holds.
        """
        self._cursor.register("_vllm_tasks_added", rows)
        query = f"SELECT {self._hash} FROM _vllm_tasks_added AS n{self._in_shard}"  # noqa: S608 - the names are quoted
        self._cursor.execute(f"INSERT INTO {TAKEN} {query}")
        self._cursor.unregister("_vllm_tasks_added")

    def _taken(self, new: pa.Table) -> pa.Table:
        """The keys of `new` that were written before, by any writer; rarely one more, with an equal hash."""
        keys = new.select(self._key.names)
        self._cursor.register("_vllm_tasks_new", keys)
        query = f"FROM _vllm_tasks_new AS n SEMI JOIN {TAKEN} AS t ON {self._hash} = t.hash"
        taken = self._cursor.sql(query).to_arrow_table().cast(self._key)
        self._cursor.unregister("_vllm_tasks_new")
        return taken

    @property
    def _hash(self) -> str:
        return f"hash({', '.join(f'n.{quoted(name)}' for name in self._key.names)})"

    def _write(self, delta: DeltaTable, new: pa.Table, old: pa.Table) -> None:
        if not old.num_rows:
            write_deltalake(
                delta, with_added(new, delta), mode="append",
                writer_properties=self._properties, commit_properties=ONCE,
            )  # fmt: skip
            return
        # A property may have been set since the run began; delta-rs would report it as a commit conflict.
        refuse_unwritable(delta, "give another predict_id")
        new = with_added(new, delta).select(self._schema.names)
        # Without `flatten`, a row is updated in place, so that users' values in added columns stay.
        keeps = POSITION not in self._schema.names and bool(added_columns(arrow_schema(delta).names))
        if keeps:
            old = old.join(new.select(self._key.names), self._key.names, join_type="left anti")
        on = " AND ".join(f"s.{quoted(n)} = t.{quoted(n)}" for n in self._key.names)
        merge = delta.merge(
            pa.concat_tables([_marked(self._tombstones(old), False), _marked(new, True)]),
            # One tombstone for each key to remove, and the new rows: unless rows are updated in place, the
            # new ones match nothing and are inserted.
            on if keeps else f"s._new = false AND {on}",
            source_alias="s", target_alias="t",
            streamed_exec=False,  # streamed, it would not skip files by the keys' bounds
            writer_properties=self._properties, commit_properties=ONCE,
        )  # fmt: skip
        ours = {quoted(n): f"s.{quoted(n)}" for n in self._schema.names}
        if keeps:
            merge = merge.when_matched_update(ours, predicate="s._new = true")
        merge.when_matched_delete(predicate="s._new = false").when_not_matched_insert(
            ours, predicate="s._new = true"
        ).execute()

    def _tombstones(self, old: pa.Table) -> pa.Table:
        """A row of the table for each of the keys `old`, with NULL in all other columns."""
        columns = [
            old[f.name] if f.name in old.column_names else pa.nulls(old.num_rows, f.type)
            for f in self._schema
        ]
        return pa.table(columns, schema=self._schema)

    def _compact(self) -> bool:
        """Merge many small files into few; returns whether it was done. A failure does no harm."""
        try:
            delta = self._latest()
            sizes = pa.table(delta.get_add_actions(flatten=True))["size_bytes"]
            if pc.sum(pc.less(sizes, FILE_BYTES // 2)).as_py() < SMALL_FILES:
                return False
            base = delta.version()
            # Despite ONCE, delta-rs itself retries a compaction after appends of concurrent writers.
            done = delta.optimize.compact(
                target_size=FILE_BYTES,
                max_concurrent_tasks=1,  # each holds files in memory
                writer_properties=self._properties,
                commit_properties=ONCE,
            )
            if done["numFilesAdded"]:
                self._know(delta, base)
        except CommitFailedError:
            self._delta = None  # a concurrent writer was faster: one of the two compacts next time
            return False
        except Exception as e:  # noqa: BLE001 - the rows are written in any case
            self._delta = None
            logger.warning("the small files of %s were not compacted: %s", self._display, plain(e))
            return False
        return True

    def _clean(self) -> None:
        try:
            # Files younger than Delta's retention of 7 days stay: a reader of an older version needs them.
            self._latest().vacuum(dry_run=False, full=True)
        except Exception as e:  # noqa: BLE001 - the rows are written in any case
            self._delta = None
            logger.warning("old files of %s were not removed: %s", self._display, plain(e))


def _only(delta: DeltaTable, files: set[str], columns: pa.Schema) -> ds.Dataset:
    """These columns of the rows of the table that are in these files."""
    names = {uri.rsplit("/", 1)[-1] for uri in files}  # each has a UUID
    if (folder := local_files(delta)) and all(found.is_file for found in folder.get_file_info(sorted(names))):
        return columns_of(delta, names, columns)
    whole = dataset(delta)  # on an object store, or with partitions, which are folders
    fragments = [f for f in whole.get_fragments() if f.path.rsplit("/", 1)[-1] in names]
    return ds.FileSystemDataset(fragments, whole.schema, whole.format, whole.filesystem)


def _marked(table: pa.Table, new: bool) -> pa.Table:
    return table.append_column("_new", pa.array([new] * table.num_rows, pa.bool_()))
