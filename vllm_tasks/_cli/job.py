"""A job file: the parameters of a deployable flow, in YAML.

    model: {identifier: tagger, api_url: "http://gpu:8000", prompt: "Tag: {input}"}
    X: text
    select: tickets
    db: data/

`model` and `db` may also name a saved block, as `vllm-api/tagger`. The parameters are those of
`vllm_tasks.flows.batch_predict` and of `vllm_tasks.flows.validate_model`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from prefect import Flow
from prefect.blocks.core import Block
from prefect.exceptions import ParameterTypeError
from pydantic import ValidationError

from vllm_tasks import Datalayer, InvalidCall, VllmAPI, VllmModel
from vllm_tasks.errors import near

BLOCKS: dict[str, dict[str, type[Block]]] = {
    "model": {"vllm-api": VllmAPI, "vllm-model": VllmModel},
    "db": {"vllm-datalayer": Datalayer},
}
"""Kinds of saved blocks that a parameter may name."""


def read(file: Path, flow: Flow[..., Any]) -> dict[str, Any]:
    """The parameters of `flow` that a job file gives, checked as the flow checks them.

    Raises:
        InvalidCall: The file cannot be read, is no mapping, or has a parameter that is unknown or wrong.
    """
    given = _mapping_in(file)
    known = inspect.signature(flow.fn).parameters
    for name in given:
        if name not in known:
            raise InvalidCall(f"{file}: {flow.name} has no parameter {name!r:.100}{near(str(name), known)}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in given:
            raise InvalidCall(f"{file}: {name!r} is missing; {flow.name} needs it")
    try:
        found = {name: _value(name, value) for name, value in given.items()}
        return flow.validate_parameters(found)
    except (ValidationError, ParameterTypeError) as error:
        raise InvalidCall(f"{file}: {error}") from error


def _mapping_in(file: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidCall(f"the job file cannot be read: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidCall(f"{file} is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise InvalidCall(f"{file} must be a mapping of parameters to values, such as `select: tickets`")
    return found


def _value(name: str, given: Any) -> Any:
    """A parameter's value: the saved block that a text names, the model or tables that fields describe."""
    if name not in BLOCKS or given is None:
        return given
    if isinstance(given, str):
        return saved(name, given)
    if name == "model" and isinstance(given, dict):
        return VllmModel(**given) if "model_name" in given else VllmAPI(**given)
    return given


def check_runs_here(file: Path, model: VllmAPI | VllmModel, shards: int = 1) -> None:
    """Raise `InvalidCall` for a job that needs flow runs on a work pool, which only a flow starts."""
    resources = model.resources()
    elsewhere = resources.work_pool or resources.deployment
    if elsewhere or shards != 1:
        why = f"names the work pool or deployment {elsewhere!r}" if elsewhere else f"has shards={shards}"
        raise InvalidCall(f"{file} {why}: run it as a deployment of the flow batch-predict or validate-model")


def saved(name: str, given: str) -> Any:
    """The saved block that a text names; for `db` also the tables at a path or URL."""
    kind, slash, block = given.partition("/")
    if slash and kind in BLOCKS[name]:
        try:
            found = BLOCKS[name][kind].load(block)
        except ValueError as error:  # Prefect's, for a block that is not there
            raise InvalidCall(f"{name}: {given!r} cannot be loaded: {error}") from error
        return found
    if name == "db":
        return Datalayer.model_validate({"url": given})
    raise InvalidCall(
        f"{name}={given!r:.100} names no saved block: write {' or '.join(BLOCKS[name])}, a slash and its name"
    )
