"""What becomes of an answer's text: its datatype."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from vllm_tasks.callables import DottedCallable, import_callable

BuiltinType = Literal["str", "int", "float", "bool", "json", "bytes"]
SCHEMA_WORDS = {"type", "properties", "items", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
"""One of these is in every JSON Schema that says anything."""


class DataType(BaseModel):
    """A type of one's own: `encoder` turns a value into text or bytes, `decoder` the other way."""

    model_config = ConfigDict(extra="forbid")

    identifier: str = Field(min_length=1)
    encoder: DottedCallable | None = None
    decoder: DottedCallable | None = None


class Artifact(BaseModel):
    """A named file that prompts may use, at any fsspec URI, read once per process."""

    model_config = ConfigDict(extra="forbid")

    uri: str = Field(min_length=1, description="A path or any URI that fsspec opens.")
    datatype: Literal["str", "json", "bytes"] = "str"


def check_schema(schema: dict[str, Any] | str | None) -> None:
    """Raise ValueError unless `schema` names columns, is a JSON Schema, or the path of a pydantic model."""
    if isinstance(schema, str):
        found = import_callable(schema)
        if not (isinstance(found, type) and issubclass(found, BaseModel)):
            raise ValueError(f"output_schema {schema!r} leads to {found!r}, which is no pydantic model")
    elif schema is not None and not SCHEMA_WORDS & schema.keys():
        known = get_args(BuiltinType)
        wrong = {name: kind for name, kind in schema.items() if kind not in known}
        if wrong or not schema:
            raise ValueError(
                f"output_schema {wrong!r:.200} is neither columns with one of the types {', '.join(known)} "
                "nor a JSON Schema, as in {'type': 'object', 'properties': {...}}"
            )
