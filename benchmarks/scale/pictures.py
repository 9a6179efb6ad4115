"""Curves with logarithmic axes, as SVG, on a card that is readable on light and dark pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from vllm_tasks.validation import svg

LEFT, RIGHT, TOP, BOTTOM = 72.0, 560.0, 70.0, 330.0
HEIGHT = 372.0
COLOURS = "#3b82f6", "#e8710a", "#0f9d76", "#a855f7", "#8a8f9c"
"""Each has a contrast of 3 or more with the card of both colour schemes."""
LABEL = 15.0
"""Least pixels between two labels."""

Curve = Sequence[tuple[float, float]]


def draw(title: str, says: str, across: str, up: str, curves: Mapping[str, Curve]) -> str:
    """A picture of curves: a title, what it says, the names of the axes, and curves by name.

    All coordinates are above 0.
    """
    points = [point for curve in curves.values() for point in curve]
    xs, ys = Axis([x for x, _ in points], LEFT, RIGHT), Axis([y for _, y in points], BOTTOM, TOP)
    parts = [
        svg.write(20, 26, title, kind="t"),
        svg.write(20, 44, says),
        svg.write(RIGHT, BOTTOM + 34, across, anchor="end"),
        svg.write(20, TOP - 8, up),
        svg.path("g", (f"M{svg.px(xs.at(x))} {svg.px(TOP)}V{svg.px(BOTTOM)}" for x in xs.ticks()), 1),
        svg.path("g", (f"M{svg.px(LEFT)} {svg.px(ys.at(y))}H{svg.px(RIGHT)}" for y in ys.ticks()), 1),
        *(svg.write(xs.at(x), BOTTOM + 17, number(x), anchor="middle") for x in xs.ticks()),
        *(svg.write(LEFT - 8, ys.at(y) + 4, number(y), anchor="end") for y in ys.ticks()),
    ]
    ends = {name: ys.at(curve[-1][1]) for name, curve in curves.items()}
    for (name, y), colour, curve in zip(labels(ends), COLOURS, curves.values(), strict=False):
        drawn = "L".join(f"{svg.px(xs.at(x))} {svg.px(ys.at(v))}" for x, v in curve)
        parts += [
            f'<path stroke="{colour}" stroke-width="2.2" stroke-linejoin="round" d="M{drawn}"/>',
            *(dot(xs.at(x), ys.at(v), colour) for x, v in curve),
            f'<path stroke="{colour}" stroke-width="9" d="M{svg.px(RIGHT + 14)} {svg.px(y)}h0"/>',
            svg.write(RIGHT + 24, y + 4, name, kind="n"),
        ]
    return svg.card(HEIGHT, title, parts)


def dot(x: float, y: float, colour: str) -> str:
    """A point of a curve; a line of length 0 with round ends is a dot."""
    return f'<path stroke="{colour}" stroke-width="5" d="M{svg.px(x)} {svg.px(y)}h0"/>'


class Axis:
    """A logarithmic axis from the least to the greatest of some values, between two pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self._low, self._high = math.log10(min(values)), math.log10(max(values))
        if self._high - self._low < 1:  # less than one decade: up to the decades around it
            self._low, self._high = math.floor(self._low), math.ceil(self._high + 1e-9)
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        """The pixel of a value."""
        along = (math.log10(value) - self._low) / (self._high - self._low)
        return self._start + along * (self._end - self._start)

    def ticks(self) -> Iterator[float]:
        """The powers of ten on the axis, and between them 2 and 5 if it is short."""
        steps = (1, 2, 5) if self._high - self._low <= 2 else (1,)
        for power in range(math.floor(self._low), math.ceil(self._high) + 1):
            for step in steps:
                if self._low - 1e-9 <= power + math.log10(step) <= self._high + 1e-9:
                    yield step * 10.0**power


def labels(ends: Mapping[str, float]) -> list[tuple[str, float]]:
    """The names with the pixels of their labels, in the given order, moved apart where they would overlap."""
    placed: dict[str, float] = {}
    last = -math.inf
    for name, y in sorted(ends.items(), key=lambda item: item[1]):
        last = placed[name] = max(y, last + LABEL)
    return [(name, placed[name]) for name in ends]


def number(value: float) -> str:
    """A number as a label: 0.01, 5, 2,000, 1 M."""
    if value >= 1_000_000:
        return f"{value / 1_000_000:g} M"
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"
