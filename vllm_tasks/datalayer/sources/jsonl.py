"""JSON lines and JSON documents as a source: every value depends on its own line alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from vllm_tasks.datalayer.sources import PART_BYTES, Part, Unreadable, Values
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.json_fields import MIXED, Fields, decode, value_texts
from vllm_tasks.datalayer.sources.json_keys import json_keys
from vllm_tasks.datalayer.sources.json_records import json_texts
from vllm_tasks.datalayer.sources.keys import known
from vllm_tasks.datalayer.sources.read_options import DEFAULTS, ReadOptions
from vllm_tasks.datalayer.storable import is_text
from vllm_tasks.datalayer.values import from_json
from vllm_tasks.errors import InvalidCall, TablesUnavailable, near

PIECE = PART_BYTES // 4
"""Characters of text that are decoded at once: Python's objects take several times as much memory."""
ROWS = 20_000
Decoded = Callable[[str], Any]


class JsonText(str):
    """The JSON text of a value, as in the file."""


@dataclass
class Piece:
    """Consecutive rows of one file."""

    file: DataFile
    lines: list[int] = field(default_factory=list)
    rows: list[Values] = field(default_factory=list)

    def where(self, row: int) -> str:
        return f"{self.file.display}, line {self.lines[row]}"


class JsonLines:
    """The `Source` of the .jsonl, .ndjson and .json files of one table."""

    def __init__(self, files: Sequence[DataFile], options: ReadOptions = DEFAULTS) -> None:
        self.files = files
        self.options = options
        self.left_out = Unreadable()
        if foreign := sorted(self.options.model_fields_set - {"encoding"}):
            raise InvalidCall(
                f"JSON has no {foreign[0]}: its only read option is `encoding`; leave the others out"
            )

    @cached_property
    def _fields(self) -> Fields:
        unreadable = Unreadable()
        return Fields(row for file in self.files for _, _, row in self._rows(file, unreadable, decode))

    def columns(self) -> Sequence[str]:
        return list(self._fields.kinds)

    def key_types(self, key: Sequence[str]) -> Sequence[pa.DataType]:
        return [self._fields.key_type(name) for name in key]

    def identified_by(self, key: Sequence[str]) -> bool:
        """See `Source.identified_by`: files guarantee nothing."""
        return False

    def keys(self, key: pa.Schema) -> Iterator[pa.Table]:
        for piece in self._pieces(key.names, Unreadable()):
            keys, _ = json_keys(piece.rows, key)
            yield keys.take(pa.array(known(keys)))

    def parts(self, key: pa.Schema, columns: Sequence[str], unreadable: Unreadable) -> Iterator[Part]:
        width = len(key)
        for piece in self._pieces([*key.names, *columns], unreadable):
            if not width:
                yield _part(pa.table({}), piece.rows)
                continue
            keys, wrong = json_keys(piece.rows, key)
            kept = known(keys).tolist()
            if len(kept) < len(piece.rows):
                for row in sorted(set(range(len(piece.rows))) - set(kept)):
                    unreadable.add(
                        piece.where(row), wrong.get(row, f"NULL for the key {', '.join(key.names)}")
                    )
                keys = keys.take(pa.array(kept, pa.int64()))
            if kept:
                yield _part(keys, [piece.rows[row][width:] for row in kept])

    def _rows(
        self, file: DataFile, unreadable: Unreadable, decoded: Decoded = from_json
    ) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """(line, text, object) of each JSON text that is an object."""
        for line, text in json_texts(file, self.options, unreadable):
            try:
                row = decoded(text)
            except RecursionError:
                why = "nested too deeply"
            except ValueError as e:
                why = f"no JSON: {getattr(e, 'msg', e)}"
                if text.strip() in ("{", "["):
                    why += "; if objects have several lines, let the file's name end in .json"
            else:
                if type(row) is dict:
                    yield line, text, row
                    continue
                why = "JSON, but not an object {...}"
                if type(row) is list:
                    why += "; if the file is one array of objects, let its name end in .json"
            unreadable.add(f"{file.display}, line {line}", why)

    def _pieces(
        self,
        columns: Sequence[str],
        unreadable: Unreadable,
        as_json: Sequence[str] = (),
        mixed: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """These columns of all rows. Columns in `as_json`, and values that are not text in the `mixed` ones,
        are given as `JsonText`."""
        for file in self.files:
            piece, size = Piece(file), 0
            for line, text, row in self._rows(file, unreadable):
                if piece.rows and (size + len(text) > PIECE or len(piece.rows) >= ROWS):
                    yield piece
                    piece, size = Piece(file), 0
                if put := [*as_json, *(name for name in mixed if type(row.get(name)) is not str)]:
                    _put_texts(row, text, put)
                piece.rows.append(tuple(map(row.get, columns)))
                piece.lines.append(line)
                size += len(text)
            if piece.rows:
                yield piece

    def close(self) -> None:
        """See `Source.close`: a file is open only while it is read."""

    def schema(self, columns: Sequence[str]) -> pa.Schema:
        """See `Streamed`: JSON if a column has values of several kinds, lists, objects, or numbers that a
        float would print differently."""
        if missing := [name for name in columns if name not in self._fields.kinds]:
            raise InvalidCall(f"there is no column {missing[0]!r:.200}{near(missing[0], self.columns())}")
        return pa.schema([(name, self._fields.stream_type(name)) for name in columns])

    def batches(self, schema: pa.Schema, unreadable: Unreadable) -> Iterator[pa.RecordBatch]:
        """See `Streamed`."""
        as_json = [name for name, kind in zip(schema.names, schema.types, strict=True) if _is_json(kind)]
        mixed = [name for name, kind in zip(schema.names, schema.types, strict=True) if kind == MIXED]
        for piece in self._pieces(schema.names, unreadable, as_json, mixed):
            try:
                try:
                    batch = _batch(piece.rows, schema)
                except (UnicodeEncodeError, pa.ArrowInvalid):
                    batch = _batch(_fitting(piece, schema, unreadable), schema)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as e:
                raise TablesUnavailable(f"{piece.file.display!r} has changed while it was read") from e
            yield batch


def _part(keys: pa.Table, values: Sequence[Values]) -> Part:
    def some(rows: Sequence[int]) -> Iterator[list[Values]]:
        if len(rows):
            yield [values[row] for row in rows]

    return Part(keys, some, rows=len(values))


def _is_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType)


def _mixed(values: Sequence[Any]) -> pa.Array:
    """A union of texts and of the JSON of other values."""
    texts = pa.array([value if type(value) is str else None for value in values], pa.string())
    others = [value if isinstance(value, JsonText) else None for value in values]
    json = pa.ExtensionArray.from_storage(MIXED[1].type, pa.array(others, pa.string()))
    kinds = pa.array([int(isinstance(value, JsonText)) for value in values], pa.int8())
    return pa.UnionArray.from_sparse(kinds, [texts, json], [MIXED[0].name, MIXED[1].name])


def _put_texts(row: dict[str, Any], text: str, as_json: Sequence[str]) -> None:
    found = value_texts(text)
    for name in as_json:
        if row.get(name) is not None:
            row[name] = JsonText(found[name])


def _batch(rows: Sequence[Values], schema: pa.Schema) -> pa.RecordBatch:
    columns = []
    for place, kind in enumerate(schema.types):
        values = [row[place] for row in rows]
        if kind == MIXED:
            columns.append(_mixed(values))
        elif _is_json(kind):
            columns.append(pa.ExtensionArray.from_storage(kind, pa.array(values, pa.string())))
        else:
            columns.append(pa.array(values, kind))
    return pa.record_batch(columns, schema=schema)


def _fitting(piece: Piece, schema: pa.Schema, unreadable: Unreadable) -> list[Values]:
    """The rows without values that Arrow cannot have, or would round."""
    kept = []
    for number, row in enumerate(piece.rows):
        wrong = (why for field, value in zip(schema, row, strict=True) if (why := _misfit(value, field)))
        if why := next(wrong, None):
            unreadable.add(piece.where(number), why)
        else:
            kept.append(row)
    return kept


def _misfit(value: Any, field: pa.Field) -> str | None:
    if isinstance(value, str) and not is_text(value):
        return f"{field.name[:50]!r} has half a character or a wrong byte"
    if pa.types.is_float64(field.type) and isinstance(value, int) and float(value) != value:
        return (
            f"{field.name[:50]!r} is {value}, which a SELECT would round, because other numbers there have a "
            "fraction; name the table itself"
        )
    return None
