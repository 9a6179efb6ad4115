"""The history of validations, stored next to the outputs: `_metric_values`, and `_metric_scores` row by row.

The values of a run are written last, so a `kill -9` in between leaves a run that readers do not see: a run
that has outputs but no row in `_metric_values` was interrupted, and may resume, unless `_left_runs` has it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pyarrow as pa

from vllm_tasks.datalayer.selection import Tables
from vllm_tasks.datalayer.table_names import outputs_name
from vllm_tasks.datalayer.workspace import literal
from vllm_tasks.errors import InvalidCall
from vllm_tasks.validation import Validation
from vllm_tasks.validation.report import Record

VALUES, SCORES, LEFT = "_metric_values", "_metric_scores", "_left_runs"
RESUMED_WITHIN = timedelta(hours=12)
"""An interrupted run that began earlier does not resume, since the weights may have changed."""
STAMP = "%Y%m%dT%H%M%S%f"


TYPES = {
    "str": pa.string(),
    "str | None": pa.string(),
    "float": pa.float64(),
    "int": pa.int64(),
    "bool": pa.bool_(),
    "datetime": pa.timestamp("us", "UTC"),
}


def new_run(dataset_hash: str) -> str:
    """A new name for a run over these rows: the start of their hash, the time, and 4 random digits."""
    return f"{dataset_hash[:12]}-{datetime.now(UTC).strftime(STAMP)}-{secrets.token_hex(2)}"


def began(run: str) -> datetime:
    """The time at which `run` began, from its name."""
    return datetime.strptime(run.split("-")[1], STAMP).replace(tzinfo=UTC)


def interrupted(
    home: Tables, predict_id: str, dataset_hash: str, fingerprint: str, past: Sequence[Record]
) -> str | None:
    """The latest run over these rows that has answers (under this fingerprint) but no record, is recent
    enough to resume, and began after all in `past`, and after the one that a fresh start has left."""
    found = runs_with_answers(home, predict_id, dataset_hash, fingerprint)
    if not (open_runs := found - (recorded := {record.answers for record in past})):
        return None
    left = {row["run"] for row in home.stored(LEFT, '"run"', _over(dataset_hash))}
    since = max([datetime.now(UTC) - RESUMED_WITHIN, *map(began, found & (recorded | left))])
    return max((r for r in open_runs if began(r) > since), key=began, default=None)


def leave(home: Tables, run: str) -> None:
    """Never resume this run again, nor one that began before it, whatever becomes of the fresh start."""
    home.put(LEFT, pa.table({"run": pa.array([run], pa.string())}), ["run"])


def runs_with_answers(home: Tables, predict_id: str, dataset_hash: str, fingerprint: str) -> set[str]:
    """Runs over these rows that have answers under this fingerprint."""
    where = f'{_over(dataset_hash)} AND "_fingerprint" = {literal(fingerprint)}'
    return {row["run"] for row in home.stored(outputs_name(predict_id), 'DISTINCT "run"', where)}


def _over(dataset_hash: str) -> str:
    """The condition on runs over these rows."""
    return f'"run" LIKE {literal(dataset_hash[:12] + "-%")}'


def records_of(home: Tables, model: str, dataset: str) -> list[Record]:
    """The records of this model on this data set, oldest first."""
    where = f'"model" = {literal(model)} AND "dataset" = {literal(dataset)}'
    rows = home.stored(VALUES, "*", where)
    return sorted((_record(dict(row)) for row in rows), key=lambda record: (record.created_at, record.metric))


@dataclass(frozen=True)
class Baseline:
    """A run to compare a new run with."""

    kind: Literal["last", "best", "named"]
    record: Record
    chosen_from: int
    """The number of runs among which its value, or that it passed, made it the baseline. It was lucky on
    average, so a later run looks worse than it is; its p-value is multiplied by this number (Bonferroni)."""


def comparable(history: Sequence[Record], dataset_hash: str, outputs: str, metric: str) -> list[Record]:
    """The records of the metric over the same rows in the same outputs table, oldest first."""
    return [r for r in history if (r.dataset_hash, r.outputs, r.metric) == (dataset_hash, outputs, metric)]


def baselines(records: Sequence[Record], baseline: str, threshold: float | None = None) -> list[Baseline]:
    """The runs to compare a new run with: the last one that passed, and the best one or the one named.

    The last one was chosen from itself and the later runs, which did not pass, and from one more if it may
    have reached the `threshold` by luck, which is inside its interval; the best one from all runs that
    passed; a named one from none.
    """
    passed = [i for i, record in enumerate(records) if record.passed]
    if not passed:
        return []
    last = records[passed[-1]]
    worst = last.low if last.higher_is_better else -last.high
    by_luck = threshold is not None and worst < (threshold if last.higher_is_better else -threshold)
    found = [Baseline("last", last, len(records) - passed[-1] + by_luck)]
    if baseline == "best":
        candidates = [records[i] for i in passed]
        best = max(candidates, key=lambda r: (r.value if r.higher_is_better else -r.value, r.created_at))
        found.append(Baseline("best", best, len(candidates)))
    elif baseline != "last":
        found += [Baseline("named", record, 1) for record in records if record.run == baseline]
    return [one for i, one in enumerate(found) if not i or one.record.run != found[0].record.run]


def check_baseline(validation: Validation, home: Tables, model: str) -> None:
    """Raise `InvalidCall` if the validation names a run as its baseline that is none of this model's."""
    if validation.baseline in ("best", "last") or not validation.max_regression:
        return
    runs = [r.run for dataset in validation.datasets for r in records_of(home, model, dataset.identifier)]
    if validation.baseline not in runs:
        latest = ", ".join(dict.fromkeys(reversed(runs[-3:]))) or "none yet"
        raise InvalidCall(
            f"baseline={validation.baseline!r} is not a run of {model!r} on these data sets; the latest are "
            f'{latest}. Give one of the column `run` of `_metric_values`, "best", or "last"'
        )


def record(
    home: Tables, found: Sequence[Record], scores: Mapping[tuple[str, str], Mapping[int, float | None]]
) -> None:
    """Append the scores, by run and metric and then by row, and after them all values in one commit. The
    order protects against a kill in between; repeating the call changes nothing."""
    rows = [(run, metric, row, score) for (run, metric), of in scores.items() for row, score in of.items()]
    if rows:
        names = ("run", "metric", "row", "score")
        types = pa.string(), pa.string(), pa.int64(), pa.float64()
        columns = [
            pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), types, strict=True)
        ]
        home.put(SCORES, pa.table(columns, names=names), ["run", "metric", "row"])
    schema = pa.schema([(field.name, TYPES[str(field.type)]) for field in fields(Record)])
    home.put(VALUES, pa.Table.from_pylist([vars(r) for r in found], schema), ["run", "metric"])


def _record(row: dict[str, Any]) -> Record:
    at = row["created_at"]
    at = datetime.fromisoformat(at) if isinstance(at, str) else at
    row["created_at"] = at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
    row["higher_is_better"], row["passed"] = bool(row["higher_is_better"]), bool(row["passed"])
    return Record(**row)
