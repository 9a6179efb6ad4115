"""A deployable flow: score a model on data sets with known answers, and fail if it is worse than before.

prefect block register -m vllm_tasks                   # once per Prefect server
python -m vllm_tasks.flows.validate_model              # serve it; then run it from the UI
"""

# Without `from __future__ import annotations`: the process of a served run cannot resolve type names.

from typing import Annotated, Literal

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from vllm_tasks import Datalayer, Validation, VllmAPI, VllmModel
from vllm_tasks.flows._serve import serve
from vllm_tasks.results import ValidationReport
from vllm_tasks.tasks import validate_and_ask, validate_at_once

Seconds = Annotated[int, Field(ge=1)]


def run_name() -> str:
    """Return the model, as the UI displays it."""
    return f"validate {flow_run.parameters['model'].identifier}"


@flow(name="validate-model", flow_run_name=run_name)
def validate_model(
    model: VllmAPI | VllmModel,
    validation: Validation | None = None,
    db: Datalayer | None = None,
    resume: bool = True,
    reuse: bool = False,
    retry_failed: bool = False,
    max_failed: float | int | None = 0.05,
    context: str | None = None,
    sampling_columns: dict[str, str] | None = None,
    on_gate_failed: Literal["fail", "ask"] = "fail",
    approval_timeout: Seconds = 86_400,
) -> ValidationReport:
    """Score a model on data sets with known answers; the flow fails if the model is below its limits.

    With on_gate_failed="ask" it pauses instead, until a person approves or rejects the model in the UI. The
    values are saved in the block and in the history. An interrupted run is resumed.

    Args:
        model: A saved block: a vLLM API, or a vLLM Model.
        validation: Data sets, metrics and limits; None: the model's own.
        db: Where predictions and history go; None: the model's own.
        resume: Resume an interrupted run that began in the last 12 hours; if off, process all rows anew.
        reuse: Score the answers of the last run again, if the model's weights are known to be the same.
        retry_failed: Process the failed rows of an interrupted run again.
        max_failed: Rows that may fail, as a fraction (0.05) or a number (20); None: any number.
        context: Fills {context} in every prompt.
        sampling_columns: Columns of the data sets with sampling parameters of the row's own, by the
            parameter's name, such as {"max_tokens": "budget"}; NULL means the value that all rows share.
        on_gate_failed: If the model is below its limits: fail, or ask a person, for whom the flow run pauses.
        approval_timeout: Seconds to wait for the person; without an approval by then the flow fails.

    Returns:
        One report of all data sets.

    Raises:
        GateFailed: The model is below its limits, and no person approved it; everything is recorded.
        InvalidCall: Nobody could be asked, because this is not a flow run of a Prefect server.
    """
    options = {
        "db": db,
        "resume": resume,
        "reuse": reuse,
        "retry_failed": retry_failed,
        "max_failed": max_failed,
        "context": context,
        "sampling_columns": sampling_columns,
    }
    if on_gate_failed == "ask":
        # The caller of the flow gets the data of the state.
        return validate_and_ask(model, validation, timeout=approval_timeout, **options)  # type: ignore[return-value]
    return validate_at_once(model, validation, **options)


if __name__ == "__main__":
    serve(validate_model)
