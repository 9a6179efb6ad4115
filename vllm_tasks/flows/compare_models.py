"""A deployable flow: several models on the same data sets, side by side.

prefect block register -m vllm_tasks      # once per Prefect server
python -m vllm_tasks.flows.compare_models            # serve it; then run it from the UI
"""

# Without `from __future__ import annotations`: the process of a served run cannot resolve type names.

from prefect import flow

from vllm_tasks import Datalayer, Validation, VllmAPI, VllmModel, compare, validate
from vllm_tasks.flows._serve import serve
from vllm_tasks.results import Comparison
from vllm_tasks.tasks import report_of
from vllm_tasks.validation import check_comparable


@flow(name="compare-models")
def compare_models(
    models: list[VllmAPI | VllmModel],
    validation: Validation,
    db: Datalayer | None = None,
    max_failed: float | int | None = 0.05,
    context: str | None = None,
) -> Comparison:
    """Score several models on the same data sets and compare them row by row with the first.

    Models on servers run at once. Local models run one after another, since their engines would not fit
    together. A model below its limits is reported, but does not fail the flow.

    Args:
        models: Saved blocks; the others are compared with the first.
        validation: Data sets, metrics and limits, the same for all.
        db: Where predictions and history go; None: the first model's own.
        max_failed: Rows that may fail, as a fraction (0.05) or a number (20); None: any number.
        context: Fills {context} in every prompt.

    Returns:
        The comparison, row by row.

    Raises:
        InvalidCall: Two models have one identifier.
    """
    check_comparable([model.identifier for model in models])  # before any request is sent
    db = db or models[0].db
    runs = {}
    for model in sorted(models, key=lambda model: isinstance(model, VllmModel)):
        run = runs[model.identifier] = validate.submit(
            model, validation, db=db, max_failed=max_failed, context=context
        )
        if isinstance(model, VllmModel):
            run.wait()
            model.close()
    reports = [report_of(runs[model.identifier]) for model in models]
    return compare(models, validation, reports, db=db, context=context)


if __name__ == "__main__":
    serve(compare_models)
