"""The definition of a metric: a built-in one with its options, or a function of your own."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from prefect.blocks.core import Block
from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from vllm_tasks.calls.callables import DottedCallable
from vllm_tasks.datalayer.table_names import check_name
from vllm_tasks.errors import InvalidCall, near
from vllm_tasks.metrics import BUILT_IN, BuiltinMetric, built_in
from vllm_tasks.metrics.extraction import Extraction, extraction
from vllm_tasks.metrics.measure import Measure

REQUIRED = {"multiple_choice": ("choices",), "judge": ("model", "rubric")}
"""Options that a built-in metric cannot work without."""
OWN_OPTIONS = {"choices", "delimiter"}
"""Options of metrics by likelihood: the column of the choices, and the text between prompt and answer."""
WITH_CHOICES = "multiple_choice", "regex_match"
"""Built-in metrics whose option `choices` is a column."""


class Metric(BaseModel):
    """A named score: a built-in metric, or your own function.

    Your own function is `f(prediction, target) -> float` for one row, and the value is the mean over rows; a
    failed row scores 0, or is left out if less is better. With `over="set"` it is
    `f(predictions, targets) -> float` for all rows, and a failed row's prediction is None. It is also called
    on samples of the rows for its interval, and may return nan or raise ValueError for a sample.

    `extract` is a chain of steps, applied to the answer in their order, that makes the text to score:
    `["strip", {"regex": r"answer is (.*)"}, "lower"]`. A row in whose answer nothing is found is a miss. The
    steps are those of `vllm_tasks.metrics.extraction.extraction`.
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
    extract: list[str | dict[str, Any]] = Field(
        default=[],
        title="Extract",
        description='Steps that extract the text to score, such as "strip" or {"regex": "#### (.*)"}.',
    )

    @field_validator("identifier")
    @classmethod
    def _name(cls, value: str) -> str:
        check_name("the metric's identifier", value)
        return value

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
        self._check_extract(measure)
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

    def _check_extract(self, measure: Measure) -> None:
        if not self.extract:
            return
        if measure.asks != "answer" or measure.kind == "answer":
            raise ValueError(f"metric {self.identifier!r} scores no text of the answer, so it has no extract")
        try:
            chain = extraction(self.extract)
        except InvalidCall as error:
            raise ValueError(f"metric {self.identifier!r}: {error}") from error
        if chain.choices not in (None, self.choices):
            raise ValueError(
                f"metric {self.identifier!r} has choices in the columns {self.choices!r} and "
                f"{chain.choices!r}: use one"
            )
        if chain.may_miss and measure.miss is None:
            raise ValueError(
                f"metric {self.identifier!r} has no score for an answer in which nothing is found: give the "
                "last regex of extract a fallback, or the last map a default"
            )

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

    @property
    def choices(self) -> str | None:
        """The column of the rows' choices, or None if the metric needs none."""
        own = self.options.get("choices") if self.built_in in WITH_CHOICES else None
        return self.chain.choices if own is None else own

    @property
    def chain(self) -> Extraction:
        """The steps of `extract`."""
        return extraction(self.extract)

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


def _block_of(judge: Block) -> str:
    name = judge._block_document_name
    return f"{judge.get_block_type_slug()}/{name}" if name else "a model that is not saved"
