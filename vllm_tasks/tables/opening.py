"""Opens the job of a call of `predict_in_db`: its arguments checked, its tables open, nothing sent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from vllm_tasks.calls.call import Model, stored_columns
from vllm_tasks.calls.columns import Columns
from vllm_tasks.calls.prompts import Context
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.arguments import named_columns
from vllm_tasks.datalayer.opening import Store, open_tables, source_of
from vllm_tasks.datalayer.selection import OutputTable, Selection
from vllm_tasks.datalayer.source_id import source_id
from vllm_tasks.datalayer.table_names import outputs_name
from vllm_tasks.errors import InvalidCall
from vllm_tasks.tables.arguments import (
    at_least_one,
    budget_of,
    columns_of,
    commit_policy_of,
    datalayer_of,
    keys_of,
    refresh_of,
    shard_of,
    true_or_false,
)
from vllm_tasks.tables.job import Job


@contextmanager
def open_job(
    call: Callable[..., Any],
    /,  # a misspelt argument may be named `call`
    model: Model,
    X: Columns,  # noqa: N803 - the name in the contract
    select: Any,
    *,
    predict_id: str | None,
    primary_id: str | Sequence[str],
    db: Datalayer | str | None,
    source: Store | None,
    ids: Sequence[Any] | None,
    max_chunk_size: int | None,
    overwrite: bool,
    refresh: Literal["missing", "changed"],
    retry_failed: bool,
    max_failed: float | int | None,
    max_total_tokens: int | None,
    max_seconds: float | None,
    max_cost: float | None,
    prices: Mapping[str, float] | None,
    limit: int | None,
    context: Context,
    shards: int,
    shard: tuple[int, int] | None,
    same_source: bool,
    sampling_columns: Mapping[str, str] | None,
    **sampling: Any,
) -> Iterator[tuple[str, Job, OutputTable]]:
    """The job of `call`, which is `predict_in_db`, its `predict_id`, and the shape of its outputs.

    The arguments are those of `predict_in_db`, whose defaults stand there alone. They are checked, and the
    tables are open for as long as the block.
    """
    if shards != 1:
        raise InvalidCall(
            f"shards={shards!r:.100} must be 1 here: call the task vllm_tasks.predict_in_db, or process a "
            "part with shard=(i, n)"
        )
    prepared = model.prepare(call, context, sampling)
    key = named_columns("primary_id", primary_id)
    predict_id = model.identifier if predict_id is None else predict_id
    options = model.model_update_kwargs
    datalayer, read_from = datalayer_of(db, model), source_of(source)
    commit_policy = commit_policy_of(max_chunk_size)
    at_least_one("limit", limit)
    true_or_false("same_source", same_source)
    budget = budget_of(max_failed, max_total_tokens, max_seconds, max_cost, prices)
    # Arguments are checked before `over`, which may wait for a server.
    refreshed, part = refresh_of(refresh, overwrite, retry_failed), shard_of(shard)
    keys = None if ids is None else keys_of(ids, key)
    tables, named = open_tables(datalayer, select, read_from)
    if refreshed == "missing" and not isinstance(select, str | os.PathLike):
        refreshed = "changed"  # a table in memory has no name that distinguishes it from another one
    try:
        over = prepared.over(X, sampling_columns)
        selection = Selection(
            select=named,
            key=key,
            columns=over.columns,
            outputs=options.get("table") or outputs_name(predict_id),
            fingerprint=over.fingerprint,
            refresh=refreshed,
            ids=keys,
            shard=part,
        )
        output = OutputTable(
            name=selection.outputs,
            columns=stored_columns(over.decoder),
            flatten=over.decoder.flatten,
            partition_by=columns_of(options.get("partition_by", ())),
            compression=options.get("compression"),
        )
        place = None if read_from is None else read_from.url.get_secret_value().strip()
        of_source = source_id(named, datalayer.url.get_secret_value().strip(), place)
        job = Job.of(
            over, tables, selection, commit_policy, budget, limit, of_source, same_source=same_source
        )
        yield predict_id, job, output
    finally:
        tables.close()


def check_job(job: Job) -> None:
    """Raise `InvalidCall` if the source, its keys or the outputs do not fit the job."""
    job.tables.check(job.selection)
    job.check_source()
