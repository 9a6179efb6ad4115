"""The gate: a model passes if each value reaches its threshold and is not worse by more than chance.

One verdict raises a false alarm in at most 5 of 100 runs, however many limits it has. Three corrections of
the p-values see to that:

- metrics over the same rows count as one test (`familywise`);
- data sets have no rows in common, so the p-values are multiplied by the number of those with a limit;
- so are they by the number of baselines, and by the number of runs that a baseline was chosen from, since
  chance helped to choose it (`history.Baseline`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from statistics import NormalDist

from vllm_tasks.validation import Validation
from vllm_tasks.validation.history import Baseline
from vllm_tasks.validation.intervals import Z
from vllm_tasks.validation.report import Against, Record, Value, Verdict
from vllm_tasks.validation.statistics import ALPHA, Paired, regressed

logger = logging.getLogger(__name__)

SEEN = 0.9
"""The power for which the page says how many rows it takes."""
DROP = 0.05
"""The drop for which the page says how often it is seen: 5 points of a metric from 0 to 1, and otherwise this
fraction of the value."""


def number_of_tests(validation: Validation, dataset: str) -> int:
    """The number of tests that a verdict has besides those that `familywise` counts, for one data set.

    It is the number of data sets with a `max_regression`, times that of the kinds of tests on `dataset`: the
    one over its rows, and one for each metric of load, which is over runs.
    """
    limited = [m for m in validation.metrics if validation.limits(dataset, m.identifier)[1] is not None]
    of_load = sum(metric.measure().of_load for metric in limited)
    datasets = sum(
        any(validation.limits(d.identifier, m.identifier)[1] is not None for m in validation.metrics)
        for d in validation.datasets
    )
    return max(1, datasets) * max(1, of_load + (of_load < len(limited)))


def corrected(p: float, baseline: Baseline, baselines: int, tests: int) -> float:
    """The p-value of one comparison, with all comparisons of the verdict counted."""
    return min(1.0, p * baseline.chosen_from * baselines * tests)


def against_runs(value: Value, baseline: Baseline, records: Sequence[Record], tests: int) -> Against:
    """Compare a metric of load, such as latency: the new run among all runs over these rows.

    Load moves all rows of a run at once, so a run is one observation. If nothing changed, the new run is
    equally likely to be the slowest, the second slowest, and so on, of all of them: p is the fraction of the
    runs that are at least as slow. It is <= 0.05 from 19 earlier runs on. There is no interval.
    """
    sign = 1 if value.higher_is_better else -1
    as_bad = 1 + sum(sign * record.value <= sign * value.value for record in records)
    p = as_bad / (1 + len(records))
    paired = Paired(value.value - baseline.record.value, math.nan, math.nan, p, math.nan, value.n)
    return Against(baseline.kind, baseline.record.run, paired, min(1.0, p * tests))


def verdict(
    validation: Validation,
    dataset: str,
    value: Value,
    against: Sequence[Against] = (),
    untested: str | None = None,
) -> Verdict:
    """Check one value against its limits.

    Args:
        validation: The validation with the limits.
        dataset: Identifier of the data set.
        value: The value to check.
        against: The comparisons with earlier runs, the last run that passed first.
        untested: Why a `max_regression` cannot be tested; None: it can if there are comparisons.

    Returns:
        The verdict, with a reason if the value does not pass.
    """
    threshold, allowed = validation.limits(dataset, value.metric)
    if allowed is None:
        untested = None
    elif not against:
        untested = untested or "no earlier run over these rows passed and can be compared"
    if untested:
        logger.warning(
            "max_regression of %s on %s was not tested: %s; pin=True keeps the rows the same",
            value.metric, dataset, untested,
        )  # fmt: skip
    reasons = []
    if threshold is not None and (
        value.value < threshold if value.higher_is_better else value.value > threshold
    ):
        side = "below" if value.higher_is_better else "above"
        reasons.append(f"{value.metric} is {value}, {side} its threshold of {threshold:g}")
    for one in against:
        if allowed is not None and regressed(one.paired, allowed, value.higher_is_better, one.p_worse):
            reasons.append(_reason(value, one, allowed))
    tests = number_of_tests(validation, dataset)
    # Rows are no evidence of a load, so no number of them would show its drop.
    of_load = any(m.measure().of_load for m in validation.metrics if m.identifier == value.metric)
    seen = None if allowed is None or of_load else power(value, against, allowed, tests)
    if seen is not None:
        logger.info("%s on %s: %s", value.metric, dataset, seen)
    return Verdict(
        metric=value.metric,
        threshold=threshold,
        max_regression=allowed,
        against=tuple(against),
        untested=untested,
        reason="; ".join(reasons) or None,
        power=seen,
    )


def _reason(value: Value, against: Against, allowed: float) -> str:
    paired = against.paired
    which = "the best run" if against.kind == "best" else "the run"
    known = (
        ""
        if math.isnan(paired.low)
        else f"95 % interval of the difference {paired.low:.4g} to {paired.high:.4g}, "
    )
    return (
        f"{value.metric} is {value}, {abs(paired.difference):.4g} worse than in {which} {against.run} "
        f"({known}p={against.p_worse:.2g}); {allowed:g} is allowed"
    )


def power(value: Value, against: Sequence[Against], allowed: float, tests: int) -> str | None:
    """How often these rows show a drop of 5 points, or of twice what is allowed, and how many rows it takes.

    It takes the standard error of the difference from the comparison with the last run, and the normal
    distribution. Without a comparison it is that of two independent runs, which is the largest.
    """
    ends = [(a.paired.low, a.paired.high) for a in against if math.isfinite(a.paired.low)]
    low, high = ends[0] if ends else (math.sqrt(2) * value.low, math.sqrt(2) * value.high)
    error = (high - low) / (2 * Z)
    if not math.isfinite(error) or error <= 0:
        return None
    drop = max(DROP if abs(value.value) <= 1 else DROP * abs(value.value), 2 * allowed)
    normal = NormalDist()
    beyond = max(normal.inv_cdf(1 - ALPHA / (tests * max(1, len(against)))) * error, allowed)
    seen = normal.cdf((drop - beyond) / error)
    # Both conditions of the gate: beyond chance, and beyond the limit.
    width = normal.inv_cdf(1 - ALPHA / (tests * max(1, len(against)))) + normal.inv_cdf(SEEN)
    needed = max((width * error / drop) ** 2, (normal.inv_cdf(SEEN) * error / (drop - allowed)) ** 2)
    rows = math.ceil(value.n * needed)
    rows = round(rows, 2 - len(str(rows))) if rows > 99 else rows  # two digits
    text = f"with these {value.n:,} rows, a drop of {drop:.3g} is detected {100 * seen:.0f} times of 100"
    return text if seen >= SEEN else f"{text}; {100 * SEEN:.0f} times of 100 take {rows:,} rows"
