"""What a validation found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_tasks.metrics.measure import Confusion
from vllm_tasks.validation.history import Record
from vllm_tasks.validation.scores import Value
from vllm_tasks.validation.statistics import Paired


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one metric. `paired` against the last run that passed, None without one."""

    metric: str
    threshold: float | None
    max_regression: float | None
    paired: Paired | None
    compared_with: str | None
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
class DatasetReport:
    """One model on one data set: values, the gate's verdicts, and where every row can be found."""

    dataset: str
    dataset_hash: str
    run: str
    rows: int
    failed: int
    truncated: int
    outputs: str
    """Where the answers are, with the key (`run`, `row`)."""
    asked: int
    """Rows asked by this call; the others had answers of this run before."""
    values: tuple[Value, ...]
    verdicts: tuple[Verdict, ...]
    history: tuple[Record, ...] = field(default=(), repr=False)
    """Of earlier runs and of this one, oldest first."""
    changed: tuple[ChangedRow, ...] = field(default=(), repr=False)
    tables: dict[str, Confusion] = field(default_factory=dict, repr=False)
    """Confusion tables by metric."""

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
