"""How a step travels to another flow run and its outcome back: block references, or data without secrets.

An outcome is JSON text; nothing is pickled. Rows and their answers are too much for parameters and artifacts
(see `vllm_tasks.placement.storage`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from pydantic import TypeAdapter

from vllm_tasks import errors
from vllm_tasks.datalayer import Datalayer, is_lake
from vllm_tasks.errors import EngineFailed, InvalidCall, VllmTasksError
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.rows import Completion, Result, RowError
from vllm_tasks.tables.report import Report
from vllm_tasks.validation import Validation
from vllm_tasks.validation.report import ValidationReport

Model = VllmAPI | VllmModel
Parameters = dict[str, Any]

SECRET_ARGUMENTS = ("hf_token",)
"""Of vLLM's engine arguments."""


# ---------------------------------------------------------------------- the call


def model_parameter(model: Model) -> Parameters:
    """`model` without its datalayer, which travels by itself.

    A saved block that is as it was saved travels as a reference. Raises `InvalidCall` for one that is not
    and has a secret or a function that cannot be imported: parameters of flow runs are readable.
    """
    if (reference := _reference(model)) is not None:
        return reference
    secrets = _secrets(model)
    if secrets:
        raise InvalidCall(
            f"{model.identifier!r} has {', '.join(secrets)}, which would be readable in the parameters of "
            "the flow run that it travels to: save the model as a block and load it, model.save(NAME)"
        )
    model._check_portable()
    without = {"db", "metric_values", "block_type_slug"}
    return {name: value for name, value in model.model_dump(mode="json").items() if name not in without}


def _secrets(model: Model) -> list[str]:
    """The fields of `model` that hold a key or a password, or may."""
    found = [
        f"artifacts[{name!r}]" for name, artifact in model.artifacts.items() if _has_secret(artifact.uri)
    ]
    if isinstance(model, VllmAPI):
        return found + (["api_key"] if model.api_key else [])
    found += [f"vllm_kwargs[{name!r}]" for name in SECRET_ARGUMENTS if name in model.vllm_kwargs]
    if model.ray_config.get("runtime_env", {}).get("env_vars"):
        found.append("ray_config['runtime_env']['env_vars']")
    return found


def db_parameter(db: Datalayer | str | None) -> Parameters | None:
    """A datalayer as a reference, or as its URL where no secret is in it; local paths become absolute."""
    if db is None:
        return None
    url = os.fspath(db) if not isinstance(db, Datalayer) else db.url.get_secret_value().strip()
    if isinstance(db, Datalayer) and (reference := _reference(db)) is not None:
        _, path = path_of(url)
        if path and not os.path.isabs(path):
            raise InvalidCall(
                f"the saved datalayer is in {path!r}, which is another folder where a worker runs: save it "
                f"with the full path, such as {os.path.abspath(path)!r}"
            )
        return reference
    if _has_secret(url):
        raise InvalidCall(
            "the datalayer's url has a password or a query, which would be readable in the parameters of the "
            "flow run that it travels to: save the Datalayer as a block and load it, db.save(NAME)"
        )
    told: Parameters = {"url": _absolute(url)}
    return {**told, "read": db.read} if isinstance(db, Datalayer) and db.read else told


def validation_parameter(validation: Validation | None) -> Parameters | None:
    """Raises `InvalidCall` for a judge that is not saved."""
    if validation is None:
        return None
    if unsaved := [metric.identifier for metric in validation.metrics if metric.unsaved]:
        raise InvalidCall(
            f"the metric {unsaved[0]!r} is judged by a model that is not saved, and cannot travel: save "
            "it, and give options={'model': 'vllm-api/NAME'}"
        )
    return validation.model_dump(mode="json")


def _reference(block: Block) -> Parameters | None:
    """`{"$ref": ...}` of a block that is saved with the fields that it has now, else None."""
    if (document := block._block_document_id) is None:
        return None
    with get_client(sync_client=True) as client:
        try:
            saved = type(block)._from_block_document(client.read_block_document(document))
        except ObjectNotFound:
            return None
    if _fields(saved) != _fields(block):
        return None
    return {"$ref": {"block_document_id": str(document)}}


def _fields(block: Block) -> dict[str, Any]:
    return block.model_dump(exclude={"metric_values", "block_type_slug"})


def _has_secret(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.password or (is_lake(url) and "@" in parts.netloc) or ("://" in url and parts.query))


def _absolute(url: str) -> str:
    """A worker runs in another folder."""
    before, path = path_of(url)
    return before + os.path.abspath(path) if path else url


def path_of(url: str) -> tuple[str, str]:
    """The path of a lake in a folder or of a SQLite file, and what is before it; "" elsewhere."""
    scheme, _, path = url.partition(":///")
    if scheme == "sqlite":
        return f"{scheme}:///", os.path.expanduser(path)
    return ("", os.path.expanduser(url)) if "://" not in url else (url, "")


# ---------------------------------------------------------------------- the outcome

REPORTS: dict[str, type[Any]] = {"Report": Report, "ValidationReport": ValidationReport}
ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, VllmTasksError)
}


def outcome_of(value: Any) -> str:
    """What a step gave, a report or a text, as JSON."""
    if isinstance(value, str):
        return json.dumps({"text": value})
    if isinstance(value, Report):  # artifacts are for more people than the tables
        worst = tuple(dataclasses.replace(row, message=row.reason) for row in value.worst)
        value = dataclasses.replace(value, worst=worst)
    return json.dumps({type(value).__name__: dataclasses.asdict(value)}, default=str)


def outcome_of_error(error: VllmTasksError, answered: str | None = None) -> str:
    """Why a step failed, as JSON; with its report where it has one, or the place of what was `answered`."""
    told: Parameters = {"error": type(error).__name__, "message": str(error), "repeatable": error.repeatable}
    if answered is not None:
        told["answered"] = answered
    if isinstance(error, EngineFailed):
        told["temporary"] = error.temporary
    if (report := getattr(error, "report", None)) is not None:
        told["report"] = outcome_of(report)
    return json.dumps(told)


def value_of(outcome: str) -> Any:
    """The report or text of an outcome; raises the error that it tells of."""
    (name, told), *more = json.loads(outcome).items()
    if name == "error":
        raise _error_of(told, dict(more))
    return told if name == "text" else _read(REPORTS[name], json.dumps(told))


def has_failed(outcome: str) -> bool:
    """Whether `value_of` raises."""
    return "error" in json.loads(outcome)


def answered_in(outcome: str) -> str | None:
    """The place of the answers to rows, of all of them or of those before an error; None without any."""
    told = json.loads(outcome)
    place: str | None = told.get("text") or told.get("answered")
    return place


def _error_of(name: str, told: Parameters) -> VllmTasksError:
    kind = ERRORS.get(name, VllmTasksError)  # of another version, perhaps
    if "report" in told:
        error = kind(told["message"], value_of(told["report"]))
    elif "temporary" in told:
        error = EngineFailed(told["message"], told["temporary"])
    else:
        error = kind(told["message"])
    error.repeatable = False  # the flow run that it comes from has tried again already
    return error


def _read(kind: type[Any], text: str) -> Any:
    # Named in annotations of the reports, which do not import them.
    from vllm_tasks.metrics.measure import Confusion  # noqa: F401
    from vllm_tasks.validation.statistics import Paired  # noqa: F401

    return TypeAdapter(kind).validate_json(text)


# ---------------------------------------------------------------------- rows


def results_of(content: Sequence[Any]) -> list[Result | None]:
    """Answers and errors of rows as `results_as_data` gave them."""
    answers = TypeAdapter(Completion), TypeAdapter(RowError)
    return [each and answers["kind" in each].validate_python(each) for each in content]


def results_as_data(results: Sequence[Result | None]) -> list[Any]:
    """Answers and errors of rows as JSON data; None for a row that has neither."""
    return [result and dataclasses.asdict(result) for result in results]
