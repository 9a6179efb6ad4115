"""A validation on a reference set of the package, without a job file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_tasks import InvalidCall, VllmAPI, VllmModel, reference_set
from vllm_tasks._cli import job
from vllm_tasks.calls.call import identity_of
from vllm_tasks.datalayer.table_names import ODD
from vllm_tasks.results import ValidationReport
from vllm_tasks.validation.sets import ReferenceName

DB = "validations"
"""Where answers and history of reference sets go, unless the command names another place."""


def check_either(file: Path | None, name: str | None, others: dict[str, Any]) -> None:
    """Raise `InvalidCall` unless there is either a job file alone, or a reference set and its model."""
    given = [option for option, value in others.items() if value is not None]
    if file is not None and name is not None:
        raise InvalidCall(f"{file} is a job and --set {name} a reference set: give one of them")
    if file is None and name is None:
        raise InvalidCall("there is nothing to validate: give a job file, or --set with --model or --url")
    if file is not None and given:
        raise InvalidCall(f"{given[0]} goes with --set; write it into {file}, or leave it out")
    if name is not None and others["--model"] is None and others["--url"] is None:
        raise InvalidCall(
            f"--set {name} needs a model: --model with a folder or a name on Hugging Face, or --url with the "
            "address of a vLLM server"
        )
    if others["--url"] is not None and others["--vllm-kwargs"] is not None:
        raise InvalidCall("--vllm-kwargs is for an engine that is started here, not for --url: leave one out")


def validated(
    name: ReferenceName,
    model: str | None,
    url: str | None,
    rows: int | None,
    db: str | None,
    engine: str | None,
) -> ValidationReport:
    """Validate a model on a reference set. Failed rows are misses, however many there are."""
    found, place = reference_set(name, sample_size=rows), job.saved("db", db or DB)
    made = _on_server(url, model, found.fields) if url is not None else _local(model, engine, found.fields)
    return made.validate(found.validation, db=place, max_failed=None)


def _on_server(url: str, name: str | None, fields: dict[str, Any]) -> VllmAPI:
    """The model of a server; its identifier, by which the history is kept, is the server's name for it."""
    model = VllmAPI(identifier=_identifier(name or "server"), api_url=url, model=name, **fields)
    if name is None:
        served, _ = identity_of(model.engine_config())
        model.identifier = _identifier(served)
    return model


def _local(name: str | None, engine: str | None, fields: dict[str, Any]) -> VllmModel:
    """A model that an engine is started for; no code that comes with it is run unless `engine` allows it."""
    assert name is not None
    folder = Path(name).resolve()
    return VllmModel(
        identifier=_identifier(folder.name if folder.is_dir() else name),
        model_name=name,
        trust_remote_code=False,
        vllm_kwargs=_arguments(engine),
        **fields,
    )


def _arguments(engine: str | None) -> dict[str, Any]:
    try:
        found = json.loads(engine or "{}")
    except ValueError as error:
        raise InvalidCall(f"--vllm-kwargs {engine!r:.100} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidCall(
            f"--vllm-kwargs {engine!r:.100} is not a JSON object, such as '{{\"max_model_len\": 4096}}'"
        )
    return found


def _identifier(name: str) -> str:
    """The name of a model without the signs that cannot be in the name of a table."""
    return "".join("-" if sign in ODD else sign for sign in name)
