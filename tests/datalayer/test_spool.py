"""Rows read aside come back as they were."""

from __future__ import annotations

import math
import resource
from collections import namedtuple
from contextlib import closing
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from ipaddress import ip_address
from tempfile import TemporaryFile
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa

from vllm_tasks.datalayer.pages import Pages
from vllm_tasks.datalayer.spool import LEAST, Spool
from vllm_tasks.datalayer.values import Number
from vllm_tasks.errors import TablesUnavailable

BERLIN = ZoneInfo("Europe/Berlin")
EARLY = datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN)
NAMED = timezone(timedelta(hours=1), "one")
Pair = namedtuple("Pair", "a b")
VALUES: dict[str, list[Any]] = {
    "bool": [True, False, None],
    "bytes": [b"\x00\xff", b"", None],
    "date": [date.min, date.max, None],
    "datetime": [datetime.min, datetime.max, datetime(2024, 1, 2, 3, 4, 5, 6), None],
    "decimal": [Decimal("12.50"), Decimal("1E+5"), Decimal("-0"), Decimal("NaN"), None],
    "deep": [[[[1, [b"x", None]]]], None],
    "dict": [{"a": 1, "b": [Decimal("1.0")]}, {}, {1: "$decimal", None: {"$x": 1}}, None],
    "float": [0.1, -0.0, math.inf, 1e300, None],
    "folded": [EARLY, EARLY.replace(fold=1), None],
    "int": [1, -(2**80), None],
    "list": [[1, 2], [], [None], None],
    "mixed": [1, True, 1.0, "1", b"1", Decimal(1), [1], (1,), None],
    "none": [None, None],
    "number": [Number("12.50"), Number("1e5"), None],
    "other": [ip_address("10.0.0.1"), Pair(1, 2), {1, 2}, bytearray(b"x"), None],
    "text": ["", "a\0b", "\ud83d\ude00", "\U0001f600", "é" * 100, "'\"\n", None],
    "time": [time(1, 2), time(1, 2, 3, 4, tzinfo=UTC), time(23, 59, fold=1), None],
    "timedelta": [timedelta(-1, 5, 7), timedelta.max, None],
    "uuid": [UUID(int=2**127), None],
    "zones": [datetime(2024, 1, 1, tzinfo=zone) for zone in (UTC, NAMED, BERLIN, None)],
}


def typed(value: Any) -> Any:
    """`value` beside all types in it, so that 1 and True differ; texts of floats, as NaN is not NaN."""
    if type(value) in (list, tuple, Pair):
        return type(value), [typed(item) for item in value]
    if type(value) is dict:
        return [(typed(key), typed(item)) for key, item in value.items()]
    zone = getattr(value, "tzinfo", None), getattr(value, "fold", None)
    return type(value), repr(value), str(value), zone


def told(rows: list[tuple[Any, ...]]) -> list[list[Any]]:
    return [[typed(value) for value in row] for row in rows]


@pytest.mark.parametrize("name", VALUES)
def test_values_keep_their_type(name: str) -> None:
    """Alone in a column, all of them in one, and as items of lists."""
    values = VALUES[name]
    nested: list[Any] = [values]
    for _ in range(100):
        nested = [nested]
    pages = [
        [(value,) for value in values],
        [(value, number) for number, value in enumerate(values)],
        *([(value, None)] for value in values),
        [tuple(values)],
        [(values, {"a": values})],
        [(nested,)],
    ]
    keeper = Pages()
    with TemporaryFile() as file:
        for page in pages:
            keeper.write(page, file)
        for _ in range(2):
            file.seek(0)
            assert [told(keeper.read(file)) for _ in pages] == list(map(told, pages))


def test_rows_without_columns_are_counted() -> None:
    """A table read for none of its columns has its rows all the same."""
    with TemporaryFile() as file:
        keeper = Pages()
        keeper.write([(), (), ()], file)
        file.seek(0)
        assert keeper.read(file) == [(), (), ()]


def test_a_temporary_folder_without_room_is_unavailable_and_not_an_end() -> None:
    """Rows of a table that do not fit there are read again later, as after a lost database."""
    rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 40) SELECT i, "
    wide: Any = sa.text(f"{rows} hex(zeroblob({LEAST // 32})) FROM n")
    engine = sa.create_engine("sqlite://")
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with closing(Spool(size=4)) as spool, engine.connect() as connection:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (LEAST // 2, hard)
        )  # a write beyond fails, as on a full disk
        try:
            with pytest.raises(TablesUnavailable, match=r"temporary folder '.*' \(TMPDIR\).*File too large"):
                spool.fill(connection, wide, all_rows=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    engine.dispose()
