"""A deployable flow: score a model on data sets with known answers, and fail if it is worse than before.

prefect block register -m vllm_tasks                   # once per Prefect server
python -m vllm_tasks.flows.validate_model --cron "0 4 * * *"      # serve it; then run it from the UI
"""

# Without `from __future__ import annotations`: the process of a served run cannot resolve type names.

from prefect import flow
from prefect.runtime import flow_run

from vllm_tasks import Datalayer, Validation, VllmAPI, VllmModel
from vllm_tasks.flows._serve import serve
from vllm_tasks.results import ValidationReport
from vllm_tasks.tasks import validate_at_once


def run_name() -> str:
    """Return the model, as the UI displays it."""
    return f"validate {flow_run.parameters['model'].identifier}"


@flow(name="validate-model", flow_run_name=run_name)
def validate_model(
    model: VllmAPI | VllmModel,
    validation: Validation | None = None,
    db: Datalayer | None = None,
    reuse: bool = False,
    retry_failed: bool = False,
    max_failed: float | int | None = 0.05,
    context: str | None = None,
) -> ValidationReport:
    """Score a model on data sets with known answers; the flow fails if the model is below its limits.

    The values are saved in the block and in the history. An interrupted run is resumed.

    Args:
        model: A saved block: a vLLM API, or a vLLM Model.
        validation: Data sets, metrics and limits; None: the model's own.
        db: Where predictions and history go; None: the model's own.
        reuse: Score the answers of the last run again, if the model's weights are known to be the same.
        retry_failed: Process the failed rows of an interrupted run again.
        max_failed: Rows that may fail, as a fraction (0.05) or a number (20); None: any number.
        context: Fills `{context}` in every prompt.

    Returns:
        One report of all data sets.

    Raises:
        GateFailed: The model is below its limits; everything is recorded.
    """
    return validate_at_once(
        model,
        validation,
        db=db,
        reuse=reuse,
        retry_failed=retry_failed,
        max_failed=max_failed,
        context=context,
    )


if __name__ == "__main__":
    serve(validate_model, cron="0 4 * * *")
