"""The parameters of a flow run that works for a step elsewhere."""

from __future__ import annotations

import json

from prefect.settings import get_current_settings

from vllm_tasks.datalayer import Datalayer
from vllm_tasks.errors import InvalidCall
from vllm_tasks.placement import payload
from vllm_tasks.placement.payload import Model, Parameters

PARAMETER_OVERHEAD = 1024
"""Bytes in the parameters of a flow run beside its call: references, names, quotes."""


def parameters(
    call: Parameters, model: Model, db: Datalayer | None, source: Datalayer | None = None
) -> Parameters:
    """The parameters of the thin flow: references to blocks, and all else as one JSON text.

    It is a text because Prefect would take the `$ref` of a JSON Schema for a block.
    """
    references: Parameters = {}
    for name, parameter in (
        ("model", payload.model_parameter(model)),
        ("db", payload.db_parameter(db)),
        ("source", payload.db_parameter(source)),
    ):
        if parameter is not None and "$ref" in parameter:
            references[name] = parameter
        else:
            call = {**call, name: parameter}
    call["kind"] = type(model).__name__
    try:
        text = json.dumps(call, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidCall(
            f"the arguments of a step on a work pool must be plain data (JSON): {error}"
        ) from error
    _check_size(text, call)
    return {"call": text, **references}


def _check_size(text: str, call: Parameters) -> None:
    """Raise `InvalidCall` for parameters that Prefect's server would refuse."""
    most = get_current_settings().server.api.max_parameter_size
    if (size := len(json.dumps(text)) + PARAMETER_OVERHEAD) <= most:
        return
    parts = {**call.get("options", {}), **{n: v for n, v in call.items() if n != "options"}}
    largest = max(parts, key=lambda name: len(json.dumps(parts[name])))
    raise InvalidCall(
        f"the call has {size:,} bytes, most of them in {largest!r}, and the parameters of a flow run on a "
        f"work pool may have {most:,} (PREFECT_SERVER_API_MAX_PARAMETER_SIZE): keep that argument where the "
        "step runs, such as ids in a table that the SELECT joins, or a context in an artifact's file"
    )
