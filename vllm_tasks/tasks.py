"""The Prefect tasks. All of Prefect's policy (names, retries, caching, what it looks into) is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prefect import Task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.utilities.annotations import BaseAnnotation, opaque

from vllm_tasks.errors import EngineFailed, ServerUnavailable
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.predictor import OnError, Output
from vllm_tasks.prompts import Context
from vllm_tasks.rows import Completion, RowError

Model = VllmAPI | VllmModel


def _predict(model: Model, x: Any, context: Context = None, **sampling: Any) -> Output:
    """One record in, its answer out; see `VllmAPI.predict`."""
    return model.predict(x, context, **sampling)


def _predict_batches(
    model: Model, xs: Sequence[Any], context: Context = None, *, on_error: OnError = "raise", **sampling: Any
) -> list[Output | RowError]:
    """N records in, N answers out in input order; see `VllmAPI.predict_batches`."""
    return model.predict_batches(xs, context, on_error=on_error, **sampling)


def _completions(
    model: Model, xs: Sequence[Any], context: Context = None, *, on_error: OnError = "raise", **sampling: Any
) -> list[Completion | RowError]:
    """N records in, N full results out in input order; see `VllmAPI.completions`."""
    return model.completions(xs, context, on_error=on_error, **sampling)


class RowsTask(Task[..., Any]):
    """A task `f(model, rows, ...)` that fits rows better than Prefect's own way with arguments.

    Prefect walks the arguments in search of futures, 5 microseconds a row (a measured second for
    200,000); here it hands rows on unseen. And Prefect maps over everything iterable, which a model
    is (over its fields), like a list of stop words; here it maps over the rows alone.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = on_rows(unseen, args, kwargs)
        return super().__call__(*args, **kwargs)

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = on_rows(unseen, args, kwargs)
        return super().submit(*args, **kwargs)

    def map(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = on_rows(each_unseen, args, kwargs)
        args = tuple(value if i == 1 else unmapped(value) for i, value in enumerate(args))
        mapped = {*ROWS, "return_state", "wait_for", "deferred"}  # the last three are Prefect's own
        kwargs = {name: value if name in mapped else unmapped(value) for name, value in kwargs.items()}
        return super().map(*args, **kwargs)

    def with_options(self, **options: Any) -> RowsTask:
        changed = super().with_options(**options)
        changed.__class__ = type(self)  # Prefect's own way gives a plain Task
        assert isinstance(changed, RowsTask)
        return changed


ROWS = ("x", "xs")
"""The names of the second argument."""


def on_rows(
    change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `f(model, rows, ...)` with the rows changed."""
    args = tuple(change(value) if i == 1 else value for i, value in enumerate(args))
    return args, {name: change(value) if name in ROWS else value for name, value in kwargs.items()}


def each_unseen(batches: Any) -> Any:
    """Each of `batches` wrapped; what Prefect has to resolve or unwrap to them is left to it."""
    for_prefect = isinstance(batches, PrefectFuture | State | BaseAnnotation)
    return batches if for_prefect else [unseen(rows) for rows in batches]


def unseen(rows: Any) -> Any:
    """`rows` wrapped so that Prefect resolves a future but looks no further.

    Rows that are futures themselves are the exception: those Prefect has to find, as well as
    futures that are fields of a single record. It does not search any deeper.
    """
    within = rows.values() if isinstance(rows, dict) else rows if isinstance(rows, list | tuple) else ()
    holds_futures = any(isinstance(x, PrefectFuture | State) for x in within)
    return rows if holds_futures or isinstance(rows, BaseAnnotation) else opaque(rows)


def run_name(parameters: dict[str, Any]) -> str:
    """Model and number of rows, as the UI shows them; Prefect has resolved the futures by now."""
    xs = parameters.get("xs")
    rows = f" - {len(xs)} rows" if isinstance(xs, Sequence) else ""
    return f"{parameters['model'].identifier}{rows}"


def is_temporary(_task: Any, _run: TaskRun, state: State[Any]) -> bool:
    """Whether the same call may succeed later. Rows have been retried by their engine already."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, ServerUnavailable) or (isinstance(error, EngineFailed) and error.temporary)


POLICY: dict[str, Any] = {
    "task_run_name": run_name,
    "cache_policy": NO_CACHE,  # a cache key would hash every row
    "retries": 2,
    "retry_delay_seconds": [10, 60],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": is_temporary,
}

predict = RowsTask(_predict, name="predict", **POLICY)
predict_batches = RowsTask(_predict_batches, name="predict-batches", **POLICY)
completions = RowsTask(_completions, name="completions", **POLICY)
