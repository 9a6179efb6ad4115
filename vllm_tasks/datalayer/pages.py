"""Pages of rows as bytes, without pickle: rows are read with the types and values that were written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from io import BytesIO
from itertools import chain
from typing import IO, Any
from uuid import UUID

from vllm_tasks.datalayer.sources import Values
from vllm_tasks.datalayer.values import Number

PLAIN = {bool, float, int, str, type(None)}
"""Types that JSON has."""
TEXTS: dict[type, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    Decimal: (str, Decimal),
    UUID: (str, UUID),
    Number: (str, Number),
    timedelta: (
        lambda value: f"{value.days} {value.seconds} {value.microseconds}",
        lambda text: timedelta(*map(int, text.split())),
    ),
}
"""Types that are written as text, with their functions to text and back."""
DATES = (date, datetime, time)
"""Types that are written as their own few bytes, which `__reduce_ex__` returns and the constructor takes. The
bytes include `fold`, which distinguishes two equal clock times."""
LISTS: dict[type, Callable[[Sequence[Any]], Any]] = {list: list, tuple: tuple}
CLOCKS = (datetime, time)
DEEPEST = 50
"""Nested lists; values nested deeper stay in memory, as do values of types that are not listed here."""
NAMED: dict[str, type] = {kind.__name__: kind for kind in (*TEXTS, *DATES, *LISTS, bytes, dict, str)}


class Pages:
    """Writes rows column by column: a header in JSON with the types, then all texts and bytes in one block.

    Objects of other types, such as PostgreSQL's addresses and ranges, stay in memory; so do time zones.
    """

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._zones: dict[int, int] = {}
        """Numbers of time zones among the objects, by `id`."""

    def write(self, page: Sequence[Values], file: IO[bytes]) -> None:
        """Append a page of at least one row."""
        texts: list[bytes] = []
        columns = [self._packed(column, texts, 0) for column in zip(*page, strict=True)]
        header = json.dumps([len(page), columns], ensure_ascii=False).encode("utf-8", "surrogatepass")
        for block in (header, b"".join(texts)):
            file.write(len(block).to_bytes(8))
            file.write(block)

    def read(self, file: IO[bytes]) -> list[Values]:
        """The page at the file's position."""
        header, texts = (file.read(int.from_bytes(file.read(8))) for _ in range(2))
        rows, columns = json.loads(header.decode("utf-8", "surrogatepass"))
        left = BytesIO(texts)
        return list(zip(*(self._unpacked(c, left) for c in columns), strict=True)) or [()] * rows

    def _packed(self, column: Sequence[Any], texts: list[bytes], depth: int) -> Any:
        """The header of a column, as JSON; `texts` receives its texts and bytes."""
        kinds: set[Any] = set(map(type, column)) - {type(None)}
        if not kinds.isdisjoint(CLOCKS):
            kinds = set(map(_kind, column)) - {type(None)}
        if len(kinds) > 1 and not kinds <= PLAIN:
            return self._mixed(column, texts, depth)
        kind: Any = kinds.pop() if len(kinds) == 1 else type(None)
        kind, *zone = kind if isinstance(kind, tuple) else (kind,)
        if kind in (str, bytes):
            return [kind.__name__, *_joined(column, texts)]
        if kind in PLAIN:
            return ["", column]
        if kind in TEXTS:
            write = TEXTS[kind][0]
            return [kind.__name__, *_joined([None if v is None else write(v) for v in column], texts)]
        if kind in DATES:
            states = [None if v is None else v.__reduce_ex__(4)[1][0] for v in column]
            found = next(v for v in column if v is not None)
            return [kind.__name__, *_joined(states, texts), *(self._zone(found.tzinfo) for _ in zone)]
        if (kind in LISTS or kind is dict) and depth < DEEPEST:
            lengths = [None if v is None else len(v) for v in column]
            there = [v for v in column if v is not None]
            parts = [there] if kind in LISTS else [there, [v.values() for v in there]]
            inner = [self._packed([*chain.from_iterable(p)], texts, depth + 1) for p in parts]
            return [kind.__name__, lengths, *inner]
        self._objects += column
        return ["object", len(self._objects) - len(column), len(column)]

    def _mixed(self, column: Sequence[Any], texts: list[bytes], depth: int) -> Any:
        """A column of several kinds: each kind is written as a separate column."""
        kinds: dict[Any, list[Any]] = {}
        numbers: dict[Any, int] = {}
        order = []
        for value in column:
            kind = _kind(value)
            kinds.setdefault(kind, []).append(value)
            order.append(numbers.setdefault(kind, len(numbers)))
        return ["mixed", order, *(self._packed(some, texts, depth) for some in kinds.values())]

    def _zone(self, zone: Any) -> int:
        if id(zone) not in self._zones:
            self._zones[id(zone)] = len(self._objects)
            self._objects.append(zone)
        return self._zones[id(zone)]

    def _unpacked(self, header: Any, texts: BytesIO) -> Sequence[Any]:
        name, first, *rest = header
        if name == "":
            return list(first)
        if name == "object":
            return self._objects[first : first + rest[0]]
        if name == "mixed":
            columns = [iter(self._unpacked(some, texts)) for some in rest]
            return [next(columns[number]) for number in first]
        kind = NAMED[name]
        if kind in LISTS:
            return _split(self._unpacked(rest[0], texts), first, LISTS[kind])
        if kind is dict:
            pairs = list(zip(*(self._unpacked(some, texts) for some in rest), strict=True))
            return _split(pairs, first, dict)
        raw = texts.read(rest[0])
        if kind in DATES:
            zone = [self._objects[number] for number in rest[1:]]
            return [None if state is None else kind(state, *zone) for state in _split(raw, first)]
        if kind is bytes:
            return _split(raw, first)
        found = _split(raw.decode("utf-8", "surrogatepass"), first)
        if kind is str:
            return found
        read = TEXTS[kind][1]
        return [None if text is None else read(text) for text in found]


def _kind(value: Any) -> Any:
    """The kind of a value, which decides how it is written: its type, and for clock times also the zone."""
    kind = type(value)
    return (kind, id(value.tzinfo)) if kind in CLOCKS else kind


def _joined(column: Sequence[Any], texts: list[bytes]) -> tuple[list[int | None], int]:
    """The lengths of texts or bytes, and the total number of bytes."""
    lengths = [None if v is None else len(v) for v in column]
    some = [v for v in column if v]
    if some and isinstance(some[0], bytes):
        joined = b"".join(some)
    else:
        joined = "".join(some).encode("utf-8", "surrogatepass")
    texts.append(joined)
    return lengths, len(joined)


def _split(joined: Any, lengths: Sequence[int | None], made: Callable[[Any], Any] | None = None) -> list[Any]:
    """The reverse of `_joined`: a piece of each length, converted by `made`; None stays None."""
    found: list[Any] = []
    at = 0
    for length in lengths:
        if length is None:
            found.append(None)
            continue
        piece = joined[at : at + length]
        found.append(piece if made is None else made(piece))
        at += length
    return found
