"""Parameters of a row's own: checked by name like those of the call, and merged with them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from vllm_tasks.calls.answers import Decoder
from vllm_tasks.calls.sampling import Target
from vllm_tasks.calls.sampling_values import check_values
from vllm_tasks.calls.schemas import response_format, schema_type
from vllm_tasks.calls.template import BadRow
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Request, RowError

SHARED = 1024
"""Sets of parameters that are remembered, so that equal rows share one: more than a batch has rows. A row
whose set was forgotten in between gets a new one, and is not folded with those before."""
LIMITS = {"max_tokens", "max_completion_tokens"}
OUTPUT_FORMATS = {"structured_outputs", "response_format"}
"""Sampling parameters that determine the format of an answer."""
EITHER = LIMITS, OUTPUT_FORMATS
"""Parameters that exclude each other: a row's own replaces each of them that the call has."""
OF_THE_CALL = (
    "n is the same for all rows, because the columns of the outputs depend on it: set it in predict_kwargs, "
    "or for the call"
)


class RowParameters:
    """Merges the parameters of rows with those of their call; rows with equal ones share one mapping."""

    def __init__(
        self,
        sampling: Mapping[str, Any],
        target: Target,
        check: Callable[[Iterable[str]], None],
        decoder: Decoder,
    ) -> None:
        self._sampling, self._target, self._check, self._decoder = sampling, target, check, decoder
        self._merged = functools.lru_cache(SHARED)(self._merge)
        self._shared = functools.lru_cache(SHARED)(json.loads)
        self.names: set[str] = set()
        """The names that rows have set so far."""

    def check_columns(self, columns: Mapping[str, str] | None) -> dict[str, str]:
        """Return the argument `sampling_columns`; raise `InvalidCall` if it is wrong."""
        if columns is None:
            return {}
        if not isinstance(columns, Mapping) or not all(isinstance(c, str) and c for c in columns.values()):
            raise InvalidCall(
                f"sampling_columns={columns!r:.200} must map sampling parameters to columns, such as "
                "{'max_tokens': 'budget'}; a value that all rows share is passed as max_tokens=60"
            )
        if "n" in columns:
            raise InvalidCall(f"sampling_columns={columns!r:.200}: {OF_THE_CALL}")
        self._check(columns)
        return dict(columns)

    def request(self, own: Request, more: Mapping[str, Any]) -> Request | RowError:
        """Return the request of a row with all its parameters worked out, or its error.

        A parameter of `own` overrides that of `more`, and both override the call's.
        """
        try:
            given = sorted({**more, **own.sampling}.items())
            key = json.dumps([given, own.output_schema, own.lora, own.model], allow_nan=False)
            sampling = self._merged(key)
        except (TypeError, ValueError, RecursionError) as error:
            return RowError("prompt", f"the row's own parameters cannot be sent: {error}")
        # The adapter stays visible: one that cannot be loaded is the error of its rows, not of the call.
        return replace(own, sampling=sampling, output_schema=None, model=None)

    def _merge(self, key: str) -> Mapping[str, Any]:
        """Return all parameters of the rows with this key; raise ValueError if they are not valid."""
        given, output_schema, lora, model = json.loads(key)
        own: dict[str, Any] = dict(given)
        self._check(own)
        check_values(own)
        if fixed := sorted(own.keys() & self._decoder.type.sampling.keys()):
            raise BadRow(f"{fixed[0]} is set by datatype=Classes, for all rows: leave it out")
        if "n" in own and own["n"] != self._sampling.get("n", 1):
            raise BadRow(OF_THE_CALL)
        if output_schema is not None:
            own |= self._format(output_schema, own)
        own |= self._adapter(lora, model)
        self.names |= own.keys()
        replaced = {name for names in EITHER if names & own.keys() for name in names}
        merged = {**{name: v for name, v in self._sampling.items() if name not in replaced}, **own}
        if merged == self._sampling:  # a row may also give the call's own values
            return self._sampling
        found: dict[str, Any] = self._shared(json.dumps(dict(sorted(merged.items()))))
        return found

    def _format(self, output_schema: Any, own: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(output_schema, dict | str):
            raise BadRow(f"output_schema={output_schema!r:.100} of the row is neither a dict nor a text")
        if twice := sorted(OUTPUT_FORMATS & own.keys()):
            raise BadRow(f"output_schema and {twice[0]} both set the format of the answer: use one of them")
        if self._target == "legacy":
            raise BadRow("output_schema needs OpenAI's protocol: use the server's base URL, not /generate")
        kind = self._decoder.type
        if kind.schema is not None or [column.kind for column in kind.columns] != ["json"]:
            raise BadRow(
                "output_schema of a row needs a model with datatype='json', which keeps all answers in one "
                "column whatever their schema; for one schema of all rows, set the model's output_schema"
            )
        schema = schema_type(output_schema, self._decoder.flatten).schema
        assert schema is not None
        return {"response_format": response_format(schema)}

    def _adapter(self, lora: Any, model: Any) -> dict[str, Any]:
        """Return the parameter that selects an adapter or a model."""
        if lora is None and model is None:
            return {}
        if lora is not None and model is not None:
            raise BadRow(f"lora={lora!r:.100} and model={model!r:.100} both say what answers: give one")
        if self._target == "local":
            if not isinstance(lora, Mapping) or not {"lora_name", "lora_path"} <= lora.keys():
                raise BadRow(
                    "the local engine has one model and its adapters: give lora={'lora_name': NAME, "
                    f"'lora_path': FOLDER}}, got {lora if model is None else model!r:.100}"
                )
            return {"lora_request": lora}
        if self._target == "legacy":
            raise BadRow("/generate has no names of models: use the server's base URL for lora and model")
        name = lora.get("lora_name") if isinstance(lora, Mapping) else lora or model
        if not isinstance(name, str) or not name:
            raise BadRow(f"a server knows adapters and models by a name, got {lora or model!r:.100}")
        return {"model": name}


def plain_number(value: Any) -> Any:
    """Return a value of a column as a parameter: a Decimal, as NUMERIC columns give it, as int or float."""
    if not isinstance(value, Decimal):
        return value
    return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
