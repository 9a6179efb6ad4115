"""From one record to one prompt: template or function, context, signature, chat."""

from __future__ import annotations

import functools
import inspect
import json
import math
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from numbers import Number
from typing import Any, Literal
from uuid import UUID

import fsspec  # type: ignore[import-untyped]  # has no type information

from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Message, RowError

Signature = Literal["singleton", "*args", "**kwargs", "*args,**kwargs"]
Context = str | Sequence[str] | None
ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
ARTIFACT = "artifacts."


class BadRow(ValueError):
    """This record cannot become a prompt."""


@dataclass(frozen=True)
class Template:
    """A prompt with fields that are literal keys: `{name}`, `{0}`, `{artifacts.name}`.

    Parsed once and filled by joining, so what the data contains is never read as a template.
    """

    parts: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Raises ValueError for a field that is more than a key."""
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"prompt {text!r}: {error}; write literal braces as {{{{ and }}}}") from error
        for _, field, spec, conversion in pieces:
            if field is None:
                continue
            key = field.removeprefix(ARTIFACT)
            if spec or conversion or not (key.isidentifier() or (field.isascii() and field.isdigit())):
                shown = f"{field}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
                raise ValueError(
                    f"prompt field {{{shown}}} is not a plain key: allowed are a name, a number and "
                    "artifacts.<name>, without attributes, indexes, conversions or formats; "
                    "use prompt_func to compute, and {{ }} for literal braces"
                )
        return cls(tuple((literal, field) for literal, field, _, _ in pieces))

    @property
    def fields(self) -> set[str]:
        return {field for _, field in self.parts if field is not None}

    def fill(self, values: Mapping[str, Any]) -> str:
        """Raises `BadRow` for a value that is missing or is no text."""
        return "".join(
            literal + ("" if field is None else _text(field, values)) for literal, field in self.parts
        )


def _text(field: str, values: Mapping[str, Any]) -> str:
    try:
        value = values[field]
    except KeyError:
        raise BadRow(f"the record has no {field!r}; it has {sorted(values)[:10]}") from None
    if isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        raise BadRow(f"{field!r} is NaN, which tables use for a missing value")
    if isinstance(value, Number | date | time | UUID):
        return str(value)
    raise BadRow(f"{field!r} is {_shown(value)}, not a text or a number; use prompt_func to convert it")


def _shown(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def call_arguments(signature: Signature, x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a record becomes a call, as `(args, kwargs)`; raises `BadRow` for another shape."""
    if signature == "singleton":
        return (x,), {}
    if signature == "*args" and _is_tuple(x):
        return tuple(x), {}
    if signature == "**kwargs" and isinstance(x, Mapping):
        return (), dict(x)
    if signature == "*args,**kwargs" and _is_tuple(x) and len(x) == 2:
        args, kwargs = x
        if _is_tuple(args) and isinstance(kwargs, Mapping):
            return tuple(args), dict(kwargs)
    expected = {"*args": "a tuple", "**kwargs": "a dict"}.get(signature, "a pair of a tuple and a dict")
    raise BadRow(f"signature={signature!r} takes {expected} for each record, got {_shown(x)}")


def _is_tuple(x: object) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str | bytes)


class Prompter:
    """Makes the prompts of one call.

    Raises `InvalidCall` when the context and the prompt do not fit together, or an artifact
    cannot be read.
    """

    def __init__(
        self,
        *,
        prompt: str,
        prompt_func: Callable[..., Any] | None,
        signature: Signature,
        chat: bool,
        system: str | None,
        artifacts: Mapping[str, Any],
        context: Context,
    ) -> None:
        self.template = Template.parse(prompt)
        self.plain = prompt == "{input}"
        self.signature = signature
        self.chat = chat
        self.system = system
        self.function = prompt_func
        self.shared: dict[str, Any] = {"context": joined(context), "artifacts": artifacts}
        self._check_context()

    def _check_context(self) -> None:
        context = self.shared["context"]
        used = (
            "context" in self.template.fields if self.function is None else _takes(self.function, "context")
        )
        if context is None and used and self.function is None:
            raise InvalidCall("the prompt has {context}, but no context was given: pass context=...")
        if context is not None and not used:
            raise InvalidCall("context was given, but nothing uses it: put {context} into the prompt")

    def __call__(self, x: Any) -> str | list[Message] | RowError:
        """The text or chat messages for one record, or why there are none."""
        try:
            made = self._from_function(x) if self.function else self._from_template(x)
            prompt = self._in_chat(made)
            # What cannot travel fails here, and not in a chunk with other rows.
            (prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)).encode()
        except UnicodeEncodeError as error:
            bad = error.object[error.start : error.end]
            return RowError("prompt", f"the text is not valid Unicode ({error.reason}): {bad!r}")
        except (BadRow, TypeError, ValueError) as error:
            return RowError("prompt", str(error))
        return prompt

    def _from_function(self, x: Any) -> Any:
        assert self.function is not None
        args, kwargs = call_arguments(self.signature, x)
        named = {name: value for name, value in self.shared.items() if _takes(self.function, name)}
        try:
            return self.function(*args, **kwargs, **named)
        except Exception as error:  # the user's own function: whatever it raises is this row's error
            raise BadRow(f"prompt_func raised {type(error).__name__}: {error}") from error

    def _from_template(self, x: Any) -> Any:
        if self.plain and self.signature == "singleton" and is_messages(x):
            return x
        args, kwargs = call_arguments(self.signature, x)
        values = {f"{ARTIFACT}{name}": value for name, value in self.shared["artifacts"].items()}
        values |= {str(i): arg for i, arg in enumerate(args)} | kwargs
        if self.signature == "singleton":
            values["input"] = x
        if self.shared["context"] is not None:
            values["context"] = self.shared["context"]
        return self.template.fill(values)

    def _in_chat(self, made: Any) -> str | list[Message]:
        if isinstance(made, str):
            if not self.chat:
                return made
            made = [{"role": "user", "content": made}]
        elif not is_messages(made):
            raise BadRow(f"expected a text or a list of chat messages, got {_shown(made)}")
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *made]


def is_messages(x: object) -> bool:
    """Whether `x` is a non-empty list of chat messages."""
    return (
        isinstance(x, Sequence)
        and not isinstance(x, str | bytes)
        and len(x) > 0
        and all(isinstance(m, Mapping) and m.get("role") in ROLES for m in x)
    )


def joined(context: Context) -> str | None:
    """Several pieces of context are put under each other."""
    return context if context is None or isinstance(context, str) else "\n".join(context)


@functools.lru_cache(maxsize=256)
def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters


@functools.lru_cache(maxsize=64)
def load_artifact(uri: str, kind: str) -> Any:
    """The contents of a file at any fsspec URI, read once per process: `str`, `json` or `bytes`."""
    try:
        with fsspec.open(uri, "rb") as file:
            content: bytes = file.read()
        return content if kind == "bytes" else json.loads(content) if kind == "json" else content.decode()
    except (OSError, ValueError) as error:
        raise InvalidCall(f"artifact {uri!r} cannot be read as {kind}: {error}") from error
