"""A job file: the parameters of a deployable flow, in YAML.

    model: {identifier: tagger, api_url: "http://gpu:8000", prompt: "Tag: {input}"}
    X: text
    select: tickets
    db: data/

`model`, `db`, `source` and the model's own `db` may also name a saved block, as `vllm-api/tagger`, or as
deployments do: `{$ref: {block_document_slug: vllm-api/tagger}}`. The parameters are those of
`vllm_tasks.flows.batch_predict` and of `vllm_tasks.flows.validate_model`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from prefect import Flow
from prefect.blocks.core import Block
from pydantic import TypeAdapter, ValidationError

from vllm_tasks import Datalayer, InvalidCall, VllmAPI, VllmModel
from vllm_tasks._cli.document import mapping_in
from vllm_tasks.errors import ServerUnavailable, near

BLOCKS: dict[str, dict[str, type[Block]]] = {
    "model": {"vllm-api": VllmAPI, "vllm-model": VllmModel},
    "db": {"vllm-datalayer": Datalayer},
    "source": {"vllm-datalayer": Datalayer},
}
"""Kinds of saved blocks that a parameter may name."""
REF = "$ref"
"""The key of a mapping that stands for a saved block, as in the parameters of a deployment."""


def read(file: Path, flow: Flow[..., Any]) -> dict[str, Any]:
    """The parameters of `flow` that a job file gives, with the types that the flow gives them.

    Prefect's own check is not used: it logs all parameters, secrets among them, and takes each `$ref` in a
    JSON Schema for a saved block.

    Raises:
        InvalidCall: The file cannot be read, is not a mapping, or has a parameter that is unknown or wrong.
        ServerUnavailable: Prefect's server does not answer for a saved block.
    """
    given = mapping_in(file)
    known = inspect.signature(flow.fn).parameters
    for name in given:
        if name not in known:
            raise InvalidCall(f"{file}: {flow.name} has no parameter {name!r:.100}{near(str(name), known)}")
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in given:
            raise InvalidCall(f"{file}: {name!r} is missing; {flow.name} needs it")
    return {name: _typed(file, name, value, known[name].annotation) for name, value in given.items()}


def _typed(file: Path, name: str, given: Any, kind: Any) -> Any:
    """A parameter's value. YAML has types, so a text is not a number, and `yes` is not a truth value."""
    try:
        return TypeAdapter(kind).validate_python(_value(name, given), strict=not isinstance(given, dict))
    except ValidationError as error:
        raise InvalidCall(f"{file}: {name}: {wrong_in(error)}") from None  # the cause would show the input


def wrong_in(error: ValidationError) -> str:
    """What is wrong with fields, without their values."""
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, each["loc"])), each["msg"], WAY_OUT.get(each["type"]))))
        for each in error.errors(include_input=False)
    )


WAY_OUT = {"bool_type": "write true or false", "string_type": "put it in quotes"}
"""What to write, by pydantic's type of an error."""


def _value(name: str, given: Any) -> Any:
    """A parameter's value: the saved block that is named, the model or tables that fields describe."""
    if name not in BLOCKS or (given is None and name != "model"):
        return given
    if not isinstance(given, dict | str):
        raise InvalidCall(
            f"{name}: {given!r:.100} is neither a mapping of fields nor a text: write the fields, or name a "
            f"saved block, {next(iter(BLOCKS[name]))}/NAME"
        )
    if isinstance(given, dict) and REF in given:
        return _referred(name, given)
    if isinstance(given, str):
        return saved(name, given)
    if name == "model" and isinstance(given, dict):
        kind = VllmModel if "model_name" in given else VllmAPI
        if odd := [field for field in given if not isinstance(field, str)]:
            raise InvalidCall(f"model: {odd[0]!r:.100} is not the name of a field")
        return kind.model_validate(given | ({"db": _value("db", given["db"])} if "db" in given else {}))
    return given


def _referred(name: str, given: Mapping[str, Any]) -> Any:
    """The saved block that a `$ref` names."""
    match given:
        case {"$ref": {"block_document_slug": str(slug), **more}, **others} if not more and not others:
            if slug.partition("/")[0] in BLOCKS[name]:
                return saved(name, slug)
    kinds = " or ".join(f"{kind}/NAME" for kind in BLOCKS[name])
    raise InvalidCall(
        f"{name}: a {REF} must name a saved block by its slug: write {kinds}, or "
        f"{{{REF}: {{block_document_slug: {next(iter(BLOCKS[name]))}/NAME}}}}"
    )


def check_sampling(file: Path, sampling: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise `InvalidCall` for a sampling parameter that would become an argument of `function`."""
    taken = [name for name in sampling if name in inspect.signature(function).parameters]
    if taken:
        raise InvalidCall(
            f"{file}: sampling has {taken[0]!r:.100}, which is an argument of {function.__name__}: a "
            "sampling parameter of this name goes into the model's predict_kwargs"
        )


def check_runs_here(file: Path, model: VllmAPI | VllmModel, shards: int = 1, *, asks: bool = False) -> None:
    """Raise `InvalidCall` for a job that needs a flow run: on a work pool, or to ask a person in the UI."""
    resources = model.resources()
    elsewhere = resources.work_pool or resources.deployment
    if elsewhere:
        why = f"names the work pool or deployment {elsewhere!r}"
    elif asks:
        why = "has on_gate_failed: ask, and a person is asked in the Prefect UI"
    elif shards != 1:
        why = f"has shards={shards}"
    else:
        return
    raise InvalidCall(f"{file} {why}: run it as a deployment of the flow batch-predict or validate-model")


def saved(name: str, given: str) -> Any:
    """The saved block that a text names; for `db` and `source` also the tables at a path or URL."""
    kind, slash, block = given.partition("/")
    if slash and kind in BLOCKS[name]:
        try:
            return BLOCKS[name][kind].load(block)
        except (ValueError, httpx.InvalidURL) as error:  # Prefect's, for a block that is not there
            raise InvalidCall(f"{name}: {given!r} cannot be loaded: {error}") from error
        except (httpx.HTTPError, RuntimeError) as error:  # the latter of a server that Prefect starts itself
            raise ServerUnavailable(
                f"{name}: {given!r}: Prefect's server does not answer: {error}"
            ) from error
    if "vllm-datalayer" in BLOCKS[name]:
        return Datalayer.model_validate({"url": given})
    raise InvalidCall(
        f"{name}={given!r:.100} names no saved block: write {' or '.join(BLOCKS[name])}, a slash and its name"
    )
