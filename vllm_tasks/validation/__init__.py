"""The definition of a validation: data sets with known answers, metrics, and limits.

It is saved with a model, and `vllm_tasks.validate` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.validation.dataset import Dataset
from vllm_tasks.validation.metric import Metric

__all__ = ["Dataset", "Metric", "Validation", "check_comparable"]


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


class Validation(BaseModel):
    """Data sets and metrics to validate a model with, and the limits that it must hold.

    The keys of `thresholds` and `max_regression` are `metric` or `dataset/metric`. A threshold is the least
    value that passes (the largest if less is better). `max_regression` is the largest allowed drop since the
    last run that passed, and since the one that `baseline` names.
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
    baseline: str = Field(
        default="best",
        min_length=1,
        title="Baseline",
        description="A second run to compare with, so that small drops do not add up: the best that passed "
        '("best"), or one by its name; "last": none.',
    )
    cluster: str | None = Field(
        default=None,
        min_length=1,
        title="Cluster",
        description="Column of the data sets: rows with an equal value, such as a passage that several "
        "questions are about, are not independent. Rows with equal inputs never are.",
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
