"""The results of a validation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vllm_tasks.metrics.measure import Table
    from vllm_tasks.validation.statistics import Paired

OnError = Literal["miss", "exclude"]


@dataclass(frozen=True)
class Value:
    """One metric on one data set: its value with a 95 % interval, and the rows that it comes from.

    `n` is the number of rows in the value. `failed` and `truncated` count rows of the whole data set.
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
    clusters: int | None = None
    """Rows that are independent of each other, a cluster of rows as one; None: not known."""
    approximate: str | None = None
    """Why the interval may hold the true value less often than 95 times of 100; None if it is tested to."""

    def __str__(self) -> str:
        note = ", approximate" if self.approximate else ""
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g}, n={self.n:,}{note})"


@dataclass(frozen=True)
class Record:
    """One row of `_metric_values`: a metric of one run of a model over one data set."""

    run: str
    metric: str
    answers: str
    """The run whose answers were scored: this run or, with `reuse`, an earlier one."""
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
    """Whether the whole run passed, all metrics together."""
    reason: str | None
    """Why this metric did not pass."""
    compared_with: str | None
    """The run that the regression was tested against."""
    uuid: str
    flow_run: str | None
    created_at: datetime


@dataclass(frozen=True)
class Against:
    """The comparison of one metric with an earlier run."""

    kind: Literal["last", "best", "named"]
    """The last run that passed, the best of them, or the run that the validation names."""
    run: str
    paired: Paired
    p_worse: float | None
    """The p-value that the gate goes by: `paired.p_worse` where it counts all limits, baselines and data sets
    of the verdict, see `vllm_tasks.validation.gate`. None without a `max_regression`."""


@dataclass(frozen=True)
class Verdict:
    """The gate's decision on one metric."""

    metric: str
    threshold: float | None
    max_regression: float | None
    against: tuple[Against, ...]
    """The last run that passed first; empty if there is no run to compare with."""
    untested: str | None
    """Why `max_regression` could not be tested; None if it was, or if there is none."""
    reason: str | None
    """Why the metric did not pass; None if it passed."""
    power: str | None = None
    """How often the rows show a drop, and how many it takes; None without a `max_regression`, and for a
    metric of load."""

    @property
    def paired(self) -> Paired | None:
        """The comparison with the last run that passed; None without one."""
        return self.against[0].paired if self.against else None

    @property
    def compared_with(self) -> str | None:
        """The last run that passed; None without one."""
        return self.against[0].run if self.against else None


@dataclass(frozen=True)
class ChangedRow:
    """A row whose score differs from the run compared with, and both answers."""

    row: int
    metric: str
    before: float
    after: float
    improved: bool
    inputs: Any
    target: Any
    answer_before: Any
    answer_after: Any


@dataclass(frozen=True)
class WorstRow:
    """A row with one of the worst scores of this run, and its answer or error."""

    row: int
    metric: str
    score: float
    inputs: Any
    target: Any
    answer: Any


@dataclass(frozen=True)
class DatasetReport:
    """One model on one data set: values, the gate's verdicts, and the tables that hold every row."""

    dataset: str
    dataset_hash: str
    dataset_table: str
    run: str
    rows: int
    failed: int
    truncated: int
    outputs: str
    """The table of the answers, with the key (`run`, `row`)."""
    processed: int
    """Requests sent by this call, also for likelihoods and to judges; not those sent before a run resumed."""
    values: tuple[Value, ...]
    verdicts: tuple[Verdict, ...]
    history: tuple[Record, ...] = field(default=(), repr=False)
    """Records of earlier runs and of this one, oldest first."""
    changed: tuple[ChangedRow, ...] = field(default=(), repr=False)
    worst: tuple[WorstRow, ...] = field(default=(), repr=False)
    """The worst rows of each metric, worst first, without rows that have the best possible score."""
    tables: dict[str, Table] = field(default_factory=dict, repr=False)
    """Confusion tables, and tables of reliability, by metric."""
    resumed_at: datetime | None = None
    """When this call resumed an interrupted run; None if it processed or scored all rows itself."""

    @property
    def answers(self) -> str:
        """The run whose answers were scored: this one or, with `reuse`, an earlier one."""
        return next((record.answers for record in self.history if record.run == self.run), self.run)

    @property
    def reasons(self) -> list[str]:
        """Why this data set did not pass, one reason for each metric; empty if it passed."""
        return [f"{self.dataset}: {verdict.reason}" for verdict in self.verdicts if verdict.reason]


@dataclass(frozen=True)
class ValidationReport:
    """The result of `validate`: one model on its data sets."""

    model: str
    fingerprint: str
    datasets: tuple[DatasetReport, ...]

    @property
    def metric_values(self) -> dict[str, dict[str, float]]:
        """Values by data set and metric, as in `metric_values` of the model."""
        return {d.dataset: {v.metric: v.value for v in d.values} for d in self.datasets}

    @property
    def reasons(self) -> list[str]:
        """Why the model did not pass; empty if it passed."""
        return [reason for dataset in self.datasets for reason in dataset.reasons]

    @property
    def passed(self) -> bool:
        """Whether every metric on every data set is within its limits."""
        return not self.reasons

    def __str__(self) -> str:
        values = [f"{d.dataset}: {v.metric} {v}" for d in self.datasets for v in d.values]
        return f"{self.model}: {'; '.join(values)}{'' if self.passed else '; ' + '; '.join(self.reasons)}"

    def __repr__(self) -> str:
        return f"<ValidationReport of {self}>"

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        from vllm_tasks.validation.notebook import html_of

        return html_of(self)


@dataclass(frozen=True)
class Standing:
    """One model by one metric on one data set. `paired` compares with the first model; None for the first."""

    dataset: str
    metric: str
    model: str
    value: Value
    passed: bool
    """Whether the model passed its own gate."""
    paired: Paired | None


@dataclass(frozen=True)
class Comparison:
    """Several models on the same rows; the others are compared with the first, row by row."""

    models: tuple[str, ...]
    standings: tuple[Standing, ...]
    """One for each data set, metric and model, in the order of the validation and of the models."""

    def __str__(self) -> str:
        lines = [f"against {self.models[0]}:"]
        for s in self.standings:
            change = "" if s.paired is None else f", {s.paired.difference:+.4g}"
            if s.paired is not None and not math.isnan(s.paired.low):
                change += f" ({s.paired.low:+.4g} to {s.paired.high:+.4g}, p={s.paired.p_different:.2g})"
            lines.append(f"  {s.dataset} {s.metric}: {s.model} {s.value}{change}")
        return "\n".join(lines)
