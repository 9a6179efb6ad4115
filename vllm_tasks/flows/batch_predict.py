"""A deployable flow: process the rows of a table with a model, every night if you like.

prefect block register -m vllm_tasks                  # once per Prefect server
python -m vllm_tasks.flows.batch_predict              # serve it; then run it from the UI
"""

# Without `from __future__ import annotations`: the process of a served run cannot resolve type names.
from typing import Annotated, Any, Literal

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field

from vllm_tasks import Datalayer, VllmAPI, VllmModel, predict_in_db
from vllm_tasks.flows._serve import serve
from vllm_tasks.results import Report

Rows = Annotated[int, Field(ge=1)]


def run_name() -> str:
    """Return the model and the source, as the UI displays them."""
    parameters = flow_run.parameters
    return f"{parameters['model'].identifier} - {parameters['select'][:80]}"


@flow(name="batch-predict", flow_run_name=run_name)
def batch_predict(
    model: VllmAPI | VllmModel,
    X: str | list[str] | dict[str, str | int],  # noqa: N803 - the name in predict_in_db
    select: str,
    primary_id: str | list[str] = "id",
    db: Datalayer | None = None,
    source: Datalayer | None = None,
    limit: Rows | None = None,
    predict_id: str | None = None,
    sampling: dict[str, Any] | None = None,
    context: str | None = None,
    refresh: Literal["missing", "changed"] = "missing",
    overwrite: bool = False,
    retry_failed: bool = False,
    ids: list[Any] | None = None,
    max_failed: float | int | None = 0.05,
    max_total_tokens: Rows | None = None,
    max_seconds: float | None = None,
    max_cost: float | None = None,
    prices: dict[str, float] | None = None,
    max_chunk_size: Rows | None = None,
    shards: Rows = 1,
    same_source: bool = False,
    sampling_columns: dict[str, str] | None = None,
) -> Report:
    """Process the rows of a table with a model and commit one output or one error for each.

    Only rows that have no output or error yet are processed, so after a crash, run it again to resume.

    Args:
        model: A saved block: a vLLM API, or a vLLM Model.
        X: Column with the input; several columns as a list, or as a mapping of column to argument.
        select: A table; in a lake also a path or a glob; or one SELECT statement.
        primary_id: Column or columns that identify a row.
        db: Where the outputs go, and where the table is unless source is given; None: the model's own.
        source: Where the table is, if it is not where the outputs go.
        limit: Process at most this number of rows, to try a job; None: all.
        predict_id: Names the outputs, the table _outputs__NAME; None: the model's identifier.
        sampling: Sampling parameters by vLLM's names, such as {"max_tokens": 60}; they override the model's.
        context: Fills {context} in every prompt.
        refresh: missing processes rows without an output; changed also rows whose input has changed since.
        overwrite: Process all rows again.
        retry_failed: Process only the rows that have an error.
        ids: Process only the rows with these keys.
        max_failed: Rows that may fail, as a fraction (0.05) or a number (20); None: any number.
        max_total_tokens: The run ends when its finished rows have this many tokens, of prompts and answers;
            they are committed, and the next run does the rest.
        max_seconds: The same after this time, engine start included.
        max_cost: The same at this cost.
        prices: per_hour, per_million_prompt_tokens, per_million_completion_tokens; None: the site's settings.
        max_chunk_size: Rows of a commit; None: VLLM_TASKS_COMMIT_ROWS.
        same_source: Continue the outputs of a table that was renamed, or of a SELECT that was edited, since.
        sampling_columns: Columns with sampling parameters of the row's own, by the parameter's name, such as
            {"max_tokens": "budget"}; NULL means the value that all rows share.
        shards: Number of flow runs on the model's work pool that share the rows, each with its own engine.

    Returns:
        Counts of rows, tokens and seconds, and where the outputs are.

    Raises:
        TooManyFailed: More rows failed than `max_failed` allows; everything finished is committed.
    """
    report: Report = predict_in_db(
        model,
        X,
        select,
        db=db,
        source=source,
        predict_id=predict_id,
        primary_id=primary_id,
        refresh=refresh,
        overwrite=overwrite,
        retry_failed=retry_failed,
        max_failed=max_failed,
        max_total_tokens=max_total_tokens,
        max_seconds=max_seconds,
        max_cost=max_cost,
        prices=prices,
        limit=limit,
        ids=ids,
        max_chunk_size=max_chunk_size,
        context=context,
        shards=shards,
        same_source=same_source,
        sampling_columns=sampling_columns,
        **(sampling or {}),
    )
    return report


if __name__ == "__main__":
    serve(batch_predict)
