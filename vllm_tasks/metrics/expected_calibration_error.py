"""Expected calibration error: the sum over bins of (rows of the bin / all rows) * |fraction of right labels -
mean of p|, where p is the probability of a row's label, by which rows are sorted into `bins` of equal width.

From 0 to 1, lower is better. Guo et al. 2017, https://arxiv.org/abs/1706.04599, with 10 bins instead of 15.
The value of a few rows is too high by chance, and a model that gives every row the same probability may have
0: look at brier too. It needs answers with probabilities. Failed rows are left out.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.classes import class_of, probabilities_of, target_class
from vllm_tasks.metrics.measure import Bin, Measure, Reliability, Sums

NAME = "expected_calibration_error"
MOST_BINS = 100
ONE_SIDED = 1.645
"""Standard deviations that 95 of 100 draws of a normal distribution do not exceed."""


def score(predictions: Sequence[Any], targets: Sequence[Any], *, bins: int = 10) -> Sums:
    """Return the row's counts by bin, the function from their sums to the error, and the bins as a table.

    Args:
        predictions: The answers in row order, with their probabilities; None for a failed row, which counts
            nowhere.
        targets: The right class of each row.
        bins: Number of bins, from 1 to 100.

    Raises:
        InvalidCall: A target is a list, an answer has no probabilities, or `bins` is not such a number.
    """
    if type(bins) is not int or not 1 <= bins <= MOST_BINS:
        raise InvalidCall(f"{NAME}: bins={bins!r:.100} must be a whole number from 1 to {MOST_BINS}")
    rows = [_vector(p, t, bins) for p, t in zip(predictions, targets, strict=True)]
    complete = [math.fsum(column) for column in zip(*rows, strict=True)]
    return Sums(
        rows, lambda sums: _error(sums, bins), _reliability(complete, bins), excess=_excess(complete, bins)
    )


def _vector(prediction: Any, target: Any, bins: int) -> list[float]:
    """Return for each bin the row's count, its probability, and whether it is right: 0 in all but one."""
    wanted = target_class(target, None, NAME).casefold()
    vector = [0.0] * (3 * bins)
    if prediction is not None:
        probability = max(probabilities_of(prediction, NAME).values())
        # Bins are open below, as in the paper: 0.8 is in (0.7, 0.8].
        place = bisect_left([i / bins for i in range(1, bins)], probability)
        vector[place] = 1.0
        vector[bins + place] = probability
        vector[2 * bins + place] = float(class_of(prediction, NAME) == wanted)
    return vector


def _error(sums: Sequence[float], bins: int) -> float:
    if not (rows := math.fsum(sums[:bins])):
        return math.nan
    probable, right = sums[bins : 2 * bins], sums[2 * bins :]
    return math.fsum(abs(r - p) for p, r in zip(probable, right, strict=True)) / rows


def _excess(sums: Sequence[float], bins: int) -> float:
    """Return what the error is at most in 95 of 100 sets if labels are as often right as they are probable.

    Each bin then adds |N(0, s)|, a half-normal, with a mean of s * sqrt(2 / pi) and a variance of
    s^2 * (1 - 2 / pi), where s^2 is the binomial variance of its right labels.
    """
    pairs = zip(sums[:bins], sums[bins : 2 * bins], strict=True)
    deviations = [math.sqrt(max(0.0, p * (1 - p / n))) for n, p in pairs if n]
    mean, spread = (
        math.sqrt(2 / math.pi) * math.fsum(deviations),
        math.sqrt(1 - 2 / math.pi) * math.hypot(*deviations),
    )
    return (mean + ONE_SIDED * spread) / (math.fsum(sums[:bins]) or 1.0)


def _reliability(sums: Sequence[float], bins: int) -> Reliability:
    counts, probable, right = sums[:bins], sums[bins : 2 * bins], sums[2 * bins :]
    return Reliability(
        tuple(
            Bin(i / bins, (i + 1) / bins, int(n), p / n, r / n)
            for i, (n, p, r) in enumerate(zip(counts, probable, right, strict=True))
            if n
        )
    )


MEASURE = Measure(score, kind="sums", asks="probabilities", higher_is_better=False, miss=None)
