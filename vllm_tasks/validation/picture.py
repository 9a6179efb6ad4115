"""Pictures of metric values: small SVG text without dependencies, readable in light and in dark mode.

Runs that passed and runs that failed differ in colour and in shape.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from vllm_tasks.validation.axis import Axis, drawable, number
from vllm_tasks.validation.svg import CHARACTER, WIDTH, card, length, marks, path, px, shortened, write

DatasetReport = Any
"""A `vllm_tasks.validation.report.DatasetReport`, which imports this file by way of `notebook`."""

PADDING = 18
GAP = 32
"""Pixels between two panels."""
MARGIN = 20
"""Pixels between an axis and the first and the last run."""
LEGEND = 26
RUNS_SHOWN = 60
"""Runs in the picture. Under each date are the first digits of the rows' hash, which show if rows changed."""
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


@dataclass(frozen=True)
class Point:
    """A metric's value in one run, with its 95 % interval; `label` is written under the date."""

    at: datetime
    value: float
    low: float
    high: float
    label: str
    passed: bool


@dataclass(frozen=True)
class Panel:
    """One metric over the runs, oldest run first."""

    title: str
    points: Sequence[Point]
    threshold: float | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class Row:
    """One model's value of a metric, with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float
    passed: bool


def picture_of(report: DatasetReport) -> str:
    """An SVG of the last runs over a data set of this name; each metric has its own axis."""
    panels = []
    for value, verdict in zip(report.values, report.verdicts, strict=True):
        runs = [record for record in report.history if record.metric == value.metric][-RUNS_SHOWN:]
        points = [
            Point(r.created_at, r.value, r.low, r.high, r.dataset_hash[:4], r.reason is None) for r in runs
        ]
        panels.append(Panel(value.metric, points, verdict.threshold, value.higher_is_better))
    return histories_svg(panels)


def histories_svg(panels: Sequence[Panel]) -> str:
    """Metrics over the runs in one picture, each with its own axis: one metric in full width, several in two
    columns."""
    columns = 1 if len(panels) == 1 else 2
    width = (WIDTH - 2 * PADDING - (columns - 1) * GAP) / columns
    height = 232 if columns == 1 else 186
    drawn = [
        _history(
            panel,
            _Box(
                PADDING + (i % columns) * (width + GAP),
                PADDING + (i // columns) * (height + PADDING),
                width,
                height,
            ),
        )
        for i, panel in enumerate(panels)
    ]
    bottom = PADDING + math.ceil(len(panels) / columns) * (height + PADDING)
    legend = _legend(
        bottom + 4,
        [point.passed for panel in panels for point in panel.points],
        any(drawable(panel.threshold) for panel in panels),
    )
    return card(bottom + LEGEND, ", ".join(panel.title for panel in panels), [*drawn, legend])


def compare_svg(rows: Sequence[Row], *, title: str, higher_is_better: bool = True) -> str:
    """One metric of several models, in the order given: each has a line with mark, interval and value."""
    line = 28
    names = [shortened(row.name, 13, 280) for row in rows]
    values = [number(row.value) for row in rows]
    left = PADDING + max(map(length, names), default=0) * 13 * CHARACTER + 16
    right = WIDTH - PADDING - max(map(len, values), default=0) * 13 * CHARACTER - 16
    top = PADDING + 42
    bottom = top + line * len(rows) + 4
    axis = Axis([n for row in rows for n in (row.value, row.low, row.high)], None, left, right, 6)
    parts = [_head(_Box(PADDING, PADDING, WIDTH - 2 * PADDING, 0), title, None, higher_is_better)]
    parts += [path("g", (f"M{px(axis(tick))} {top}V{px(bottom)}" for tick in axis.ticks))]
    parts += [write(axis(tick), bottom + 18, axis.written(tick), anchor="middle") for tick in axis.ticks]
    middles = [top + line * (i + 0.5) + 2 for i in range(len(rows))]
    parts.append(_values(rows, middles, axis, 4.5, upright=False))
    for name, value, y in zip(names, values, middles, strict=True):
        parts.append(write(PADDING, y + 4.5, name, kind="n"))
        parts.append(write(WIDTH - PADDING, y + 4.5, value, kind="v", anchor="end"))
    parts.append(_legend(bottom + 42, [row.passed for row in rows], threshold=False))
    return card(bottom + 42 + LEGEND, title, parts)


def markdown_image(svg: str) -> str:
    """The picture embedded in Markdown, without a file: `![](data:...)`.

    It has no alternative text: the tables beside it have its values, and the new UI of Prefect 3.7, which
    shows no such picture, then leaves no mark of a broken image.
    """
    return f"![]({data_uri(svg)})"


def data_uri(svg: str) -> str:
    """The picture as a URI that needs no file."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


class _Measured(Protocol):
    """A `Point` or a `Row`."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def passed(self) -> bool: ...


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float


def _history(panel: Panel, box: _Box) -> str:
    points = panel.points
    labelled = any(point.label for point in points)
    top, bottom = box.y + 44, box.y + box.height - (34 if labelled else 20)
    axis = Axis([n for p in points for n in (p.value, p.low, p.high)], panel.threshold, bottom, top, 4)
    last = number(points[-1].value) if points else ""
    left = box.x + max(len(axis.written(tick)) for tick in axis.ticks) * 12 * CHARACTER + 8
    right = box.x + box.width - len(last) * 13 * CHARACTER - 12
    step = (right - left - 2 * MARGIN) / max(len(points) - 1, 1)
    positions = [left + MARGIN + step * i for i in range(len(points))]
    positions = [(left + right) / 2] if len(points) == 1 else positions
    size = min(max(step * 0.35, 2.0), 4.5)

    parts = [_head(box, panel.title, panel.threshold, panel.higher_is_better)]
    parts.append(path("g", (f"M{px(left)} {px(axis(tick))}H{px(right)}" for tick in axis.ticks)))
    parts += [write(left - 8, axis(tick) + 4, axis.written(tick), anchor="end") for tick in axis.ticks]
    if drawable(panel.threshold):
        parts.append(path("h", [f"M{px(left)} {px(axis(panel.threshold))}H{px(right)}"]))
    known = [(x, axis(p.value)) for x, p in zip(positions, points, strict=True) if drawable(p.value)]
    if known:
        parts.append(path("l", ["M" + "L".join(f"{px(x)} {px(y)}" for x, y in known)]))
    parts.append(_values(points, positions, axis, size, upright=True))
    unknown = [x for x, p in zip(positions, points, strict=True) if not drawable(p.value)]
    parts += [write(x, bottom - 4, "?", anchor="middle") for x in unknown]
    if points:
        y = axis(points[-1].value) + 4.5 if drawable(points[-1].value) else bottom - 4
        parts.append(write(positions[-1] + size + 6, y, last, kind="v"))
        parts.append(_dates(points, positions, bottom + 17, right - left))
    return "".join(parts)


def _values(
    measured: Sequence[_Measured],
    positions: Sequence[float],
    axis: Axis,
    size: float,
    *,
    upright: bool,
) -> str:
    """A mark and its interval for each finite value, at its position across the axis."""
    parts = []
    for passed in True, False:
        bars, centres = [], []
        for one, position in zip(measured, positions, strict=True):
            if one.passed is passed and drawable(one.value):
                start, end = axis.ends(one.value, one.low, one.high)
                centre = axis(one.value)
                centres.append((position, centre) if upright else (centre, position))
                bars.append(
                    f"M{px(position)} {px(start)}V{px(end)}"
                    if upright
                    else f"M{px(start)} {px(position)}H{px(end)}"
                )
        parts += [path("p b" if passed else "f b", bars), marks(centres, passed, size)]
    return "".join(parts)


def _dates(points: Sequence[Point], positions: Sequence[float], y: float, width: float) -> str:
    """Dates and labels under as many runs as fit into the width, with priority for the last run."""
    with_year = len({point.at.year for point in points}) > 1
    for with_time in False, True:
        dates = [_date(point.at, with_year, with_time) for point in points]
        slot = max(map(len, dates)) * 12 * CHARACTER + 14
        slot = max(slot, 96) if any(point.label for point in points) else slot
        shown = range(len(points) - 1, -1, -math.ceil(len(points) * slot / width))
        if len({dates[i] for i in shown}) == len(shown):
            break
    parts = [write(positions[i], y, dates[i], anchor="middle") for i in shown]
    labels = [(positions[i], shortened(points[i].label, 12, slot - 8)) for i in shown]
    parts += [write(x, y + 15, label, anchor="middle") for x, label in labels if label]
    return "".join(parts)


def _date(at: datetime, with_year: bool, with_time: bool) -> str:
    """A date that is the same in every locale, with the month as a word, so that it is not ambiguous."""
    return f"{at.day} {MONTHS[at.month - 1]}" + with_year * f" {at.year}" + with_time * f" {at:%H:%M}"


def _head(box: _Box, title: str, threshold: float | None, higher_is_better: bool) -> str:
    words = f"{'higher' if higher_is_better else 'lower'} is better"
    if drawable(threshold):
        words += f", threshold {number(threshold)}"
    text = shortened(title, 15, box.width)
    return write(box.x, box.y + 12, text, kind="t") + write(box.x, box.y + 29, words)


def _legend(y: float, passed: Sequence[bool], threshold: bool) -> str:
    """The meaning of the marks that are in the picture."""
    parts: list[str] = []
    x = float(PADDING)
    entries = [("p", "passed")] * (True in passed) + [("f", "failed the gate")] * (False in passed)
    entries += [("b", "95 % interval")] * bool(passed) + [("h", "threshold")] * threshold
    for kind, words in entries:
        width = 10 if kind in "pf" else 19
        if kind in "pf":
            parts.append(marks([(x + 5, y)], kind == "p", 4.5))
        else:
            style = kind if kind == "h" else "p b" if True in passed else "f b"
            parts.append(path(style, [f"M{px(x)} {px(y)}H{px(x + width)}"]))
        parts.append(write(x + width + 6, y + 4, words))
        x += width + 6 + len(words) * 12 * CHARACTER + 16
    return "".join(parts)
