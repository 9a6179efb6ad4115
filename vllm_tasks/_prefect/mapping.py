"""Prefect tasks whose first argument is a model: `.map` over the right arguments, and rows left untouched."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from prefect import Task, unmapped
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.utilities.annotations import BaseAnnotation, opaque

from vllm_tasks.errors import InvalidCall

P = ParamSpec("P")
R = TypeVar("R")

ROWS = ("x", "xs", "validation")
"""The names of the second argument of a `RowsTask` or a `ValidationTask`."""
OF_PREFECT = {"return_state", "wait_for", "deferred"}
"""Arguments of `Task.map` itself."""


class ModelTask(Task[P, R]):
    """A task `f(model, ...)`, mapped over lists of models, tables, names and options.

    Prefect maps over every iterable argument: also over a model's fields, a list of columns or of stop words.
    Here `.map` goes over the arguments in `MAPPED` that are lists or tuples, or futures of them; each call
    has all the others unchanged. `unmapped(...)` works as in Prefect.
    """

    MAPPED: ClassVar[frozenset[str]] = frozenset(
        {
            *("model", "select", "predict_id", "db", "source", "overwrite", "refresh", "retry_failed"),
            *("max_failed", "max_total_tokens", "max_seconds", "max_cost", "sample"),
            *("limit", "max_chunk_size", "shards", "same_source", "n", "validation", "reuse", "resume"),
        }
    )
    """Arguments of which a single value is never a list."""

    retries_rows = False
    """Whether a run is retried for failed rows, too: only if a user has set `retries`."""

    def map(self, *args: Any, **kwargs: Any) -> Any:
        """As `Task.map`, over the arguments in `MAPPED`."""
        names = [*inspect.signature(self.fn).parameters]
        args = tuple(self._each(name, value) for name, value in zip(names, args, strict=False))
        kwargs = {
            name: value if name in OF_PREFECT else self._each(name, value) for name, value in kwargs.items()
        }
        return super().map(*args, **kwargs)

    def _each(self, name: str, value: Any) -> Any:
        """`value` as Prefect gets it: a list to map over, or unmapped."""
        if isinstance(value, BaseAnnotation):
            return value
        if name in self.MAPPED and isinstance(value, PrefectFuture | State):
            value = value.result()
        return value if name in self.MAPPED and isinstance(value, list | tuple) else unmapped(value)

    def with_options(self, **options: Any) -> ModelTask[P, R]:
        """As `Task.with_options`; returns a task of the same class."""
        changed = super().with_options(**options)
        changed.__class__ = type(self)  # Prefect's own method returns a plain Task
        assert isinstance(changed, ModelTask)
        changed.retries_rows = (
            bool(options["retries"]) if options.get("retries") is not None else self.retries_rows
        )
        return changed


class RowsTask(ModelTask[P, R]):
    """A task `f(model, rows, ...)` whose rows Prefect does not search for futures.

    The search would take 5 microseconds a row (a measured second for 200,000 rows). `.map` goes over the
    rows, and over the models if they are a list.
    """

    if not TYPE_CHECKING:  # a checker sees Prefect's own methods, which have the arguments of `f`

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = on_rows(unseen, args, kwargs)
            return super().__call__(*args, **kwargs)

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = on_rows(unseen, args, kwargs)
            return super().submit(*args, **kwargs)

    def _each(self, name: str, value: Any) -> Any:
        return each_unseen(value) if name in ROWS else super()._each(name, value)


class ValidationTask(RowsTask[P, R]):
    """A task `f(model, validation, ...)` whose validation, with the rows of its data sets, Prefect does not
    search for futures: 48 ms for 1,300 rows. `.map` goes over validations as `ModelTask` does."""

    def _each(self, name: str, value: Any) -> Any:
        return ModelTask._each(self, name, value)


def on_rows(
    change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of `f(model, rows, ...)` with `change` applied to the rows."""
    args = tuple(change(value) if i == 1 else value for i, value in enumerate(args))
    return args, {name: change(value) if name in ROWS else value for name, value in kwargs.items()}


def each_unseen(batches: Any) -> Any:
    """Return `batches` with each batch wrapped; futures and annotations are left for Prefect to resolve.

    A single record, as `predict` takes it, goes to each model. Raises `InvalidCall` for a set, which has no
    order.
    """
    if isinstance(batches, set | frozenset):
        raise InvalidCall(f"map goes over a list, got a {type(batches).__name__}, which has no order")
    if isinstance(batches, PrefectFuture | State | BaseAnnotation):
        return batches
    return unmapped(batches) if isinstance(batches, str | dict) else [unseen(rows) for rows in batches]


def unseen(rows: Any) -> Any:
    """Return `rows` wrapped so that Prefect resolves a future but searches no further.

    Rows that contain futures are not wrapped, nor is a single record with futures as fields: Prefect has to
    find these. Futures any deeper are not found. An iterator becomes a list: another attempt would find it
    exhausted, and take it for no rows.
    """
    rows = [*rows] if isinstance(rows, Iterator) else rows
    within = rows.values() if isinstance(rows, dict) else rows if isinstance(rows, list | tuple) else ()
    holds_futures = any(isinstance(x, PrefectFuture | State) for x in within)
    return rows if holds_futures or isinstance(rows, BaseAnnotation) else opaque(rows)


# A task runner on Ray pickles its arguments. Pickled by Prefect's own code (3.7, 3.8), an `opaque` would come
# back with its value in a tuple.
copyreg.pickle(opaque, lambda wrapped: (opaque, (wrapped[0],)))
