"""How the text files of one table are read, where that is not what their names say."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_tasks.errors import InvalidCall, near

UTF8 = "utf-8"


class ReadOptions(BaseModel):
    """Plain JSON data. Lines of JSON have an encoding only."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    encoding: str = Field(
        UTF8, description="The encoding of the files, one that Python knows: latin-1, utf-16."
    )
    delimiter: str | None = Field(
        None, description="What stands between cells; empty: a comma, in files .tsv and .tab a tab."
    )
    quote: str = Field('"', description="What stands around cells; empty: there are no quotes.")
    escape: str = Field("", description="What takes the next character as it is; empty: nothing does.")
    header: bool | list[str] = Field(
        True,
        description="Whether the first record has the columns' names; else their names, or false for "
        "column0, column1, ...",
    )
    null_values: list[str] = Field([""], description="Cells without quotes that are NULL.")

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            b"".decode(value)
            "".encode(value)
            return codecs.lookup(value).name
        except (LookupError, UnicodeError, ValueError) as e:
            raise ValueError(f"{e}; give the name of an encoding of texts, as Python knows it") from e

    @field_validator("delimiter", "quote", "escape")
    @classmethod
    def _one_sign(cls, value: str | None) -> str | None:
        # Arrow takes one byte; letters and digits would be found in every number and text.
        if value and (len(value) > 1 or not value.isascii() or value.isalnum() or value in "\r\n\0"):
            raise ValueError("must be one ASCII character that is no letter, digit or line break")
        return value

    @field_validator("delimiter")
    @classmethod
    def _some_delimiter(cls, value: str | None) -> str | None:
        if value == "":
            raise ValueError("must not be empty; leave it out for a comma, or a tab in .tsv files")
        return value

    @field_validator("header")
    @classmethod
    def _some_names(cls, value: bool | list[str]) -> bool | list[str]:
        if value == [] or (isinstance(value, list) and len(set(value)) < len(value)):
            raise ValueError("must have at least one name, and none twice")
        return value

    @model_validator(mode="after")
    def _different_signs(self) -> ReadOptions:
        signs = [sign for sign in (self.delimiter, self.quote, self.escape) if sign]
        if len(set(signs)) < len(signs):
            raise ValueError("delimiter, quote and escape must be different characters")
        return self


DEFAULTS = ReadOptions.model_validate({})


def read_options(table: str, given: Mapping[str, Any] | ReadOptions | None) -> ReadOptions:
    """What `read={table: given}` says; raises `InvalidCall` for unknown names and wrong values."""
    if isinstance(given, ReadOptions):
        return given
    try:
        return ReadOptions.model_validate({} if given is None else given)
    except ValidationError as e:
        raise InvalidCall(f"read={{{table!r:.100}: ...}}: {'; '.join(map(_message, e.errors()))}") from None


def _message(error: Any) -> str:
    name = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "extra_forbidden":
        names = list(ReadOptions.model_fields)
        return f"there is no option {name!r:.100}{near(name, names)}; there are {', '.join(names)}"
    display = f"{name}={error['input']!r:.100}: " if name else ""
    return f"{display}{error['msg'].removeprefix('Value error, ')}"
