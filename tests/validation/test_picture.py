"""The pictures of a validation as SVG: their contents, and any numbers and names in them."""

from __future__ import annotations

import base64
import re
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_tasks.validation.axis import Axis, number
from vllm_tasks.validation.picture import (
    Panel,
    Point,
    Row,
    compare_svg,
    histories_svg,
    markdown_image,
)

NAN, INF = float("nan"), float("inf")
BEGAN = datetime(2026, 9, 3, 14, 5, tzinfo=UTC)
SVG = "{http://www.w3.org/2000/svg}"


def point(value: float, low: float = NAN, high: float = NAN, *, passed: bool = True, day: float = 0) -> Point:
    return Point(BEGAN + timedelta(days=day), value, low, high, "", passed)


def parsed(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg.encode())
    assert root.tag == f"{SVG}svg"
    return root


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter(f"{SVG}text")]


def lines(svg: str, kind: str) -> list[str]:
    """The drawn lines of all elements of a kind, one string each."""
    found = [e.get("d", "") for e in parsed(svg).iter(f"{SVG}path") if e.get("class") == kind]
    return [line for drawn in found for line in re.findall("M[^M]*", drawn)]


def assert_inside(svg: str) -> None:
    """All coordinates are inside the picture."""
    root = parsed(svg)
    _, _, width, height = map(float, root.get("viewBox", "").split())
    places = [(e.get("x", ""), e.get("y", "")) for e in root.iter(f"{SVG}text")]
    for path in root.iter(f"{SVG}path"):
        x = y = ""
        for command, numbers in re.findall(r"([A-Za-z])([^A-Za-z]*)", path.get("d", "")):
            assert command in "MLHVh", "other commands are not looked at here"
            if command in "ML":
                x, y = numbers.split()
            elif command == "H":
                x = numbers
            elif command == "V":
                y = numbers
            places.append((x, y))
    assert places
    for x, y in places:
        assert 0 <= float(x) <= width
        assert 0 <= float(y) <= height


any_float = st.floats() | st.sampled_from([0.0, 1.0, 0.547, 12873.0, 5e-324, -1.7e308, 1.7e308])
any_point = st.builds(
    Point,
    at=st.datetimes(timezones=st.just(UTC)),
    value=any_float,
    low=any_float,
    high=any_float,
    label=st.text(max_size=40),
    passed=st.booleans(),
)
any_panel = st.builds(
    Panel,
    title=st.text(max_size=99),
    points=st.lists(any_point, max_size=12),
    threshold=st.none() | any_float,
    higher_is_better=st.booleans(),
)
any_row = st.builds(
    Row,
    name=st.text(max_size=80),
    value=any_float,
    low=any_float,
    high=any_float,
    passed=st.booleans(),
)


@settings(deadline=None)
@given(st.lists(any_panel, max_size=6))
def test_any_history_can_be_drawn(panels: list[Panel]) -> None:
    """The picture is XML, and inside its frame."""
    assert_inside(histories_svg([*panels, Panel("one", [])]))


@settings(deadline=None)
@given(st.lists(any_row, max_size=8))
def test_any_comparison_can_be_drawn(rows: list[Row]) -> None:
    """The picture is XML, and inside its frame."""
    assert_inside(compare_svg(rows, title="a metric"))


@settings(deadline=None)
@given(st.lists(any_float, max_size=8), st.integers(2, 8))
def test_an_axis_has_a_few_ticks_in_order(values: list[float], most: int) -> None:
    axis = Axis(values, None, 0, 100, most)
    assert 2 <= len(axis.ticks) <= most + 3
    assert axis.ticks == sorted(set(axis.ticks))
    assert all(0 <= axis(value) <= 100 for value in values if value == value)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.52, 0.574, ["0.52", "0.54", "0.56", "0.58"]),
        (0.0, 1.0, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
        (22.0, 25.1, ["22", "23", "24", "25", "26"]),
        (12100, 13400, ["12,000", "12,500", "13,000", "13,500"]),
        (1.0, 1.0, ["0.94", "0.96", "0.98", "1.00"]),
        (0.0, 0.0, ["0.00", "0.25", "0.50", "0.75", "1.00"]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[str]) -> None:
    """Equal values get an axis too, and shares are not drawn beyond 0 and 1."""
    axis = Axis([low, high], None, 0, 100, 4)
    assert [axis.written(tick) for tick in axis.ticks] == ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.547, "0.547"), (23.4, "23.4"), (12873, "12,873"), (0, "0"), (3.2e-9, "3.2e-09"), (NAN, "no value")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_a_run_that_failed_has_another_shape() -> None:
    """Passed runs are dots and failed runs crosses, each with its interval, and a legend explains both."""
    runs = [point(0.5, 0.4, 0.6), point(0.6, 0.5, 0.7, day=1), point(0.3, 0.2, 0.4, day=2, passed=False)]
    svg = histories_svg([Panel("exact_match", runs, 0.45)])

    legend = 1
    assert len(lines(svg, "p")) == 2 + legend
    assert len(lines(svg, "f")) == 2 * (1 + legend)
    assert (len(lines(svg, "p b")), len(lines(svg, "f b"))) == (2 + legend, 1)
    assert len(lines(svg, "h")) == 1 + legend
    assert {"passed", "failed the gate", "95 % interval", "threshold"} <= set(texts(svg))


def test_the_last_value_and_the_dates_are_written() -> None:
    svg = histories_svg([Panel("exact_match", [point(0.5), point(0.5474, day=1)], higher_is_better=False)])
    assert {"exact_match", "lower is better", "0.5474", "3 Sep", "4 Sep"} <= set(texts(svg))


def test_runs_of_one_day_are_told_apart_by_the_time() -> None:
    svg = histories_svg([Panel("exact_match", [point(0.5), point(0.6, day=1 / 24)])])
    assert {"3 Sep 14:05", "3 Sep 15:05"} <= set(texts(svg))


def test_a_value_that_is_none_is_said() -> None:
    svg = histories_svg([Panel("exact_match", [point(0.5), point(NAN, day=1)])])
    assert {"?", "no value"} <= set(texts(svg))


def test_a_hundred_runs_are_a_small_picture() -> None:
    runs = [point(0.5 + i / 1000, 0.4, 0.7, passed=i % 9 != 0, day=i) for i in range(100)]
    svg = histories_svg([Panel("exact_match", runs, 0.45)])
    assert len(svg) < 10_000
    assert_inside(svg)


def test_names_are_escaped_and_cut() -> None:
    """A name is text, and a long one keeps both its ends."""
    row = Row("<script>&" + "x" * 99 + "-awq", 0.5, 0.4, 0.6, True)
    svg = compare_svg([row], title='<b>&"\x00')
    assert '<b>&"\ufffd' in texts(svg)
    [name] = [text for text in texts(svg) if text.startswith("<script>&")]
    assert name.endswith("-awq")
    assert "…" in name


def test_the_image_holds_the_picture() -> None:
    """In Markdown, without an alternative text, beside which a browser that cannot show it draws an icon."""
    svg = histories_svg([Panel("Größe", [point(0.5)])])
    (data,) = re.fullmatch(r"!\[\]\(data:image/svg\+xml;base64,(.*)\)", markdown_image(svg)).groups()
    assert base64.b64decode(data).decode() == svg
