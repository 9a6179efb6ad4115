"""The gate: a model passes if each value reaches its threshold and is not worse by more than chance."""

from __future__ import annotations

import logging

from vllm_tasks.validation import Validation
from vllm_tasks.validation.report import Value, Verdict
from vllm_tasks.validation.statistics import Paired, regressed

logger = logging.getLogger(__name__)


def verdict(
    validation: Validation, dataset: str, value: Value, paired: Paired | None, compared_with: str | None
) -> Verdict:
    """Check one value against its limits.

    Args:
        validation: The validation with the limits.
        dataset: Identifier of the data set.
        value: The value to check.
        paired: The comparison with the run `compared_with`; None without such a run.
        compared_with: Name of the run that the value is compared with.

    Returns:
        The verdict, with a reason if the value does not pass.
    """
    threshold, allowed = validation.limits(dataset, value.metric)
    untested = allowed is not None and paired is None
    if untested:
        logger.warning(
            "max_regression of %s was not tested: there is no earlier run over these rows of %s that passed "
            "and can be compared; pin=True keeps the rows the same", value.metric, dataset,
        )  # fmt: skip
    reasons = []
    if threshold is not None and (
        value.value < threshold if value.higher_is_better else value.value > threshold
    ):
        side = "below" if value.higher_is_better else "above"
        reasons.append(f"{value.metric} is {value}, {side} its threshold of {threshold:g}")
    if allowed is not None and paired is not None and regressed(paired, allowed, value.higher_is_better):
        drop = abs(paired.difference)
        reasons.append(
            f"{value.metric} is {value}, {drop:.4g} worse than in the run {compared_with} (95 % interval of "
            f"the difference {paired.low:.4g} to {paired.high:.4g}, p={paired.p_worse:.2g}); "
            f"{allowed:g} is allowed"
        )
    return Verdict(
        metric=value.metric,
        threshold=threshold,
        max_regression=allowed,
        paired=paired,
        compared_with=compared_with,
        untested=untested,
        reason="; ".join(reasons) or None,
    )
