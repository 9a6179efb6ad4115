"""JSON that keeps every value of a source exactly and with its type.

Plain JSON data is written unchanged. A value for which JSON has no type becomes an object with one key that
names the type: `{"$decimal": "12.50"}`. An object that looks like one of these, or has keys that are not
texts, is written as pairs: `{"$object": [[key, value], ...]}`. The text is ASCII, so any table can hold it.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from vllm_tasks.datalayer.values import Nanoseconds, Number

PLAIN_BITS = 10_000
"""Bits of an int written as a number: Python refuses decimal numbers of more than 4,300 digits."""
NANOSECONDS_END = len("2024-01-02T03:04:05.000006789")
BETWEEN_HALVES = re.compile("(?<=[\ud800-\udbff])(?=[\udc00-\udfff])")
"""A position between two adjacent halves of a character, which JSON would combine into one character."""


def dumps(value: Any) -> str:
    """`value` as text for `loads`; a tuple becomes a list, a memoryview becomes bytes.

    Raises TypeError, naming the value, for an unknown type, and RecursionError for too deep nesting.
    """
    return json.dumps(_written(value))


def loads(text: str) -> Any:
    """The value that `dumps` wrote: equal, of the same type, and printed in the same way."""
    return json.loads(text, object_hook=_read)


def identity(value: Any) -> str:
    """As `dumps`, but independent of the order of keys and of the names of time zones.

    Values that print differently have different identities: 1 and 1.0, 12.5 and 12.50.
    """
    return json.dumps(_sorted(_written(value)), sort_keys=True)


# ---------------------------------------------------------------------- writing


def _written(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value if _is_whole(value) else {"$text": BETWEEN_HALVES.split(value)}
    if isinstance(value, int):
        return value if value.bit_length() <= PLAIN_BITS else {"$int": hex(value)}
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, Mapping):
        return _object(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, Sequence):
        return [_written(item) for item in value]
    for kind, (tag, write) in WRITTEN.items():
        if isinstance(value, kind):
            return {tag: write(value)}
    raise TypeError(f"{value!r:.100} is a {type(value).__name__}")


def _is_whole(text: str) -> bool:
    return text.isascii() or BETWEEN_HALVES.search(text) is None


def _float(value: float) -> Any:
    if isinstance(value, Number):
        return {"$number": str(value)}
    return float(value) if math.isfinite(value) else {"$float": str(float(value))}


def _object(value: Mapping[Any, Any]) -> Any:
    looks_like_a_tag = len(value) == 1 and str(next(iter(value))).startswith("$")
    if looks_like_a_tag or not all(isinstance(k, str) and _is_whole(k) for k in value):
        return {"$object": [[_written(key), _written(item)] for key, item in value.items()]}
    return {key: _written(item) for key, item in value.items()}


def _moment(value: datetime) -> Any:
    if value != value:  # NaT of pandas, which is a datetime
        raise TypeError(f"{value!r} is a missing value")
    zone = getattr(value.tzinfo, "key", None) or getattr(value.tzinfo, "zone", None)
    if zone is None or (fold := _fold(value, zone)) is None:
        return value.isoformat()
    return [value.isoformat(), zone, fold]


def _duration(value: timedelta) -> list[int]:
    if value != value or getattr(value, "nanoseconds", False):  # a NaT or Timedelta of pandas
        raise TypeError(f"{value!r} is a {type(value).__name__}")
    return [value.days, value.seconds, value.microseconds]


def _fold(value: datetime, zone: str) -> int | None:
    """Which of two equal clock times it is in its zone; None if this machine's zone data has neither."""
    try:
        known = ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError):
        return None
    clocks = (value.replace(tzinfo=known, fold=fold) for fold in (value.fold, 1 - value.fold))
    return next((clock.fold for clock in clocks if clock.utcoffset() == value.utcoffset()), None)


def _sorted(written: Any) -> Any:
    """The result of `_written`, with sorted pairs and without names of zones."""
    if isinstance(written, list):
        return [_sorted(item) for item in written]
    if not isinstance(written, dict):
        return written
    if (pairs := written.get("$object")) is not None and len(written) == 1:
        return {"$object": sorted((_sorted(pair) for pair in pairs), key=json.dumps)}
    if isinstance(moment := written.get("$datetime"), list) and len(written) == 1:
        return {"$datetime": moment[0]}
    return {key: _sorted(item) for key, item in written.items()}


# ---------------------------------------------------------------------- reading


def _read(found: dict[str, Any]) -> Any:
    if len(found) != 1:
        return found
    ((tag, value),) = found.items()
    return READ[tag](value) if tag in READ else found


def _read_object(pairs: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in pairs}


def _key(value: Any) -> Any:
    """The key of a dict: a list was a tuple before, since lists cannot be keys."""
    return tuple(map(_key, value)) if isinstance(value, list) else value


def _read_moment(written: str | list[Any]) -> datetime:
    text, zone, fold = (written, None, 0) if isinstance(written, str) else written
    clock = datetime.fromisoformat(text)  # drops digits beyond microseconds
    if zone is not None:
        clock = clock.replace(tzinfo=ZoneInfo(zone), fold=fold)
    fraction = text[:NANOSECONDS_END].partition(".")[2]
    if len(fraction) < 9 or not fraction.isdigit():
        return clock
    fine = Nanoseconds.combine(clock.date(), clock.timetz())
    fine.nanosecond = int(fraction[6:])
    return fine


WRITTEN: Mapping[type, tuple[str, Callable[[Any], Any]]] = {
    Decimal: ("$decimal", str),
    datetime: ("$datetime", _moment),  # before date, of which it is a subclass
    date: ("$date", date.isoformat),
    time: ("$time", time.isoformat),
    timedelta: ("$timedelta", _duration),
    UUID: ("$uuid", str),
}
READ: Mapping[str, Callable[[Any], Any]] = {
    "$bytes": base64.b64decode,
    "$date": date.fromisoformat,
    "$datetime": _read_moment,
    "$decimal": Decimal,
    "$float": float,
    "$int": lambda text: int(text, 16),
    "$number": Number,
    "$object": _read_object,
    "$text": "".join,
    "$time": time.fromisoformat,
    "$timedelta": lambda parts: timedelta(*parts),
    "$uuid": UUID,
}
