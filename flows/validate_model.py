"""A deployable flow: score a model on data sets with known answers, every night, and fail when it got worse.

prefect block register -m vllm_tasks                   # once per Prefect server
python -m flows.validate_model --cron "0 4 * * *"      # serve it; then run it from the UI
"""

# Without `from __future__ import annotations`: the process of a served run cannot resolve texts for types.
import argparse

from prefect import flow
from prefect.runtime import flow_run

from vllm_tasks import (
    Datalayer,
    InvalidCall,
    Validation,
    ValidationReport,
    VllmAPI,
    VllmModel,
    validate,
)
from vllm_tasks.placement import place_of
from vllm_tasks.tasks import emit_verdict, passed, report_of


def run_name() -> str:
    """The model, as the UI shows it."""
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
    """Score a model on data sets with known answers; fails when it is below its limits.

    The values go onto the saved block and into the history; a run that was interrupted goes on.

    Args:
        model: A saved block: a vLLM API, or a vLLM Model.
        validation: Data sets, metrics and limits; None: the model's own.
        db: Where predictions and history go; None: the model's own.
        reuse: Score the answers of the last run again, where the model's weights are known to be the same.
        retry_failed: Ask the failed rows of an interrupted run again.
        max_failed: How many rows may fail, a share (0.05) or a count (20); None: any number.
        context: Fills `{context}` of every prompt.
    """
    chosen = validation or model.validation
    if chosen is None:
        raise InvalidCall(f"{model.identifier!r} has no validation: give one, or save one with the model")
    if place_of(model) is not None:  # there, one flow run with one engine asks all data sets
        return validate(
            model,
            chosen,
            db=db,
            reuse=reuse,
            retry_failed=retry_failed,
            max_failed=max_failed,
            context=context,
        )
    # All data sets at once, on one engine.
    runs = [
        validate.submit(
            model,
            chosen,
            db=db,
            datasets=[dataset.identifier],
            reuse=reuse,
            retry_failed=retry_failed,
            max_failed=max_failed,
            context=context,
        )
        for dataset in chosen.datasets
    ]
    for run in runs:  # all are recorded before one of them fails the flow
        run.wait()
    reports = [report_of(run) for run in runs]
    found = tuple(dataset for report in reports for dataset in report.datasets)
    report = ValidationReport(model.identifier, reports[0].fingerprint, found)
    emit_verdict(model, report)  # of all data sets together: no automation starts on a part
    return passed(report)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="Serve validate_model as a deployment.")
    arguments.add_argument("--name", default="validate-model", help="name of the deployment")
    arguments.add_argument("--cron", help="schedule, such as '0 4 * * *'")
    given = arguments.parse_args()
    validate_model.serve(name=given.name, cron=given.cron)
