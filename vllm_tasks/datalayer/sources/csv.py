"""CSV and TSV files as a source: every cell is the text in the file.

A cell without any character is NULL; a cell of two quotes is the empty text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import pyarrow as pa

from vllm_tasks.datalayer.sources import Part, Unreadable, Values
from vllm_tasks.datalayer.sources.arrow import values_of
from vllm_tasks.datalayer.sources.csv_file import CsvFile
from vllm_tasks.datalayer.sources.csv_pass import Bad, Lost, Records
from vllm_tasks.datalayer.sources.csv_quotes import STRAY
from vllm_tasks.datalayer.sources.csv_strays import Key, Strays
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.keys import cast_keys, known, listed
from vllm_tasks.datalayer.sources.read_options import DEFAULTS, ReadOptions
from vllm_tasks.errors import InvalidCall, near


class Csv:
    """The `Source` of CSV and TSV files of one table; columns are matched by name, in any order."""

    def __init__(self, files: Sequence[DataFile], options: ReadOptions = DEFAULTS) -> None:
        self.files = [CsvFile(file, options) for file in files]
        self.left_out = Unreadable()
        self._lone: dict[str, set[Key]] = {}
        """By key (its schema as text), the keys of bad records that no other record has."""

    @cached_property
    def _names(self) -> list[list[str]]:
        """The names of the columns, by file."""
        return [file.names() for file in self.files]

    def columns(self) -> Sequence[str]:
        return list(dict.fromkeys(name for names in self._names for name in names))

    def key_types(self, key: Sequence[str]) -> Sequence[pa.DataType]:
        return [pa.string() for _ in key]

    def identified_by(self, key: Sequence[str]) -> bool:
        """See `Source.identified_by`: files guarantee nothing."""
        return False

    def keys(self, key: pa.Schema) -> Iterator[pa.Table]:
        strays = Strays()
        for file, _, places, records in self._records(key.names, Unreadable()):
            keys, _ = _keys(file, places, records, key)
            good = records.good.num_rows
            if records.bad:
                strays.add(keys.slice(good), _where(file, records.bad[-1].number))
            yield _known(keys.slice(0, good))
        lone = strays.without(self._good_keys(key), key) if strays else set()
        self._lone[str(key)] = lone
        if lone:
            columns = zip(*lone, strict=True)
            yield pa.table([pa.array(c, f.type) for c, f in zip(columns, key, strict=True)], schema=key)

    def _good_keys(self, key: pa.Schema) -> Iterator[pa.Table]:
        for file, _, places, records in self._records(key.names, Unreadable()):
            yield _known(_keys(file, places, replace(records, bad=()), key)[0])

    def _lone_keys(self, key: pa.Schema) -> set[Key]:
        """Keys of bad records alone, as found by the last complete pass over `keys`."""
        if str(key) not in self._lone:
            for _ in self.keys(key):
                pass
        return self._lone[str(key)]

    def parts(self, key: pa.Schema, columns: Sequence[str], unreadable: Unreadable) -> Iterator[Part]:
        for file, width, places, records in self._records([*key.names, *columns], unreadable):
            if not key.names:
                everything = range(records.good.num_rows + len(records.bad))
                yield _part(pa.table({}), everything, places, records, columns, width)
                continue
            keys, wrong = _keys(file, places, records, key)
            kept = self._kept(keys, records, key)
            if len(kept) < keys.num_rows:
                _count_unreadable(file, key, keys.num_rows, kept, wrong, records, width, unreadable)
                keys = keys.take(pa.array(kept, pa.int64()))
            if keys.num_rows:
                yield _part(keys, kept, places, records, columns, width)

    def _kept(self, keys: pa.Table, records: Records, key: pa.Schema) -> list[int]:
        """The rows with a unique key: good ones, then bad ones."""
        kept: list[int] = known(keys).tolist()
        if not records.bad:
            return kept
        good = records.good.num_rows
        bad = [row for row in kept if row >= good]
        lone = self._lone_keys(key)
        own = {row for row, found in zip(bad, listed(keys, bad), strict=True) if found in lone}
        return [row for row in kept if row < good or row in own]

    def _records(
        self, columns: Sequence[str], unreadable: Unreadable
    ) -> Iterator[tuple[CsvFile, int, Mapping[str, int | None], Records]]:
        """The records of all files, with each file's width and the positions of these columns in it."""
        for file, names in zip(self.files, self._names, strict=True):
            places = {name: _place(file, names, name) for name in columns}
            wanted = sorted({place for place in places.values() if place is not None})
            for found in file.records(len(names), wanted) if names else ():
                if isinstance(found, Lost):
                    unreadable.add(_where(file, found.number), found.why)
                elif found.good.num_rows or found.bad:
                    yield file, len(names), places, found

    def close(self) -> None:
        """See `Source.close`: a file is open only while it is read."""

    def schema(self, columns: Sequence[str]) -> pa.Schema:
        """See `Streamed`: all columns are text."""
        if missing := [name for name in columns if name not in self.columns()]:
            raise InvalidCall(f"there is no column {missing[0]!r:.200}{near(missing[0], self.columns())}")
        for file, names in zip(self.files, self._names, strict=True):
            for name in columns:
                _place(file, names, name)  # refuses a column that occurs twice
        return pa.schema([(name, pa.string()) for name in columns])

    def batches(self, schema: pa.Schema, unreadable: Unreadable) -> Iterator[pa.RecordBatch]:
        """See `Streamed`."""
        for file, width, places, records in self._records(schema.names, unreadable):
            for bad in records.bad:
                unreadable.add(_where(file, bad.number), _why(bad, width))
            found = [_texts(_column(records, places[name]), name) for name in schema.names]
            wrong = {row: why for _, misfits in found for row, why in misfits.items()}
            for row, why in sorted(wrong.items()):
                unreadable.add(_where(file, records.number(row)), why)
            batch = pa.record_batch([column for column, _ in found], schema=schema)
            if wrong:
                batch = batch.take(pa.array([i for i in range(batch.num_rows) if i not in wrong], pa.int64()))
            yield batch


def _place(file: CsvFile, names: Sequence[str], name: str) -> int | None:
    if names.count(name) > 1:
        raise InvalidCall(
            f"{file.file.display!r} has {names.count(name)} columns named {name!r:.200}; rename them in the "
            "file, or leave its first record out and give the names: read={table: {'header': [...]}}"
        )
    return names.index(name) if name in names else None


def _where(file: CsvFile, number: int) -> str:
    return f"{file.file.display}, record {number}"


def _why(bad: Bad, width: int) -> str:
    if STRAY in bad.text:
        return (
            f"the record {bad.number} has text behind a closing quote; if backslashes escape quotes, say so: "
            'read={table: {"escape": "\\\\"}}'
        )
    return f"the record {bad.number} has {bad.cells} cells, where the header has {width}"


def _column(records: Records, place: int | None) -> pa.Array:
    """The column as bytes; NULL if the file lacks it."""
    if place is None:
        return pa.nulls(records.good.num_rows, pa.binary())
    return records.good.column(str(place))


def _texts(column: pa.Array, name: str) -> tuple[pa.Array, dict[int, str]]:
    """The bytes as texts, and by row number why some are not text."""
    try:
        return column.cast(pa.string()), {}
    except pa.ArrowInvalid:
        pass
    values: list[str | None] = []
    wrong = {}
    for row, value in enumerate(column.to_pylist()):
        try:
            values.append(None if value is None else value.decode())
        except UnicodeDecodeError:
            values.append(None)
            wrong[row] = f"{name[:50]!r} is not text in the file's encoding; give it, if it is another one"
    return pa.array(values, pa.string()), wrong


def _keys(
    file: CsvFile, places: Mapping[str, int | None], records: Records, key: pa.Schema
) -> tuple[pa.Table, dict[int, str]]:
    """The keys of the good records, then of the bad ones; and by row number why some have none."""
    cells = file.cells(records.bad, [places[name] for name in key.names])
    columns, wrong = [], {}
    for i, name in enumerate(key.names):
        column = _column(records, places[name])
        if cells:
            column = pa.concat_arrays([column, pa.array([row[i] for row in cells], pa.binary())])
        texts, misfits = _texts(column, name)
        columns.append(texts)
        wrong.update(misfits)
    keys, misfits = cast_keys(pa.table(columns, names=key.names), key)
    return keys, {**misfits, **wrong}


def _known(keys: pa.Table) -> pa.Table:
    return keys.take(pa.array(known(keys)))


def _count_unreadable(
    file: CsvFile,
    key: pa.Schema,
    rows: int,
    kept: Sequence[int],
    wrong: Mapping[int, str],
    records: Records,
    width: int,
    unreadable: Unreadable,
) -> None:
    """Add the rows without a unique key to `unreadable`."""
    good = records.good.num_rows
    for row in sorted(set(range(rows)) - set(kept)):
        bad = records.bad[row - good] if row >= good else None
        number = bad.number if bad else records.number(row)
        why = wrong.get(row) if bad is None else _why(bad, width)
        unreadable.add(_where(file, number), why or f"NULL for the key {', '.join(key.names)}")


def _part(
    keys: pa.Table,
    kept: Sequence[int],
    places: Mapping[str, int | None],
    records: Records,
    columns: Sequence[str],
    width: int,
) -> Part:
    good = records.good.num_rows
    errors = {i: _why(records.bad[row - good], width) for i, row in enumerate(kept) if row >= good}
    # UTF-8 is not checked here: a text that is not UTF-8 fails where it is used, in its own row.
    texts = pa.table({name: _column(records, places[name]).view(pa.string()) for name in columns or places})

    def values(rows: Sequence[int]) -> Iterator[list[Values]]:
        readable = [kept[i] for i in rows if i not in errors]
        yield from values_of(texts, columns, readable)
        if without := len(rows) - len(readable):  # they are the last ones
            yield [()] * without

    return Part(keys, values, errors, len(kept))
