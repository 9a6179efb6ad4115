"""A validation on a reference set of the package, without a job file."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_tasks import InvalidCall, VllmAPI, VllmModel, reference_set
from vllm_tasks._cli import job
from vllm_tasks.results import ValidationReport
from vllm_tasks.validation.sets import ReferenceName

DB = Path("validations")
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


def validated(
    name: ReferenceName, model: str | None, url: str | None, rows: int | None, db: str | None
) -> ValidationReport:
    """Validate a model on a reference set. Failed rows are misses, however many there are."""
    found = reference_set(name, sample_size=rows)
    if db is None:
        DB.mkdir(exist_ok=True)
    return _model(model, url, found.fields).validate(
        found.validation, db=job.saved("db", db or str(DB)), max_failed=None
    )


def _model(name: str | None, url: str | None, fields: dict[str, Any]) -> VllmAPI | VllmModel:
    """The model on a server, or the model that an engine is started for. Its identifier, by which the history
    is kept, is its name, or the server's if the server's only model has no name here."""
    if url is None:
        assert name is not None
        folder = Path(name).resolve()
        identifier = folder.name if folder.is_dir() else name
        return VllmModel(identifier=identifier, model_name=name, **fields)
    return VllmAPI(identifier=name or urlsplit(url).netloc or url, api_url=url, model=name, **fields)
