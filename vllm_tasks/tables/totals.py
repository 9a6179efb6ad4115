"""The estimate of a total over many rows from a random sample of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

LEVEL = 0.95
"""The confidence level of an interval."""


@dataclass(frozen=True)
class Total:
    """The estimate of a total, and its 95 % confidence interval from `low` to `high`."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, sample: Sequence[float], rows: int) -> Total:
        """Estimate the total over `rows` from the values of a simple random sample without replacement.

        The interval is Student's, with the correction for a finite population (Cochran 1977, Sampling
        Techniques, chapter 2); of all rows it is a point. It supposes that the mean of the sample is nearly
        normal: where a few rows have most of the tokens, it is too narrow. If all values are equal, as where
        `max_tokens` ends every answer, Student's interval would be a point; up to 3/n of the rows may still
        differ (the rule of three, Hanley and Lippman-Hand 1983), and they get twice their tokens or none. The
        total is never less than that of the sample itself. A sample that is not all of the rows has at
        least 8.
        """
        n, known = len(sample), math.fsum(sample)
        if n >= rows:
            return cls(known, known, known)
        mean = fmean(sample)
        spread = rows * math.sqrt(variance(sample, mean) / n * (1 - n / rows)) * quantile(n - 1)
        if min(sample) == max(sample):
            spread = 3 / n * (rows - n) * mean
        return cls(rows * mean, max(rows * mean - spread, known), rows * mean + spread)

    def __str__(self) -> str:
        return format(self, ",.0f")

    def __format__(self, how: str) -> str:
        if not how:
            return str(self)
        if self.low == self.high:
            return f"{self.value:{how}}"
        return f"{self.value:{how}} (95 % interval {self.low:{how}} to {self.high:{how}})"


def quantile(freedom: int) -> float:
    """The quantile of Student's t for a two-sided interval at `LEVEL` with at least 7 degrees of freedom.

    The expansion of Abramowitz and Stegun, 26.7.5, is within 0.0001 of it there.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / float(freedom) ** power for power, term in enumerate(terms))
