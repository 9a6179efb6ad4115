"""Values that are kept as JSON come back as they were: equal, of one type, printing alike."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.beside import pandas
from vllm_tasks.datalayer.exact_json import dumps, identity, loads
from vllm_tasks.datalayer.values import Nanoseconds, Number, from_json

BERLIN = ZoneInfo("Europe/Berlin")
TWICE = dt.datetime(2024, 10, 27, 2, 30, tzinfo=BERLIN)
"""A clock in Berlin says it twice."""
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.decimals()
    | st.text(st.characters(codec=None))
    | st.binary()
    | st.dates()
    | st.times(timezones=st.just(dt.UTC) | st.none())
    | st.datetimes(timezones=st.timezones() | st.none(), allow_imaginary=False)
    | st.timedeltas()
    | st.uuids()
    | st.from_regex(r"-?[0-9]{1,30}\.[0-9]{1,30}([eE][+-]?[0-9]{1,3})?", fullmatch=True).map(Number)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters(codec=None)), inner)
        | st.dictionaries(st.sampled_from(["$decimal", "$object", "$text", "$other"]), inner)
        | st.dictionaries(st.integers() | st.dates() | st.tuples(st.integers()), inner)
    ),
    max_leaves=8,
)


def shape(value: Any) -> Any:
    """Everything that a function can see of a value, its type included."""
    if isinstance(value, Mapping):
        return [(shape(key), shape(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value]
    extra = (value.utcoffset(), value.tzname()) if isinstance(value, dt.datetime) else ()
    return type(value), repr(value) if isinstance(value, float) else str(value), str(value), *extra


@settings(deadline=None, max_examples=300)
@given(value=VALUES)
def test_any_value_comes_back(value: Any) -> None:
    """Values that a source can return survive at any depth."""
    text = dumps(value)
    assert text.isascii()
    assert shape(loads(text)) == shape(value)
    assert identity(value) == identity(loads(text))


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        -(10**5000),
        -0.0,
        math.inf,
        Number("12.50"),
        Number("1e5"),
        Number("3.14159265358979323846"),
        Number("NaN"),
        Number("-0"),
        Decimal("0E-10"),
        Decimal("1E+5"),
        Decimal("sNaN"),
        "\ud83d\ude00",
        "\ud800",
        "\0",
        {"\ud83d\ude00": 1},
        {"$decimal": "1"},
        {"$object": [["$decimal", {"$date": None}]]},
        {1: {None: {True: "x"}}, (1, ("a",)): 2},
        TWICE,
        TWICE.replace(fold=1),
        dt.datetime.min.replace(tzinfo=BERLIN),
        dt.datetime.max.replace(tzinfo=dt.timezone(dt.timedelta(hours=-5))),
        dt.datetime(1800, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1, seconds=12))),
        Nanoseconds.of(1_700_000_000_123_456_789, None),
        Nanoseconds.of(1_700_000_000_000_000_001, dt.UTC),
        Nanoseconds.of(-1, BERLIN),
        dt.time(1, 2, 3, 4, dt.UTC),
        dt.timedelta(days=-1, microseconds=1),
        dt.timedelta.max,
        UUID(int=7),
        b"\0\xff",
    ],
    ids=lambda value: ascii(value)[:30] if not isinstance(value, int) else "int",
)
def test_what_others_lose_comes_back(value: Any) -> None:
    """Size, scale, signs, digits, halves of characters, keys that look like a tag, zones and nanoseconds."""
    kept = loads(dumps(value))
    if isinstance(value, int):
        assert kept == value  # too long to print
    else:
        assert shape(kept) == shape(value)


def test_what_json_has_types_for_stays_plain() -> None:
    """A person who looks into the table can read the value."""
    data = {"a": [1, 2.5, True, None, "é"], "b": {"$x": 1, "y": {}}}
    assert dumps(data) == json.dumps(data)
    assert (
        dumps([Decimal("12.50"), dt.date(2024, 1, 2)]) == '[{"$decimal": "12.50"}, {"$date": "2024-01-02"}]'
    )
    assert loads(dumps((1, (2,)))) == [1, [2]]
    assert loads(dumps([bytearray(b"a"), memoryview(b"b")])) == [b"a", b"b"]


@pytest.mark.parametrize("value", [object(), {1, 2}, [{"x": len}], 1j, {"x": {frozenset()}}])
def test_what_no_source_gives_is_refused(value: Any) -> None:
    """The error names the value, which is not converted."""
    with pytest.raises(TypeError, match=" is a "):
        dumps(value)


def test_missing_dates_of_pandas_are_refused() -> None:
    """NaT would pass for a datetime, and a timedelta would lose pandas' nanoseconds."""
    for value in pandas().NaT, pandas().Timedelta(1, "ns"):
        with pytest.raises(TypeError, match=r"NaT|Timedelta"):
            dumps([value])
    assert str(loads(dumps(pandas().Timestamp(1, unit="ns")))) == "1970-01-01 00:00:00.000000001"


def test_a_value_has_one_identity_in_all_stores() -> None:
    """Order of keys and names of zones do not count; types, scale and digits do."""
    assert identity({"a": 1, "b": [{"d": 1, "c": 2}]}) == identity({"b": [{"c": 2, "d": 1}], "a": 1})
    assert identity({1: "a", 2: "b"}) == identity({2: "b", 1: "a"})
    at = dt.datetime(2024, 1, 2, 3, tzinfo=dt.UTC)
    assert identity([at]) == identity([at.replace(tzinfo=ZoneInfo("UTC"))])
    assert identity(from_json("12.5")) == identity(12.5)
    different = [
        1,
        1.0,
        "1",
        True,
        Decimal("1"),
        Decimal("1.0"),
        from_json("1.00"),
        b"1",
        [1],
        {"$decimal": "1"},
    ]
    assert len({identity(value) for value in different}) == len(different)
