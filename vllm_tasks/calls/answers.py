"""Turns answers into values for the caller of `predict` and into rows of the outputs table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vllm_tasks.calls.classes import Classes, class_type
from vllm_tasks.calls.datatypes import OUTPUT, AnswerType, DataType, Undecodable, builtin_type, own_type
from vllm_tasks.calls.schemas import schema_type
from vllm_tasks.datalayer.selection import OutputColumn
from vllm_tasks.errors import InvalidCall
from vllm_tasks.places import has_password, without_secrets
from vllm_tasks.rows import BuiltinType, Choice, Completion, RowError

OnLength = Literal["keep", "error"]
"""Whether an answer that was truncated at `max_tokens` is kept or is an error."""
RAW_SHOWN = 2000
"""Characters of the raw answer in the error of a row that could not be decoded."""


class Artifact(BaseModel):
    """A named file that prompts may use, at any fsspec URI. It is read once per process."""

    model_config = ConfigDict(extra="forbid")

    uri: str = Field(
        min_length=1,
        description="A path or any URI that fsspec opens; its credentials come from the environment.",
    )
    datatype: Literal["str", "json", "bytes"] = "str"

    @field_validator("uri")
    @classmethod
    def _without_password(cls, value: str) -> str:
        if has_password(value):
            raise ValueError(
                f"the uri {without_secrets(value)!r} has a password, which a block would store in readable "
                "form; set the credentials of object stores and servers in the environment, as fsspec reads "
                "them"
            )
        return value


def check_one_type(datatype: DataType | Classes | BuiltinType | None, output_schema: object) -> None:
    """Raise ValueError if a model sets the type of its answers twice."""
    if output_schema is not None and datatype not in (None, "json"):
        raise ValueError(
            f"datatype={_name_of(datatype)!r} and output_schema both set the type of answers: use one of them"
        )


@dataclass(frozen=True)
class Decoder:
    """Makes values and table rows of the answers of one call.

    An answer has one choice (a text), or `n` choices if `many` is set.
    """

    columns: tuple[OutputColumn, ...]
    """The answer's columns of the outputs table: a single `output`, or those of the schema."""
    flatten: bool
    many: bool
    on_length: OnLength
    """It applies to `rows`; `values` keeps truncated answers."""
    type: AnswerType
    """The type of one choice."""

    @classmethod
    def of(
        cls,
        datatype: DataType | Classes | BuiltinType | None,
        output_schema: dict[str, Any] | str | None,
        flatten: bool,
        many: bool,
        on_length: OnLength = "keep",
    ) -> Decoder:
        """Build a decoder; `many` means `n > 1`. Raise `InvalidCall` for settings that exclude each other."""
        if on_length not in get_args(OnLength):
            raise InvalidCall(f"on_length={on_length!r} is neither 'keep' nor 'error'")
        try:
            check_one_type(datatype, output_schema)
            kind = _type_of(datatype, output_schema, flatten=flatten and not many)
        except ValueError as error:
            raise InvalidCall(str(error)) from error
        if flatten and not many and not kind.may_be_list:
            raise InvalidCall(
                f"flatten makes rows of lists, and answers with datatype={_name_of(datatype)!r} are not "
                "lists: use datatype='json', an output_schema, or n > 1"
            )
        columns = kind.columns
        if many and not flatten:
            if columns[0].kind == "bytes" and not kind.by_name:
                raise InvalidCall(
                    f"n > 1 makes lists, which tables store as JSON, and datatype={_name_of(datatype)!r} "
                    "gives bytes, which JSON cannot hold: use flatten=True, which makes a row of each"
                )
            columns = (OutputColumn(OUTPUT, "json"),)
        return cls(columns, flatten, many, on_length, kind)

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON Schema that requests require of answers."""
        return self.type.schema

    def identity(self) -> dict[str, Any]:
        """Return all settings that determine what is stored of an answer, for the fingerprint."""
        return {
            "type": self.type.identity(),
            # A text keeps the order of the properties, in which the model writes them.
            "schema": json.dumps(self.schema),
            "flatten": self.flatten,
            "on_length": self.on_length,
        }

    def values(self, completion: Completion) -> Any | RowError:
        """Return the value of an answer; with `many`, the list of its choices' values."""
        values = self._read(completion)
        return values if isinstance(values, RowError) or self.many else values[0]

    def rows(self, completion: Completion) -> list[tuple[Any, ...]] | RowError:
        """Return the answer as rows of the outputs table, each with a value for each of `columns`.

        It is one row, or with `flatten` one row per item of the list, or per choice if `many` is set.
        """
        if self.on_length == "error" and _is_truncated(completion.choices):
            return _row_error("is refused because of on_length='error'", completion.choices)
        values = self._read(completion)
        if isinstance(values, RowError):
            return values
        texts = [choice.text for choice in completion.choices]
        try:
            if self.many and not self.flatten:
                return [([self.type.write(v, t) for v, t in zip(values, texts, strict=True)],)]
            if self.flatten and not self.many:
                if not isinstance(values[0], list):
                    raise Undecodable(f"is a {type(values[0]).__name__}, not the list that flatten needs")
                return [self.type.row(item, item) for item in values[0]]
            return [self.type.row(v, t) for v, t in zip(values, texts, strict=True)]
        except Undecodable as error:
            return _row_error(error, completion.choices)

    def _read(self, completion: Completion) -> list[Any] | RowError:
        values = []
        for choice in completion.choices:
            if not choice.text and (choice.reasoning or choice.tool_calls):
                return _row_error("has no text, only reasoning or tool calls", [choice])
            try:
                values.append(self.type.read(choice))
            except Undecodable as error:
                return _row_error(error, [choice])
        return values


def _type_of(
    datatype: DataType | Classes | BuiltinType | None,
    output_schema: dict[str, Any] | str | None,
    flatten: bool,
) -> AnswerType:
    if output_schema is not None:
        return schema_type(output_schema, flatten)
    if isinstance(datatype, Classes):
        return class_type(datatype)
    return own_type(datatype) if isinstance(datatype, DataType) else builtin_type(datatype or "str")


def _name_of(datatype: DataType | Classes | BuiltinType | None) -> str:
    if isinstance(datatype, Classes):
        return "Classes"
    return datatype.identifier if isinstance(datatype, DataType) else datatype or "str"


def _is_truncated(choices: Sequence[Choice]) -> bool:
    return any(choice.finish_reason == "length" for choice in choices)


def _row_error(why: object, choices: Sequence[Choice]) -> RowError:
    """Return an error with the reason and the answer itself, which is stored nowhere else."""
    truncated = "was truncated at max_tokens and " if _is_truncated(choices) else ""
    text = " | ".join(c.text or c.reasoning or json.dumps(c.tool_calls or "") for c in choices)
    more = f"... ({len(text):,} characters)" if len(text) > RAW_SHOWN else ""
    return RowError("output", f"the answer {truncated}{why}: {text[:RAW_SHOWN]}{more}")
