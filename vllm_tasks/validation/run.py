"""`validate`: predict on the data sets, score, compare with the last run that passed, and record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    resume: bool = True,
    reuse: bool = False,
    retry_failed: bool = False,
    max_failed: float | int | None = 0.05,
    context: Context = None,
    sampling_columns: Mapping[str, str] | None = None,
    flow_run: str | None = None,
    display: Callable[[str], Display] | None = None,
) -> ValidationReport:
    """Predict on the data sets of `validation`, score the answers, and record the values.

    Each call processes all rows again, because the weights behind a name may have changed. An
    interrupted run that began within the last 12 hours resumes, unless `resume` is False, and no row of it
    is sent twice.
    All data sets of a call are recorded together, after the last one. The values are written to
    `model.metric_values[dataset][metric]` and to the tables `_metric_values` and `_metric_scores` of the
    datalayer. A model that misses its limits raises no exception here: see `passed` and `reasons` of the
    report. Other failures raise the exceptions of `predict_in_db`.

    Args:
        model: The model to validate.
        validation: Data sets, metrics and limits; None: the model's own.
        db: A `Datalayer` or its URL, for predictions and history; None: the model's own.
        datasets: Identifiers of the data sets to use; None: all of them.
        resume: Whether an interrupted run of the last 12 hours resumes. With False all rows are processed
            anew, and the interrupted run is never resumed again: its server may have had the wrong weights.
        reuse: Score the answers of the last run with the same model, prompt and sampling, if there is one.
            This needs known weights: a local folder, or a revision that is a commit hash.
        retry_failed: Process the failed rows of an interrupted run again.
        max_failed: The rows that may fail, as a fraction or a number of rows; None: any number.
        context: The text for `{context}` in every prompt.
        sampling_columns: Columns of the data sets with sampling parameters of the row's own, by the
            parameter's name; NULL means the call's own value.
        flow_run: ID of the flow run, kept in the history.
        display: Makes the progress display of a table from its predict_id; None: progress is logged.

    Returns:
        The values with their intervals, the verdicts, and the rows that changed, for each data set.

    Raises:
        InvalidCall: The call cannot succeed (`reuse` with `resume=False` contradict each other), or too many
            rows failed in an earlier part of the run.
        TooManyFailed: More than `max_failed` rows failed; nothing is recorded.
    """
    from vllm_tasks.validation.scoring_run import scored  # numpy, pyarrow and DuckDB take 0.7 s to import

    validation = validation or model.validation
    if validation is None:
        raise InvalidCall(
            f"{model.identifier!r} has no validation: pass validation=Validation(...), or set it on the model"
        )
    if not isinstance(validation, Validation):
        raise InvalidCall(
            f"validation is a {type(validation).__name__}: give a Validation, Validation(**fields)"
        )
    call = model.prepare(validate, context)
    return scored(
        model,
        validation,
        call,
        db=db,
        datasets=datasets,
        resume=resume,
        reuse=reuse,
        retry_failed=retry_failed,
        max_failed=max_failed,
        sampling_columns=sampling_columns,
        flow_run=flow_run,
        display=display,
    )
