"""Python values of the cells of any source, the same for runs and validations.

Bools, whole numbers, texts, bytes, dates, times, decimals and UUIDs (as text) are Python's own. A float of 32
or 16 bits becomes the float with the fewest digits that equals it at that width, so that 0.1 prints as 0.1.
Timestamps with a zone are in UTC; nanoseconds are kept. JSON is decoded, at any depth. A date that Python
lacks (the year 10000, infinity) becomes its text and affects only its own row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
BEFORE_CHRIST = re.compile(r"(?P<year>-\d+|0+)(?P<rest>-\d\d-\d\d.*)")
"""Numpy's text of a date before the year 1; it counts the year 0, which calendars do not have."""
MIDNIGHT = 24 * 60 * 60 * 1_000_000
"""Microseconds of a day."""
DIGITS = 4000
"""Maximum digits of a whole number of JSON that becomes an `int`; of a longer one, the text is kept."""


class Number(float):
    """A number of JSON that Python would print differently; `str` returns its text: `12.50`, `1e5`."""

    text: str

    def __new__(cls, text: str) -> Self:
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __str__(self) -> str:
        return self.text

    def __getnewargs__(self) -> tuple[str]:  # type: ignore[override]  # a text instead of a float
        return (self.text,)


class Nanoseconds(datetime):
    """A time with nine digits after the second; equal to, and ordered as, the one with six."""

    nanosecond: int = 0
    """0 to 999: the three digits beyond microseconds. Arithmetic drops them."""

    @classmethod
    def of(cls, since_epoch: int, zone: tzinfo | None) -> Self:
        """A time from nanoseconds since 1970 in UTC (without a zone, in local clock time)."""
        micros, nanos = divmod(since_epoch, 1000)
        at = EPOCH + timedelta(microseconds=micros)
        made = cls.combine(at.date(), at.time(), zone)
        made.nanosecond = nanos
        return made

    def isoformat(self, sep: str = "T", timespec: str = "auto") -> str:
        """As `datetime.isoformat`, with nanoseconds."""
        if not self.nanosecond:
            return super().isoformat(sep, timespec)
        whole = super().isoformat(sep, "microseconds")
        behind = len("2024-01-02T03:04:05.000006")
        return f"{whole[:behind]}{self.nanosecond:03}{whole[behind:]}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        at = datetime.combine(self.date(), self.time(), UTC)
        micros = (at - EPOCH) // timedelta(microseconds=1)
        return Nanoseconds.of, (micros * 1000 + self.nanosecond, self.tzinfo)


def number(text: str) -> float:
    """The number of a JSON text with a fraction or an exponent; it prints as `text`."""
    value = float(text)
    return value if repr(value) == text else Number(text)


def whole(text: str) -> int | float:
    """The whole number of a JSON text; with very many digits, a `Number`."""
    # Python refuses to convert more digits than that: the time is quadratic.
    return Number(text) if text == "-0" or len(text) > DIGITS else int(text)


_DECODER = json.JSONDecoder(parse_float=number, parse_int=whole, parse_constant=Number)


def from_json(text: str) -> Any:
    """The value of a JSON text, with all digits of its numbers; raises ValueError or RecursionError.

    NaN and Infinity, which Python and pandas write, are read as numbers.
    """
    return _DECODER.decode(text)


def python(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The values of an Arrow column, None for NULL."""
    if isinstance(column, pa.ChunkedArray):
        return [value for chunk in column.chunks for value in python(chunk)]
    convert = _special(column.type)
    if convert is not None:
        return convert(column)
    try:
        return list(column.to_pylist(maps_as_pydicts="strict"))
    except (ValueError, OverflowError, KeyError):
        return [_one(value) for value in column]


def _special(kind: pa.DataType) -> Callable[[Any], list[Any]] | None:
    """The function to read a column whose values Arrow's own conversion would change, else None."""
    if isinstance(kind, pa.BaseExtensionType):
        convert: Callable[[Any], list[Any]] = _EXTENSIONS.get(kind.extension_name, _stored)
        return convert
    if pa.types.is_float32(kind) or pa.types.is_float16(kind):
        return _short_floats
    if pa.types.is_timestamp(kind) and (kind.unit == "ns" or kind.tz not in (None, "UTC")):
        return _timestamps
    if pa.types.is_dictionary(kind):
        return lambda column: python(column.dictionary_decode())
    if pa.types.is_union(kind):
        return _union
    if pa.types.is_nested(kind) and any(_special(kind.field(i).type) for i in range(kind.num_fields)):
        return _nested
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return _durations
    if pa.types.is_time64(kind):
        return _times if kind.unit == "ns" else _times_to_midnight
    return None


def _stored(column: Any) -> list[Any]:
    return python(column.storage)


def _union(column: Any) -> list[Any]:
    """Each value converted by its own type."""
    return [python(pa.repeat(value.value, 1))[0] if value.is_valid else None for value in column]


def _json(column: Any) -> list[Any]:
    return [None if text is None else _decoded(text) for text in column.storage.to_pylist()]


def _decoded(text: str) -> Any:
    try:
        return from_json(text)
    except (ValueError, RecursionError):
        return text  # a column may be declared as JSON and hold something else


def _opaque(column: Any) -> list[Any]:
    """DuckDB's whole numbers of 128 bits; the bytes of its other types that Arrow lacks."""
    name = column.type.type_name
    raw = column.storage.to_pylist()
    if name not in ("hugeint", "uhugeint"):
        return list(raw)
    return [None if b is None else int.from_bytes(b, "little", signed=name == "hugeint") for b in raw]


_EXTENSIONS: Mapping[str, Callable[[Any], list[Any]]] = {
    "arrow.bool8": lambda column: list(column.to_pylist()),  # DuckDB's bools
    "arrow.json": _json,
    "arrow.opaque": _opaque,
    "arrow.uuid": lambda column: [None if u is None else str(u) for u in column.to_pylist()],
}


def _short_floats(column: Any) -> list[Any]:
    # numpy prints a float with just enough digits to distinguish it from its neighbours of the same width.
    floats = column.fill_null(0).to_numpy(zero_copy_only=False)
    known = column.is_valid().to_pylist()
    return [float(str(each)) if valid else None for each, valid in zip(floats, known, strict=True)]


def _timestamps(column: Any) -> list[Any]:
    kind = column.type
    zone = UTC if kind.tz is not None else None
    if kind.unit != "ns":
        return python(column.cast(pa.timestamp(kind.unit, "UTC")))
    return [None if n is None else _at(n, zone) for n in column.cast(pa.int64()).to_pylist()]


def _at(since_epoch: int, zone: tzinfo | None) -> datetime:
    if since_epoch % 1000:
        return Nanoseconds.of(since_epoch, zone)
    return (EPOCH + timedelta(microseconds=since_epoch // 1000)).replace(tzinfo=zone)


def _durations(column: Any) -> list[Any]:
    """Timedeltas; a duration that is not whole microseconds becomes text, in nanoseconds."""
    found = column.cast(pa.int64()).to_pylist()
    return [
        None if n is None else f"{n} ns" if n % 1000 else timedelta(microseconds=n // 1000) for n in found
    ]


def _times(column: Any) -> list[Any]:
    found = column.cast(pa.int64()).to_pylist()
    micros = python(pc.cast(column, pa.time64("us"), safe=False))
    return [
        time if n is None or n % 1000 == 0 else f"{time:%H:%M:%S.%f}{n % 1000:03}"
        for n, time in zip(found, micros, strict=True)
    ]


def _times_to_midnight(column: Any) -> list[Any]:
    """Times; the end of a day, which Python lacks and Arrow would take for its begin, is a text."""
    found = column.cast(pa.int64()).to_pylist()
    return [
        "24:00:00" if micros == MIDNIGHT else time
        for micros, time in zip(found, column.to_pylist(), strict=True)
    ]


def _nested(column: Any) -> list[Any]:
    kind = column.type
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        children = [python(child) for child in column.flatten()]
        rows = [dict(zip(names, values, strict=True)) for values in zip(*children, strict=True)]
        return [
            row if valid else None for row, valid in zip(rows, column.is_valid().to_pylist(), strict=True)
        ]
    return [None if not value.is_valid else _items(kind, value) for value in column]


def _items(kind: pa.DataType, value: Any) -> Any:
    """A list, or for a map a dict (a list of lists [key, value] if a key occurs twice)."""
    if not pa.types.is_map(kind):
        return python(value.values)
    keys, items = python(value.values.field(0)), python(value.values.field(1))
    made = dict(zip(keys, items, strict=True))
    return made if len(made) == len(keys) else list(map(list, zip(keys, items, strict=True)))


def _one(value: Any) -> Any:
    """A value that Python lacks: a date becomes its text, text that is not UTF-8 gets lone surrogates."""
    try:
        return value.as_py(maps_as_pydicts="strict")
    except (ValueError, OverflowError, KeyError):
        kind = value.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return value.cast(pa.binary()).as_py().decode("utf-8", "surrogateescape")
    if pa.types.is_struct(kind):
        return {kind.field(i).name: _one(value[i]) for i in range(kind.num_fields)}
    if pa.types.is_nested(kind):
        return _one_by_one(kind, value)
    return _far(value) if pa.types.is_date(kind) or pa.types.is_timestamp(kind) else str(value)


def _far(value: Any) -> str:
    """The text of a date that Python lacks; DuckDB's last dates are its infinities."""
    kind = value.type
    number = value.value
    most = 2**31 - 1 if pa.types.is_date32(kind) else 2**63 - 1
    if abs(number) == most:
        return "infinity" if number > 0 else "-infinity"
    unit: Any = "D" if pa.types.is_date32(kind) else "ms" if pa.types.is_date64(kind) else kind.unit
    text = str(np.datetime64(number, unit)).replace("T", " ")
    if number >= 0 or not (early := BEFORE_CHRIST.fullmatch(text)):
        return text
    return f"{1 - int(early['year']):04}{early['rest']} BC"


def _one_by_one(kind: pa.DataType, value: Any) -> Any:
    if not pa.types.is_map(kind):
        return [_one(item) for item in value.values]
    pairs = [[_one(pair[0]), _one(pair[1])] for pair in value.values]
    return dict(pairs) if len({repr(key) for key, _ in pairs}) == len(pairs) else pairs
