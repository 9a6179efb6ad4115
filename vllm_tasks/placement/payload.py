"""The payload of a step that runs in another flow run: block references, or data without secrets.

The outcome that comes back is JSON text; nothing is pickled. Rows and answers are too large for parameters
and artifacts (see `vllm_tasks.placement.storage`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from pydantic import TypeAdapter

from vllm_tasks import errors
from vllm_tasks.datalayer import Datalayer, is_lake
from vllm_tasks.errors import EngineFailed, InvalidCall, VllmTasksError
from vllm_tasks.models import VllmAPI, VllmModel
from vllm_tasks.placement.grace import within_grace_period
from vllm_tasks.rows import Completion, Result, RowError
from vllm_tasks.tables.report import Report
from vllm_tasks.validation import Validation
from vllm_tasks.validation.report import ValidationReport

Model = VllmAPI | VllmModel
Parameters = dict[str, Any]

SECRET_ARGUMENTS = ("hf_token", "api_key")
"""The engine arguments of vLLM that are secrets, in any spelling of theirs."""


# ---------------------------------------------------------------------- the call


def model_parameter(model: Model) -> Parameters:
    """Return a model as parameters of a flow run, without its datalayer, which has a parameter of its own.

    Args:
        model: The model.

    Returns:
        A reference to its block if it is unchanged since it was saved, else its fields.

    Raises:
        InvalidCall: The fields hold a secret, since parameters of flow runs are readable by others, or a
            function that cannot be imported.
    """
    if (reference := _reference(model)) is not None:
        return reference
    secrets = _secrets(model)
    if secrets:
        raise InvalidCall(
            f"{model.identifier!r} has {', '.join(secrets)}, which would be readable in the parameters of "
            "the flow run on the work pool: save the model as a block, model.save(NAME), and load it"
        )
    model._check_portable()
    without = {"db", "metric_values", "block_type_slug"}
    return {name: value for name, value in model.model_dump(mode="json").items() if name not in without}


def _secrets(model: Model) -> list[str]:
    """The fields of `model` that hold, or may hold, a key or a password."""
    found = [
        f"artifacts[{name!r}]" for name, artifact in model.artifacts.items() if _has_secret(artifact.uri)
    ]
    if model.prompt_file and _has_secret(model.prompt_file):
        found.append("prompt_file")
    if isinstance(model, VllmAPI):
        secrets = ("api_key", "basic_auth", "headers")
        return found + [name for name in secrets if getattr(model, name)]
    plain = {name: name.lower().replace("-", "_") for name in model.vllm_kwargs}
    found += [f"vllm_kwargs[{name!r}]" for name in plain if plain[name] in SECRET_ARGUMENTS]
    if model.ray_address and _has_secret(model.ray_address):
        found.append("ray_address")
    if model.ray_config.get("runtime_env", {}).get("env_vars"):
        found.append("ray_config['runtime_env']['env_vars']")
    return found


def db_parameter(db: Datalayer | str | None) -> Parameters | None:
    """Return a datalayer as parameters of a flow run.

    Args:
        db: The datalayer or its URL; None for none.

    Returns:
        A reference to its block if it is unchanged since it was saved, else its URL, with a full path.

    Raises:
        InvalidCall: The URL holds a secret, or the saved block has a relative path.
    """
    if db is None:
        return None
    url = os.fspath(db) if not isinstance(db, Datalayer) else db.url.get_secret_value().strip()
    if isinstance(db, Datalayer) and (reference := _reference(db)) is not None:
        _, path = path_of(url)
        if path and not os.path.isabs(path):
            raise InvalidCall(
                f"the saved datalayer is in {path!r}, which is another folder for a worker: save it "
                f"with the full path, such as {os.path.abspath(path)!r}"
            )
        return reference
    if _has_secret(url):
        raise InvalidCall(
            "the datalayer's url has a password or a query, which would be readable in the parameters of the "
            "flow run on the work pool: save the Datalayer as a block, db.save(NAME), and load it"
        )
    fields: Parameters = {"url": _absolute(url)}
    return {**fields, "read": db.read} if isinstance(db, Datalayer) and db.read else fields


def validation_parameter(validation: Validation | None) -> Parameters | None:
    """Return a validation as parameters of a flow run.

    Args:
        validation: The validation; None for none.

    Returns:
        Its fields.

    Raises:
        InvalidCall: It has a judge that is not saved.
    """
    if validation is None:
        return None
    if unsaved := [metric.identifier for metric in validation.metrics if metric.unsaved]:
        raise InvalidCall(
            f"the metric {unsaved[0]!r} is judged by a model that is not saved, which cannot be sent to a "
            "work pool: save it, and give options={'model': 'vllm-api/NAME'}"
        )
    return validation.model_dump(mode="json")


def _reference(block: Block) -> Parameters | None:
    """`{"$ref": ...}` of a block that is saved with the fields that it has now, else None."""
    if (document := block._block_document_id) is None:
        return None
    saved = within_grace_period(lambda: _saved(type(block), document))
    if saved is None or _fields(saved) != _fields(block):
        return None
    return {"$ref": {"block_document_id": str(document)}}


def _saved(kind: type[Block], document: UUID) -> Block | None:
    with get_client(sync_client=True) as client:
        try:
            return kind._from_block_document(client.read_block_document(document))
        except ObjectNotFound:
            return None


def _fields(block: Block) -> dict[str, Any]:
    return block.model_dump(exclude={"metric_values", "block_type_slug"})


def _has_secret(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.password or (is_lake(url) and "@" in parts.netloc) or ("://" in url and parts.query))


def _absolute(url: str) -> str:
    """`url` with a full path, since a worker runs in another folder."""
    before, path = path_of(url)
    return before + os.path.abspath(path) if path else url


def path_of(url: str) -> tuple[str, str]:
    """Split the URL of a datalayer before its local path.

    Args:
        url: The URL.

    Returns:
        The part before the path, and the path of a lake in a folder or of a SQLite file, else "".
    """
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
    """Return the result of a step as JSON.

    Args:
        value: A report, or the path of answers in the result storage.

    Returns:
        The outcome; the reasons of failed rows in it hold no contents of rows.
    """
    if isinstance(value, str):
        return json.dumps({"text": value})
    if isinstance(value, Report):  # artifacts are for more people than the tables
        worst = tuple(dataclasses.replace(row, message=row.reason) for row in value.worst)
        value = dataclasses.replace(value, worst=worst)
    return json.dumps({type(value).__name__: dataclasses.asdict(value)}, default=str)


def outcome_of_error(error: VllmTasksError, answers: str | None = None) -> str:
    """Return the error of a step as JSON, with its report if it has one.

    Args:
        error: The error.
        answers: The path of the answers before the error in the result storage; None without any.

    Returns:
        The outcome.
    """
    data: Parameters = {"error": type(error).__name__, "message": str(error), "repeatable": error.repeatable}
    if answers is not None:
        data["answered"] = answers
    if isinstance(error, EngineFailed):
        data["temporary"] = error.temporary
    if (report := getattr(error, "report", None)) is not None:
        data["report"] = outcome_of(report)
    return json.dumps(data)


def value_of(outcome: str) -> Any:
    """Return the report or text of an outcome.

    Args:
        outcome: What `outcome_of` or `outcome_of_error` returned.

    Returns:
        The report or text.

    Raises:
        VllmTasksError: The outcome is an error.
    """
    (name, value), *more = json.loads(outcome).items()
    if name == "error":
        raise _error_of(value, dict(more))
    return value if name == "text" else _read(REPORTS[name], json.dumps(value))


def has_failed(outcome: str) -> bool:
    """Return whether the outcome is an error, which `value_of` raises."""
    return "error" in json.loads(outcome)


def answers_path(outcome: str) -> str | None:
    """Return the path of the answers in the result storage, also of those before an error; None if none."""
    data = json.loads(outcome)
    path: str | None = data.get("text") or data.get("answered")
    return path


def _error_of(name: str, data: Parameters) -> VllmTasksError:
    kind = ERRORS.get(name, VllmTasksError)  # the worker may have another version of this package
    if "report" in data:
        error = kind(data["message"], value_of(data["report"]))
    elif "temporary" in data:
        error = EngineFailed(data["message"], data["temporary"])
    else:
        error = kind(data["message"])
    error.repeatable = False  # the flow run that raised it has retried already
    return error


def _read(kind: type[Any], text: str) -> Any:
    # The annotations of the reports name these types without importing them.
    from vllm_tasks.metrics.measure import Table  # noqa: F401
    from vllm_tasks.validation.statistics import Paired  # noqa: F401

    return TypeAdapter(kind).validate_json(text)


# ---------------------------------------------------------------------- rows


def results_of(content: Sequence[Any]) -> list[Result | None]:
    """Return the answers and errors that `results_as_data` has made JSON data of."""
    answers = TypeAdapter(Completion), TypeAdapter(RowError)
    return [each and answers["kind" in each].validate_python(each) for each in content]


def results_as_data(results: Sequence[Result | None]) -> list[Any]:
    """Return answers and errors of rows as JSON data, in the same order; None for a row that has neither."""
    return [result and dataclasses.asdict(result) for result in results]
