"""An axis of a picture: maps any numbers to pixels, with a few round ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeGuard

LARGEST = 1e150
"""Larger numbers are clamped to this, so that differences are finite."""


class Axis:
    """Maps values to pixels between `start` and `end`, with a few round ticks."""

    def __init__(
        self, values: Iterable[float], threshold: float | None, start: float, end: float, most: int
    ) -> None:
        self.start, self.end = start, end
        finite = [_clamped(v) for v in (*values, threshold) if drawable(v)] or [0.0]
        low, high = _widened(min(finite), max(finite))
        self._step = _round_step((high - low) / most)
        first, last = math.floor(low / self._step), math.ceil(high / self._step)
        self.ticks = [i * self._step for i in range(first, last + 1)]

    def __call__(self, value: float) -> float:
        """The position of a value in pixels; a value beyond the axis is placed at its end."""
        low, high = self.ticks[0], self.ticks[-1]
        fraction = (_clamped(value) - low) / (high - low)
        return self.start + min(max(fraction, 0.0), 1.0) * (self.end - self.start)

    def ends(self, value: float, low: float, high: float) -> tuple[float, float]:
        """The two ends of an interval in pixels; the value itself replaces a missing bound."""
        bounds = [value if math.isnan(bound) else bound for bound in (low, high)]
        return self(min(bounds)), self(max(bounds))

    def written(self, tick: float) -> str:
        largest = max(abs(self.ticks[0]), abs(self.ticks[-1]))
        if not 1e-4 <= largest < 1e7:
            return f"{tick:.3g}"
        decimals = max(0, -math.floor(math.log10(self._step) + 1e-9))
        decimals += round(self._step * 10**decimals, 6) % 1 != 0  # 0.25
        text = f"{tick:,.{decimals}f}"
        return text if len(text) <= 10 else f"{tick:.6g}"


def number(value: float) -> str:
    """A value as a short text: 0.547, 23.4, 12,873, 1.3e+09."""
    if not math.isfinite(value):
        return "no value"
    if 1000 <= abs(value) < 1e7:
        return f"{value:,.0f}"
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e7 else f"{value:.1e}"


def drawable(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _clamped(value: float) -> float:
    """A number whose differences and quotients are finite; NaN stays NaN."""
    return min(max(value, -LARGEST), LARGEST)


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range wider than 0 that does not cross 0 or 1 if the values do not."""
    extent = max(abs(low), abs(high))
    if high - low > max(extent * 1e-9, 1 / LARGEST):
        return low, high
    by = extent * 0.05 if extent > 1 / LARGEST else 1.0
    lower, upper = low - by, high + by
    return max(lower, 0.0) if low >= 0 else lower, min(upper, 1.0) if low >= 0 and high <= 1 else upper


def _round_step(least: float) -> float:
    """The next larger of 1, 2, 2.5, 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(least))
    return next((m * power for m in (1, 2, 2.5, 5) if m * power >= least * (1 - 1e-9)), 10 * power)
