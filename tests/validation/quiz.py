"""Ten questions, a server that answers some of them, and what Prefect and the lake hold afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from uuid import UUID

from prefect import flow
from prefect.client.schemas.objects import Artifact
from prefect.runtime import flow_run

from tests.artifacts import artifacts
from tests.events import events_where
from tests.servers.scripted_server import Asked, Reply, Script, ScriptedServer, refused, usual
from vllm_tasks import Datalayer, Dataset, Metric, Validation, VllmAPI, VllmModel, validate
from vllm_tasks.results import ValidationReport

SVG = re.compile(r"!\[[^\]]*\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)")


def said(words: Callable[[str], str | None]) -> Script:
    """A script that answers a prompt with `words(prompt)`; a prompt without words is refused."""

    def script(asked: Asked) -> Reply | None:
        if asked.body is None:
            return None
        if (text := words(asked.prompt)) is None:
            return refused(400, "no")
        reply = usual(asked)
        reply.body["choices"][0]["text"] = text
        return reply

    return script


def right_of(rows: int) -> Callable[[str], str]:
    """A script that answers `q0`, `q1`, ... rightly in so many cases."""
    return lambda prompt: prompt.replace("q", "a") if int(prompt[1:]) < rows else "wrong"


def questions(rows: int = 10) -> list[dict[str, Any]]:
    return [{"question": f"q{i}", "answer": f"a{i}"} for i in range(rows)]


def of(*datasets: str, **fields: Any) -> Validation:
    """Ten questions as each of `datasets`; the metric is whether the answer is right."""
    return Validation(
        **{
            "datasets": [Dataset(identifier=name, raw_data=questions()) for name in datasets or ("ten",)],
            "metrics": [Metric(identifier="exact_match")],
            "key": ("question", "answer"),
            **fields,
        }
    )


@flow
def validated(
    model: VllmAPI | VllmModel, validation: Validation | None = None, **options: Any
) -> tuple[UUID, ValidationReport]:
    report = validate(model, validation, **options)
    return UUID(flow_run.id), report


def artifact(key: str) -> Artifact:
    """The last artifact of this key."""
    return max(artifacts(key), key=lambda one: one.created)


def history(lake: Datalayer) -> list[dict[str, Any]]:
    tables = lake.tables()
    try:
        rows = [dict(row) for batch in tables.read("_metric_values") for row in batch]
    finally:
        tables.close()
    return sorted(rows, key=lambda row: row["created_at"])


def events_of(model: str, count: int) -> list[dict[str, Any]]:
    """The validation events of a model."""
    return events_where(count, resource={"id": [f"vllm-tasks.model.{model}"]})


def saved(name: str, server: ScriptedServer, lake: Datalayer, **fields: Any) -> VllmAPI:
    """A saved model whose tables are a saved Datalayer, as it was loaded."""
    Datalayer(url=lake.url).save(f"{name}-lake")
    db = Datalayer.load(f"{name}-lake")
    made = VllmAPI(identifier=name, api_url=server.url, db=db, model="x", retries=0, **fields)
    made.save(name)
    return loaded(name)


def loaded(name: str) -> VllmAPI:
    found = VllmAPI.load(name)
    assert isinstance(found, VllmAPI)
    return found
