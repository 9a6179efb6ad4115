"""What a validation found."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vllm_tasks.metrics.measure import Confusion
    from vllm_tasks.validation.statistics import Paired

OnError = Literal["miss", "exclude"]


@dataclass(frozen=True)
class Value:
    """One metric on one data set: its value with a 95 % interval, and what it is of.

    `n` rows count; `failed` and `truncated` of the data set's rows are counted whether or not they do.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    failed: int
    truncated: int
    on_error: OnError
    higher_is_better: bool

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g}, n={self.n:,})"


@dataclass(frozen=True)
class Record:
    """One row of `_metric_values`: a metric of one run of a model over one data set."""

    run: str
    metric: str
    answers: str
    """The run whose answers were scored: itself or, with `reuse`, an earlier one."""
    model: str
    dataset: str
    dataset_hash: str
    dataset_table: str
    outputs: str
    fingerprint: str
    value: float
    low: float
    high: float
    n: int
    failed: int
    truncated: int
    on_error: str
    higher_is_better: bool
    passed: bool
    """Of the whole run, all metrics together."""
    reason: str | None
    """Why this metric did not pass."""
    compared_with: str | None
    """The run that the regression was tested against."""
    uuid: str
    flow_run: str | None
    created_at: datetime


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one metric. `paired` against the last run that passed, None without one."""

    metric: str
    threshold: float | None
    max_regression: float | None
    paired: Paired | None
    compared_with: str | None
    untested: bool
    """There is a `max_regression`, and no run to compare with."""
    reason: str | None
    """Why it did not pass; None when it did."""


@dataclass(frozen=True)
class ChangedRow:
    """A row whose score is another than in the run before, with what was said then and now."""

    row: int
    metric: str
    before: float
    after: float
    is_win: bool
    inputs: Any
    target: Any
    said_before: Any
    said_after: Any


@dataclass(frozen=True)
class WorstRow:
    """A row with one of the worst scores of this run, and what was said, or why it failed."""

    row: int
    metric: str
    score: float
    inputs: Any
    target: Any
    said: Any


@dataclass(frozen=True)
class DatasetReport:
    """One model on one data set: values, the gate's verdicts, and where every row can be found."""

    dataset: str
    dataset_hash: str
    dataset_table: str
    run: str
    rows: int
    failed: int
    truncated: int
    outputs: str
    """Where the answers are, with the key (`run`, `row`)."""
    processed: int
    """Requests of this call, also those for likelihoods and to judges; not what was answered before."""
    values: tuple[Value, ...]
    verdicts: tuple[Verdict, ...]
    history: tuple[Record, ...] = field(default=(), repr=False)
    """Of earlier runs and of this one, oldest first."""
    changed: tuple[ChangedRow, ...] = field(default=(), repr=False)
    worst: tuple[WorstRow, ...] = field(default=(), repr=False)
    """By metric, the worst row first; none with the best score that there can be."""
    tables: dict[str, Confusion] = field(default_factory=dict, repr=False)
    """Confusion tables by metric."""

    @property
    def answers(self) -> str:
        """The run whose answers were scored: this one or, with `reuse`, an earlier one."""
        return next((record.answers for record in self.history if record.run == self.run), self.run)

    @property
    def reasons(self) -> list[str]:
        return [f"{self.dataset}: {verdict.reason}" for verdict in self.verdicts if verdict.reason]


@dataclass(frozen=True)
class ValidationReport:
    """What `validate` found of one model."""

    model: str
    fingerprint: str
    datasets: tuple[DatasetReport, ...]

    @property
    def metric_values(self) -> dict[str, dict[str, float]]:
        """Values by data set and metric, as on the model."""
        return {d.dataset: {v.metric: v.value for v in d.values} for d in self.datasets}

    @property
    def reasons(self) -> list[str]:
        """Why the gate is shut; empty when all passed."""
        return [reason for dataset in self.datasets for reason in dataset.reasons]

    @property
    def passed(self) -> bool:
        return not self.reasons

    def __str__(self) -> str:
        values = [f"{d.dataset}: {v.metric} {v}" for d in self.datasets for v in d.values]
        return f"{self.model}: {'; '.join(values)}{'' if self.passed else '; ' + '; '.join(self.reasons)}"


@dataclass(frozen=True)
class Standing:
    """One model by one metric on one data set; `paired` against the first model, None for itself."""

    dataset: str
    metric: str
    model: str
    value: Value
    passed: bool
    """Its own gate."""
    paired: Paired | None


@dataclass(frozen=True)
class Comparison:
    """Models, the first of which the others are compared with, row by row."""

    models: tuple[str, ...]
    standings: tuple[Standing, ...]
    """By data set, metric and model, in the order of the validation and the models."""

    def __str__(self) -> str:
        lines = [f"against {self.models[0]}:"]
        for s in self.standings:
            change = (
                ""
                if s.paired is None
                else (
                    f", {s.paired.difference:+.4g} ({s.paired.low:+.4g} to {s.paired.high:+.4g}, "
                    f"p={s.paired.p_different:.2g})"
                )
            )
            lines.append(f"  {s.dataset} {s.metric}: {s.model} {s.value}{change}")
        return "\n".join(lines)
