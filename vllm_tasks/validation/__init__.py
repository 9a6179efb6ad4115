"""The definition of a validation: data sets with known answers, metrics, and limits.

It is saved with a model, and `vllm_tasks.validate` runs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

from prefect.blocks.core import Block
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    field_serializer,
    field_validator,
    model_validator,
)

from vllm_tasks.calls.callables import DottedCallable
from vllm_tasks.datalayer import check_name
from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.metrics import BUILT_IN, BuiltinMetric, built_in
from vllm_tasks.metrics.measure import Measure

REQUIRED = {"multiple_choice": ("choices",), "judge": ("model", "rubric")}
"""Options that a built-in metric cannot work without."""
OWN_OPTIONS = {"choices", "delimiter"}
"""Options of metrics by likelihood: the column of the choices, and the text between prompt and answer."""


def check_comparable(identifiers: Sequence[str]) -> None:
    """Check that models can be compared.

    Args:
        identifiers: One identifier for each model.

    Raises:
        InvalidCall: There are fewer than two models, or two of them have the same identifier.
    """
    if len(identifiers) < 2 or len(set(identifiers)) < len(identifiers):
        raise InvalidCall(
            f"two or more models are needed, and they need identifiers of their own; got {list(identifiers)}"
        )


def _block_of(judge: Block) -> str:
    name = judge._block_document_name
    return f"{judge.get_block_type_slug()}/{name}" if name else "a model that is not saved"


def _named(what: str, identifier: str) -> str:
    """Return the identifier if it can be part of a table name and of `dataset/metric`."""
    try:
        check_name(what, identifier)
    except InvalidCall as error:
        raise ValueError(str(error)) from error
    return identifier


class Dataset(BaseModel):
    """Rows with known answers: a `select` on a datalayer, or `raw_data`.

    The sample of `sample_size` rows depends only on `random_seed` and the rows' contents: it is the same on
    every machine and from every kind of table. With `pin`, later runs use the snapshot of the first run.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)  # rows, or a URL, may be in it

    identifier: str = Field(min_length=1, description="Name of the data set in metric_values and tables.")
    select: str | None = Field(
        default=None,
        title="Select",
        description="A table, one SELECT, or in a lake a path or a glob. Give either this or raw data.",
    )
    raw_data: list[dict[str, Any]] | None = Field(
        default=None, title="Raw data", description="The rows themselves. Give either this or a select."
    )
    db: str | None = Field(
        default=None,
        title="Datalayer",
        description="Name of a saved Datalayer to select from; empty: the one that the predictions go to.",
    )
    sample_size: int | None = Field(
        default=None, ge=1, title="Sample size", description="How many rows are drawn; empty: all."
    )
    random_seed: int = Field(default=0, title="Random seed", description="Another seed draws another sample.")
    pin: bool = Field(
        default=False,
        title="Pin",
        description="Use the snapshot of the first run, so that later changes of the table do not count.",
    )

    @field_validator("identifier")
    @classmethod
    def _table_name(cls, value: str) -> str:
        return _named("the data set's identifier", value)

    @field_validator("db")
    @classmethod
    def _no_url(cls, value: str | None) -> str | None:
        if value is not None and "://" in value:
            raise ValueError(
                "db takes the name of a saved Datalayer; a URL would be stored in plain text. Save it first: "
                "Datalayer(url=...).save(NAME)"
            )
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if (self.select is None) == (self.raw_data is None):
            raise ValueError(f"dataset {self.identifier!r} needs exactly one of select and raw_data")
        if self.db is not None and self.select is None:
            raise ValueError(f"dataset {self.identifier!r} has a db to select from, but no select")
        return self


class Metric(BaseModel):
    """A named score: a built-in metric, or your own function.

    Your own function is `f(prediction, target) -> float` for one row, and the value is the mean over rows; a
    failed row scores 0, or is left out if less is better. With `over="set"` it is
    `f(predictions, targets) -> float` for all rows, and a failed row's prediction is None. It is also called
    on samples of the rows for its interval, and may return nan or raise ValueError for a sample.
    """

    model_config = ConfigDict(extra="forbid")

    identifier: str = Field(min_length=1, description="Name of the metric in metric_values and tables.")
    object: BuiltinMetric | DottedCallable | None = Field(
        default=None,
        title="Metric or function",
        description="A built-in metric or a function's dotted path; empty: the built-in of this identifier.",
    )
    over: Literal["rows", "set"] = Field(
        default="rows",
        title="Over",
        description="Only for your own function: whether it takes one row or all of them.",
    )
    higher_is_better: bool = Field(
        default=True,
        title="Higher is better",
        description="Only for your own function; a built-in metric has a fixed direction.",
    )
    options: dict[str, Any] = Field(
        default={},
        title="Options",
        description='Keyword arguments of the metric, such as {"normalize": ["squad"]}.',
    )

    @field_validator("identifier")
    @classmethod
    def _name(cls, value: str) -> str:
        return _named("the metric's identifier", value)

    @model_validator(mode="after")
    def _known(self) -> Metric:
        if self.object is None and self.identifier not in BUILT_IN:
            raise ValueError(
                f"there is no built-in metric {self.identifier!r}{near(self.identifier, BUILT_IN)}; built in "
                f"are {', '.join(BUILT_IN)}, and object takes the dotted path of a function"
            )
        measure = self.measure()
        if self.built_in is not None and (self.over != "rows" or not self.higher_is_better):
            raise ValueError(
                "over and higher_is_better are only for your own function; leave them out for the built-in "
                f"{self.built_in!r}"
            )
        for name in REQUIRED.get(self.built_in or "", ()):
            if name not in self.options:
                raise ValueError(f"metric {self.identifier!r} needs options={{{name!r}: ...}}")
        given = self.options.keys() - (OWN_OPTIONS if measure.asks == "likelihood" else set())
        try:
            signature = inspect.signature(measure.score)
        except ValueError:  # some of Python's built-in functions have no signature
            return self
        answer = (None,) if measure.kind == "answer" else (None, None)
        try:
            signature.bind(*answer, **{name: self.options[name] for name in given})
        except TypeError as error:
            names = list(signature.parameters)[len(answer) :]
            unknown = [name for name in sorted(given) if name not in names]
            why = f"has no option {unknown[0]!r}{near(unknown[0], names)}" if unknown else str(error)
            raise ValueError(f"metric {self.identifier!r} {why}") from error
        return self

    @field_serializer("options")
    def _without_secrets(self, options: dict[str, Any]) -> dict[str, Any]:
        """Write a judge as the name of its block, since its API key would be readable here."""
        judge = options.get("model")
        return {**options, "model": _block_of(judge)} if isinstance(judge, Block) else options

    @property
    def unsaved(self) -> bool:
        """Whether the judge is an unsaved model, which cannot be loaded in another process."""
        judge = self.options.get("model")
        return isinstance(judge, Block) and judge._block_document_name is None

    @property
    def built_in(self) -> str | None:
        """The name of the built-in metric, or None for your own function."""
        name = self.object or self.identifier
        return name if isinstance(name, str) else None

    def measure(self) -> Measure:
        """Describe how this metric is scored, and import the file of a built-in metric.

        Returns:
            The function, with its range, its direction, and its score for a failed row.
        """
        if self.built_in is not None:
            return built_in(self.built_in)
        assert callable(self.object)
        return Measure(
            self.object,
            kind="row" if self.over == "rows" else "set",
            range=(float("-inf"), float("inf")),
            higher_is_better=self.higher_is_better,
            miss=0.0 if self.higher_is_better else None,
        )


class Validation(BaseModel):
    """Data sets and metrics to validate a model with, and the limits that it must hold.

    The keys of `thresholds` and `max_regression` are `metric` or `dataset/metric`. A threshold is the least
    value that passes (the largest if less is better). `max_regression` is the largest allowed drop since the
    last run that passed.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)  # rows, or a URL, may be in it

    datasets: list[Dataset] = Field(min_length=1, description="One or more data sets with known answers.")
    metrics: list[Metric] = Field(min_length=1, description="How the answers are scored.")
    key: tuple[str | list[str] | dict[str, str | int], str] = Field(
        title="Key",
        description="First item: one or more input columns. Second item: the column of the known answer.",
    )
    thresholds: dict[str, FiniteFloat] = Field(
        default={},
        title="Thresholds",
        description='Values to reach, by metric or dataset/metric, such as {"exact_match": 0.6}.',
    )
    max_regression: dict[str, FiniteFloat] = Field(
        default={},
        title="Largest regression",
        description='Largest drop since the last run that passed, such as {"exact_match": 0.02}.',
    )
    on_error: Literal["miss", "exclude"] = Field(
        default="miss",
        title="On error",
        description="Whether a failed row is a miss or is left out (and counted in the record).",
    )
    rows_shown: int = Field(
        default=5,
        ge=0,
        title="Rows shown",
        description="How many worst, improved and regressed rows the UI shows with their texts; 0: none.",
    )

    @model_validator(mode="after")
    def _distinct(self) -> Validation:
        for what, names in ("dataset", self._dataset_names), ("metric", self._metric_names):
            if twice := sorted({n for n in names if names.count(n) > 1}):
                raise ValueError(f"there are two {what}s {twice[0]!r}")
        return self

    @model_validator(mode="after")
    def _known_limits(self) -> Validation:
        known = [*self._metric_names, *(f"{d}/{m}" for d in self._dataset_names for m in self._metric_names)]
        for field, limits in ("thresholds", self.thresholds), ("max_regression", self.max_regression):
            for name in limits.keys() - set(known):
                raise ValueError(
                    f"{field} names {name!r}, which is not a metric of this validation{near(name, known)}"
                )
        ranges = {metric.identifier: metric.measure().range for metric in self.metrics}
        for name, value in self.thresholds.items():
            low, high = ranges[name.rpartition("/")[2]]
            if not low <= value <= high:
                raise ValueError(
                    f"the threshold of {name!r} is {value:g}, but its values are {low:g} to {high:g}"
                )
        for name, most in self.max_regression.items():
            if most < 0:
                raise ValueError(f"max_regression of {name!r} is {most}, but a drop is 0 or more")
        for metric in self.metrics:
            regressing = {metric.identifier, *(f"{d}/{metric.identifier}" for d in self._dataset_names)}
            if metric.measure().kind == "set" and regressing & self.max_regression.keys():
                raise ValueError(
                    f"max_regression compares two runs row by row, but {metric.identifier!r} scores whole "
                    "sets: give it a threshold"
                )
        return self

    @property
    def _dataset_names(self) -> list[str]:
        return [dataset.identifier for dataset in self.datasets]

    @property
    def _metric_names(self) -> list[str]:
        return [metric.identifier for metric in self.metrics]

    def limits(self, dataset: str, metric: str) -> tuple[float | None, float | None]:
        """Look up the limits of a metric on a data set; a limit for `dataset/metric` has priority.

        Args:
            dataset: Identifier of the data set.
            metric: Identifier of the metric.

        Returns:
            The threshold and the largest allowed drop; None where there is no limit.
        """
        names = f"{dataset}/{metric}", metric
        return _first(self.thresholds, names), _first(self.max_regression, names)


def _first(limits: dict[str, float], names: tuple[str, ...]) -> float | None:
    return next((limits[name] for name in names if name in limits), None)
