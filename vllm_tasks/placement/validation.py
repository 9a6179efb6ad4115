"""A validation that is done on a work pool."""

from __future__ import annotations

from typing import Any

from vllm_tasks.datalayer import Datalayer
from vllm_tasks.placement import payload
from vllm_tasks.placement.parameters import parameters
from vllm_tasks.placement.part import Part
from vllm_tasks.placement.payload import Model
from vllm_tasks.placement.runs import Runs
from vllm_tasks.placement.target import Target
from vllm_tasks.tables.arguments import datalayer_of
from vllm_tasks.validation import Validation
from vllm_tasks.validation.report import ValidationReport


def validated(
    target: Target,
    model: Model,
    validation: Validation | None,
    *,
    db: Datalayer | str | None,
    **options: Any,
) -> ValidationReport:
    """Run `vllm_tasks.validation.run.validate` on a work pool.

    Args:
        target: The deployment whose flow run does the work.
        model: The model; its `metric_values` are updated.
        validation: Data sets, metrics and limits; the model's own when None.
        db: As for `validate`.
        **options: The other arguments of `validate`.

    Returns:
        The report, whether the model is within its limits or not.

    Raises:
        VllmTasksError: As `validate` raises it.
    """
    parameter = payload.validation_parameter(validation or model.validation)
    call = {"work": "validation", "validation": parameter, "options": options}
    part = Part(f"validate {model.identifier}", parameters(call, model, datalayer_of(db, model)))
    (outcome,) = Runs(target, [part], repeatable=True).outcomes()
    assert outcome  # only a part beside others may have none
    report: ValidationReport = payload.value_of(outcome)
    model.metric_values.update(report.metric_values)
    return report
