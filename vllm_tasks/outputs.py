"""What becomes of an answer's text: its datatype."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_tasks.callables import DottedCallable

BuiltinType = Literal["str", "int", "float", "bool", "json", "bytes"]


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
