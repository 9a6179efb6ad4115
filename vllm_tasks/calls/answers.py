"""Turns answers into values for the caller of `predict` and into rows of the outputs table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vllm_tasks.calls.classes import Classes, class_type
from vllm_tasks.calls.datatypes import OUTPUT, AnswerType, DataType, Undecodable, builtin_type, own_type
from vllm_tasks.calls.kept import NOTHING_KEPT, Keep, Kept
from vllm_tasks.calls.repairs import NO_REPAIRS, Repairs, attempted, check_repairs
from vllm_tasks.calls.schemas import schema_type
from vllm_tasks.datalayer.selection import OutputColumn
from vllm_tasks.engines.batching import FollowUp, final
from vllm_tasks.errors import InvalidCall
from vllm_tasks.places import has_password, without_secrets
from vllm_tasks.rows import Attempted, BuiltinType, Choice, Completion, Request, Result, RowError

OnLength = Literal["keep", "error"]
"""Whether an answer that was truncated at `max_tokens` is kept or is an error."""
RAW_SHOWN = 2000
"""Characters of the raw answer in the error of a row that could not be decoded."""


class Artifact(BaseModel):
    """A named file that prompts may use, at any fsspec URI. It is read again when it has changed, but
    from a web server once per process."""

    model_config = ConfigDict(extra="forbid")

    uri: str = Field(
        min_length=1,
        description="A path or any URI that fsspec opens; its credentials come from the environment.",
    )
    datatype: Literal["str", "json", "bytes"] = "str"

    @field_validator("uri")
    @classmethod
    def _without_password(cls, value: str) -> str:
        return without_password("the uri", value)


def without_password(what: str, uri: str) -> str:
    """Return the URI of a file that a block names. Raise ValueError if it has a password."""
    if has_password(uri):
        raise ValueError(
            f"{what} {without_secrets(uri)!r} has a password, which a block would store in readable form; "
            "set the credentials of object stores and servers in the environment, as fsspec reads them"
        )
    return uri


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
    kept: Kept = NOTHING_KEPT
    """The columns beside those of the answer."""
    repairs: Repairs = NO_REPAIRS
    """What is done about answers that are not accepted."""

    @classmethod
    def of(
        cls,
        datatype: DataType | Classes | BuiltinType | None,
        output_schema: dict[str, Any] | str | None,
        flatten: bool,
        many: bool,
        on_length: OnLength = "keep",
        keep: Sequence[Keep] = (),
        repairs: Repairs = NO_REPAIRS,
    ) -> Decoder:
        """Build a decoder; `many` means `n > 1`. Raise `InvalidCall` for settings that exclude each other."""
        if on_length not in get_args(OnLength):
            raise InvalidCall(f"on_length={on_length!r} is neither 'keep' nor 'error'")
        try:
            check_one_type(datatype, output_schema)
            check_repairs(repairs.repair, repairs.resample, repairs.check)
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
        kept = Kept(tuple(keep), many, flatten, attempts=repairs.most > 0)
        return cls(columns, flatten, many, on_length, kind, kept, repairs)

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
            **({"keep": self.kept.names} if self.kept.names else {}),
            **self.repairs.identity(),
        }

    @property
    def follow_up(self) -> FollowUp:
        """Decides what follows a result: nothing, or a further attempt at a row that is not accepted."""
        return final if self.repairs == NO_REPAIRS else self._next

    def _next(self, request: Request, result: Result) -> Request | Result:
        earlier = request.earlier
        if isinstance(result, RowError):
            if isinstance(earlier, Attempted):  # the answer that was not accepted says more than the error
                return replace(earlier, attempts=earlier.attempts + 1)
            return result
        answer = attempted(earlier, result)
        read = self._values_of(answer, request.record)
        if isinstance(read, list):
            return replace(answer, values=read)
        answer = replace(answer, values=read.error)
        if answer.attempts > self.repairs.most:
            return answer
        return self.repairs.further(request, answer, read.why)

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
        answers = list(zip(values, completion.choices, strict=True))
        try:
            if self.many and not self.flatten:
                return [([None if _is_textless(c) else self.type.write(v, c.text) for v, c in answers],)]
            if self.flatten and not self.many:
                return self._items(*answers[0])
            return [self._row(value, choice) for value, choice in answers]
        except Undecodable as error:
            return _row_error(error, completion.choices)

    def _items(self, value: Any, choice: Choice) -> list[tuple[Any, ...]]:
        if _is_textless(choice):
            return []
        if not isinstance(value, list):
            raise Undecodable(f"is a {type(value).__name__}, not the list that flatten needs")
        return [self.type.row(item, item) for item in value]

    def _row(self, value: Any, choice: Choice) -> tuple[Any, ...]:
        return (None,) * len(self.columns) if _is_textless(choice) else self.type.row(value, choice.text)

    def _read(self, completion: Completion) -> list[Any] | RowError:
        if isinstance(completion, Attempted):
            return completion.values
        read = self._values_of(completion, None)
        return read if isinstance(read, list) else read.error

    def _values_of(self, completion: Completion, record: Any) -> list[Any] | _Refusal:
        values = []
        for choice in completion.choices:
            if not self.kept.is_output(choice) and (why := _why_empty(choice, completion.usage)):
                return _Refusal(why, choice)
            try:
                value = None if _is_textless(choice) else self.type.read(choice)
                self.repairs.checked(value, record)
            except Undecodable as error:
                return _Refusal(str(error), choice)
            values.append(value)
        return values


class _Refusal(NamedTuple):
    """Why an answer is not accepted."""

    reason: str
    choice: Choice

    @property
    def why(self) -> str:
        return _truncation([self.choice]) + self.reason

    @property
    def error(self) -> RowError:
        return _row_error(self.reason, [self.choice])


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


def _is_textless(choice: Choice) -> bool:
    """Whether a choice has no text but white space: its tokens went into its reasoning or its tool calls."""
    return not choice.text.strip() and bool(choice.reasoning or choice.tool_calls)


def _why_empty(choice: Choice, usage: Mapping[str, Any] | None) -> str | None:
    """Return why an empty choice is not an answer; None if it is one, as a model may answer with nothing."""
    if _is_textless(choice):
        return "has no text, only reasoning or tool calls"
    if choice.text.strip() or choice.data:
        return None
    if choice.finish_reason in ("tool_calls", "function_call"):
        return "has no text, and the server does not return the tool calls that it reports"
    if hidden := _hidden_reasoning(usage):
        return f"has no text, only {hidden:,} tokens of reasoning, which the server does not return"
    return None


def _hidden_reasoning(usage: Mapping[str, Any] | None) -> int:
    """Return the number of reasoning tokens that a server counts (OpenAI's `completion_tokens_details`)."""
    details = (usage or {}).get("completion_tokens_details")
    tokens = details.get("reasoning_tokens") if isinstance(details, Mapping) else None
    return tokens if isinstance(tokens, int) else 0


def _is_truncated(choices: Sequence[Choice]) -> bool:
    return any(choice.finish_reason == "length" for choice in choices)


def _truncation(choices: Sequence[Choice]) -> str:
    return "was truncated at max_tokens and " if _is_truncated(choices) else ""


def _row_error(why: object, choices: Sequence[Choice]) -> RowError:
    """Return an error with the reason and the answer itself, which is stored nowhere else."""
    truncated = _truncation(choices)
    text = " | ".join(c.text or c.reasoning or json.dumps(c.tool_calls or "") for c in choices)
    more = f"... ({len(text):,} characters)" if len(text) > RAW_SHOWN else ""
    return RowError("output", f"the answer {truncated}{why}: {text[:RAW_SHOWN]}{more}")
