"""Interleaved runs, and the statistics of their ratios."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Side = Callable[[int], float]
"""Does the work of a round (rounds count from 0) and returns its rate per second."""

SETTLE = 2.0
"""Seconds of rest before each run, because a vLLM worker spins for one second after its last work."""
NARROW = 0.02
"""An interval is narrow enough if it is within this fraction of the median."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Summary:
    """The median of some values, their extremes, and the 95 % interval of the median."""

    median: float
    lowest: float
    highest: float
    low: float
    high: float
    count: int

    def is_narrow(self) -> bool:
        """Whether the interval is within +-2 % of the median."""
        return max(self.high - self.median, self.median - self.low) <= NARROW * self.median

    def __str__(self) -> str:
        return (
            f"spread {self.lowest:.4g}..{self.highest:.4g}, "
            f"95 % interval of the median {self.low:.4g}..{self.high:.4g}"
        )


def summarize(values: Sequence[float]) -> Summary:
    """The summary of one or more values."""
    low, high = median_interval(values)
    return Summary(statistics.median(values), min(values), max(values), low, high, len(values))


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the median by the percentile bootstrap (Efron 1979), with a fixed seed."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]


def ratios(rates: Mapping[str, Sequence[float]], reference: str) -> dict[str, list[float]]:
    """The rates of each other side, divided by those of the reference in the same round."""
    return {
        name: [own / other for own, other in zip(values, rates[reference], strict=True)]
        for name, values in rates.items()
        if name != reference
    }


def in_turn(sides: Sequence[str], round_: int) -> list[str]:
    """The order of sides in a round. It alternates, so that each of two sides is first every other time.

    Of three sides, the middle one is always next to both others, so the reference should be in the middle.
    """
    return list(sides) if round_ % 2 else list(reversed(sides))


def interleave(sides: Mapping[str, Side], reference: str, least: int, most: int) -> dict[str, list[float]]:
    """The rates of each side, after a warm-up round that does not count.

    It stops after `least` rounds if every ratio's interval is narrow, otherwise after at most `most`.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(most + 1):
        for name in in_turn(list(sides), round_):
            time.sleep(SETTLE)
            rates[name].append(sides[name](round_))
        if round_ == 0:
            rates = {name: [] for name in sides}
            continue
        latest = {name: f"{values[-1]:.3f}" for name, values in ratios(rates, reference).items()}
        print(f"# pair {round_}: {latest}", file=sys.stderr, flush=True)
        summaries = [summarize(values) for values in ratios(rates, reference).values()]
        if round_ >= least and all(summary.is_narrow() for summary in summaries):
            break
    return rates


def line(measure: str, name: str, rates: Mapping[str, Sequence[float]], reference: str, unit: str) -> str:
    """The line `P<n> <median ratio> <what>` of one side against the reference."""
    ratio = summarize(ratios(rates, reference)[name])
    own, other = statistics.median(rates[name]), statistics.median(rates[reference])
    return (
        f"{measure} {ratio.median:.4f} {unit} of {name} / {reference}; {ratio}, {ratio.count} pairs; "
        f"medians {own:.4g} / {other:.4g} {unit}"
    )
