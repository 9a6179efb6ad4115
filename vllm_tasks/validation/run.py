"""`validate`: predict on the data sets, score, compare with the run before, record."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_tasks.calls.prompts import Context
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.errors import InvalidCall
from vllm_tasks.tables.job import Display
from vllm_tasks.validation import Validation
from vllm_tasks.validation.report import ValidationReport
from vllm_tasks.validation.validated import Validated


def validate(
    model: Validated,
    validation: Validation | None = None,
    *,
    db: Datalayer | str | None = None,
    datasets: Sequence[str] | None = None,
    reuse: bool = False,
    retry_failed: bool = False,
    max_failed: float | int | None = 0.05,
    context: Context = None,
    flow_run: str | None = None,
    display: Callable[[str], Display] | None = None,
) -> ValidationReport:
    """Predict on the data sets of `validation`, score, and record what was found.

    The model is asked anew each time, because the weights behind a name may have changed; a run that was
    interrupted within the last 12 hours is gone on with, and no row of it is asked twice. All data sets of a
    call are recorded together, when the last one is done. Values come onto
    `model.metric_values[dataset][metric]` and into the tables `_metric_values` and `_metric_scores` of the
    datalayer. Whether they pass the limits is in the report: nothing is raised for it here.

    validation: data sets, metrics and limits; the model's own when None.
    db: where predictions and history go: a `Datalayer` or its URL; the model's own when None.
    datasets: only these, by identifier.
    reuse: score the answers of the last run by the same model, prompt and sampling, where there are some.
        Only for a model whose weights are known: a local folder, or a revision that is a commit hash.
    retry_failed: ask the failed rows of an interrupted run again.
    max_failed: how many rows may fail, a share or a count, None for any number. Past it nothing is recorded
        and `TooManyFailed` is raised, or `InvalidCall` where they failed in an earlier part of the run.
    context: fills `{context}` of every prompt.
    flow_run: kept in the history.
    display: makes the display of a run from its predict_id; None: in the log.

    Raises `InvalidCall` for what could not succeed, and as `predict_in_db`.
    """
    from vllm_tasks.validation.scoring_run import scored  # numpy, pyarrow and DuckDB take 0.7 s to import

    validation = validation or model.validation
    if validation is None:
        raise InvalidCall(
            f"{model.identifier!r} has no validation: pass validation=Validation(...), or give the model one"
        )
    call = model.prepare(validate, context)
    return scored(model, validation, call, db, datasets, reuse, retry_failed, max_failed, flow_run, display)
