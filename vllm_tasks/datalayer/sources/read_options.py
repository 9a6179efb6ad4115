"""Options for reading the text files of one table, where they differ from what the names say."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_tasks.errors import InvalidCall, near

UTF8 = "utf-8"


class ReadOptions(BaseModel):
    """Options as plain JSON data. JSON lines have only an encoding."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    encoding: str = Field(
        UTF8, description="The encoding of the files, by its name in Python: latin-1, utf-16."
    )
    delimiter: str | None = Field(
        None, description="The character between cells; empty: a comma, in .tsv and .tab files a tab."
    )
    quote: str = Field('"', description="The character around cells; empty: there are no quotes.")
    escape: str = Field("", description="The character that escapes the next one; empty: there is none.")
    header: bool | list[str] = Field(
        True,
        description="true: the first record has the columns' names; a list: the names; false: column0, "
        "column1, ...",
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
            raise ValueError(f"{e}; give Python's name of a text encoding") from e

    @field_validator("delimiter", "quote", "escape")
    @classmethod
    def _one_sign(cls, value: str | None) -> str | None:
        # Arrow allows one byte; letters and digits occur in numbers and texts.
        if value and (len(value) > 1 or not value.isascii() or value.isalnum() or value in "\r\n\0"):
            raise ValueError("must be one ASCII character that is not a letter, digit or line break")
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
    """The options in `read={table: given}`; raises `InvalidCall` for unknown names and wrong values."""
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
