"""Prefect's tasks over a model: what `.map` goes over, and rows that Prefect does not look into."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from prefect import Task, unmapped
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.utilities.annotations import BaseAnnotation, opaque

P = ParamSpec("P")
R = TypeVar("R")

ROWS = ("x", "xs")
"""The names of the second argument of a `RowsTask`."""
OF_PREFECT = {"return_state", "wait_for", "deferred"}
"""Arguments of `Task.map` itself."""


class ModelTask(Task[P, R]):
    """A task `f(model, ...)`, mapped over lists of models, tables, names and options.

    Prefect maps over everything iterable, which a model is (over its fields), like a list of columns or of
    stop words. Here `.map` goes over those of `MAPPED` that are lists or tuples, or futures of them; all
    others go to each call as they are. `unmapped(...)` works as with Prefect.
    """

    MAPPED: ClassVar[frozenset[str]] = frozenset(
        {
            *(
                "model",
                "select",
                "predict_id",
                "db",
                "source",
                "overwrite",
                "refresh",
                "retry_failed",
                "max_failed",
            ),
            *("limit", "max_chunk_size", "shards", "same_source", "n", "validation", "reuse"),
        }
    )
    """Arguments whose values are never lists themselves."""

    retries_rows = False
    """Whether a run is retried for failed rows, too: where a user sets `retries`."""

    def map(self, *args: Any, **kwargs: Any) -> Any:
        names = [*inspect.signature(self.fn).parameters]
        args = tuple(self._each(name, value) for name, value in zip(names, args, strict=False))
        kwargs = {
            name: value if name in OF_PREFECT else self._each(name, value) for name, value in kwargs.items()
        }
        return super().map(*args, **kwargs)

    def _each(self, name: str, value: Any) -> Any:
        """`value` as Prefect is given it: to go over, or whole."""
        if isinstance(value, BaseAnnotation):
            return value
        if name in self.MAPPED and isinstance(value, PrefectFuture | State):
            value = value.result()
        return value if name in self.MAPPED and isinstance(value, list | tuple) else unmapped(value)

    def with_options(self, **options: Any) -> ModelTask[P, R]:
        changed = super().with_options(**options)
        changed.__class__ = type(self)  # Prefect's own way gives a plain Task
        assert isinstance(changed, ModelTask)
        changed.retries_rows = (
            bool(options["retries"]) if options.get("retries") is not None else self.retries_rows
        )
        return changed


class RowsTask(ModelTask[P, R]):
    """A task `f(model, rows, ...)` that hands rows on unseen.

    Prefect walks the arguments in search of futures, 5 microseconds a row (a measured second for 200,000).
    `.map` goes over the rows, and over the models where they are a list.
    """

    if not TYPE_CHECKING:  # a checker sees Prefect's own, which have the arguments of `f`

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = on_rows(unseen, args, kwargs)
            return super().__call__(*args, **kwargs)

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = on_rows(unseen, args, kwargs)
            return super().submit(*args, **kwargs)

    def _each(self, name: str, value: Any) -> Any:
        return each_unseen(value) if name in ROWS else super()._each(name, value)


def on_rows(
    change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `f(model, rows, ...)` with the rows changed."""
    args = tuple(change(value) if i == 1 else value for i, value in enumerate(args))
    return args, {name: change(value) if name in ROWS else value for name, value in kwargs.items()}


def each_unseen(batches: Any) -> Any:
    """Each of `batches` wrapped; what Prefect has to resolve or unwrap to them is left to it.

    One record, as `predict` takes it, is for each model.
    """
    if isinstance(batches, PrefectFuture | State | BaseAnnotation):
        return batches
    return unmapped(batches) if isinstance(batches, str | dict) else [unseen(rows) for rows in batches]


def unseen(rows: Any) -> Any:
    """`rows` wrapped so that Prefect resolves a future but looks no further.

    Rows that are futures themselves are the exception: those Prefect has to find, as well as
    futures that are fields of a single record. It does not search any deeper.
    """
    within = rows.values() if isinstance(rows, dict) else rows if isinstance(rows, list | tuple) else ()
    holds_futures = any(isinstance(x, PrefectFuture | State) for x in within)
    return rows if holds_futures or isinstance(rows, BaseAnnotation) else opaque(rows)


# A task runner on Ray sends its arguments as a pickle, out of which Prefect's own (3.7, 3.8) would come with
# its value in a tuple.
copyreg.pickle(opaque, lambda wrapped: (opaque, (wrapped[0],)))
