"""From one record to one prompt: template or function, context, signature, chat."""

from __future__ import annotations

import functools
import inspect
import json
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import fsspec

from vllm_tasks.calls.functions import made_of
from vllm_tasks.calls.plain_text import NoText, plain_text
from vllm_tasks.errors import SHOWN, InvalidCall, near
from vllm_tasks.places import check_place, without_secrets
from vllm_tasks.rows import Message, RowError
from vllm_tasks.settings import site_settings

Signature = Literal["singleton", "*args", "**kwargs", "*args,**kwargs"]
Context = str | Sequence[str] | None
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
        for _, name, spec, conversion in pieces:
            if name is None:
                continue
            key = name.removeprefix(ARTIFACT)
            if spec or conversion or not (key.isidentifier() or (name.isascii() and name.isdigit())):
                shown = f"{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}"
                raise ValueError(
                    f"prompt field {{{shown}}} is not a plain key: allowed are a name, a number and "
                    "artifacts.<name>, without attributes, indexes, conversions or formats; "
                    "use prompt_func to compute, and {{ }} for literal braces"
                )
        return cls(tuple((literal, field) for literal, field, _, _ in pieces))

    @property
    def fields(self) -> set[str]:
        """All fields: of the record, of the call (`context`) and of the model (`artifacts.name`)."""
        return {field for _, field in self.parts if field is not None}

    @property
    def of_record(self) -> set[str]:
        """The fields that a record may fill: all but `artifacts.name`."""
        return {field for field in self.fields if not field.startswith(ARTIFACT)}

    def fill(self, values: Mapping[str, Any]) -> str:
        """Raises `BadRow` for a value that is missing or is no text."""
        return "".join(
            literal + ("" if field is None else _text(field, values)) for literal, field in self.parts
        )


def _text(field: str, values: Mapping[str, Any]) -> str:
    try:
        value = values[field]
    except KeyError:
        raise BadRow(f"the record has no {field!r}; it has {sorted(map(str, values))[:10]}") from None
    try:
        return plain_text(value)
    except NoText as error:
        raise BadRow(f"{field!r} {error}") from error


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


def _is_tuple(x: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(x, Sequence) and not isinstance(x, str | bytes | bytearray | memoryview)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompter:
    """Makes the prompts of one call.

    Raises `InvalidCall` when the context and the prompt do not fit together, or an artifact
    cannot be read.
    """

    prompt: str
    prompt_func: Callable[..., Any] | None
    signature: Signature
    chat: bool | None
    """Whether texts become chat messages; None: not known yet, and they stay texts."""
    system: str | None
    artifacts: Mapping[str, Any]
    context: Context
    messages_as_json: bool = False
    keywords: Mapping[str, Any] = field(default_factory=dict)
    """Those of the call that `prompt_func` names, see `keywords_of`."""
    longest: int = field(default_factory=lambda: site_settings().max_prompt_bytes)
    """Bytes that a prompt may have."""

    def __post_init__(self) -> None:
        in_template = self.prompt_func is None and "context" in self.template.fields
        if self.joined_context is None and in_template:
            raise InvalidCall(
                "the prompt has {context}, but no context was given: pass context=..., "
                "or rename the field where it stands for a column of the records"
            )
        if self.context is not None and not (in_template or "context" in self.named):
            way_out = (
                "put {context} into the prompt" if self.prompt_func is None else "name it in prompt_func"
            )
            raise InvalidCall(f"context was given, but nothing uses it: {way_out}")
        try:
            _ = self.filled
        except BadRow as error:
            raise InvalidCall(f"the prompt cannot be filled: {error}") from error

    @functools.cached_property
    def template(self) -> Template:
        return Template.parse(self.prompt)

    @functools.cached_property
    def joined_context(self) -> str | None:
        return joined(self.context)

    @functools.cached_property
    def named(self) -> dict[str, Any]:
        """What `prompt_func` gets by keyword, because it names it."""
        offered = {"context": self.joined_context, "artifacts": self.artifacts}
        names = _beside_the_record(self.prompt_func, self.signature)
        return {**{name: value for name, value in offered.items() if name in names}, **self.keywords}

    @functools.cached_property
    def filled(self) -> dict[str, str]:
        """The fields of a template that are the same in all prompts."""
        if self.prompt_func is not None:
            return {}
        values = {f"{ARTIFACT}{name}": value for name, value in self.artifacts.items()}
        filled = {f: _text(f, values) for f in self.template.fields if f.startswith(ARTIFACT)}
        return filled if self.joined_context is None else {**filled, "context": self.joined_context}

    def identity(self) -> dict[str, Any]:
        """What decides a prompt beside its record, for the fingerprint.

        Raises `InvalidCall` where it cannot be told what `prompt_func` is made of.
        """
        return {
            "prompt": None if self.prompt_func else self.prompt,
            "prompt_func": made_of(self.prompt_func, "prompt_func"),
            "keywords": made_of(self.keywords, "the keywords of prompt_func"),
            "artifacts": self.artifacts,
            "signature": self.signature,
            "chat": self.chat,
            "system": self.system,
            "context": self.joined_context,
            "messages_as_json": self.messages_as_json,
        }

    def check_fields(self, example: Any) -> None:
        """Raise `InvalidCall` when no record like `example` can be a prompt, or a prompt leaves a column out.

        `example`: the record whose values are the names of their columns.
        """
        args, kwargs = call_arguments(self.signature, example)
        if self.prompt_func is not None:
            named = self._beside(kwargs)
            if why := _refusal(
                self.prompt_func, args, {**kwargs, **named}, twice=named.keys() & kwargs.keys()
            ):
                raise InvalidCall(f"prompt_func cannot be called with the columns of X: {why}")
            return
        given = {"input"} if self.signature == "singleton" else {*map(str, range(len(args))), *kwargs}
        if twice := sorted(given & self.filled.keys()):
            raise InvalidCall(f"{twice} would be given twice, by X and by the call")
        there = given | self.filled.keys()
        if absent := sorted(self.template.fields - there):
            fields = ", ".join(f"{{{field}}}" for field in absent[:SHOWN])
            raise InvalidCall(
                f"the prompt uses {fields}, and X gives no such argument; with signature={self.signature!r} "
                f"it gives {', '.join(map(repr, sorted(there)[:20])) or 'nothing'}{near(absent[0], there)}"
            )
        if unused := sorted(given - self.template.fields):
            columns = {**dict(zip(map(str, range(len(args))), args, strict=True)), **kwargs}
            shown = ", ".join(repr(columns[field]) for field in unused[:SHOWN])
            raise InvalidCall(
                f"the prompt {self.prompt!r:.100} never uses the columns {shown} of X: write {{{unused[0]}}} "
                "into it, or leave them out of X"
            )

    def __call__(self, x: Any) -> str | list[Message] | RowError:
        """The text or chat messages for one record, or why there are none."""
        try:
            made = self._from_function(x) if self.prompt_func else self._from_template(x)
            prompt = self._in_chat(made)
            # What cannot travel fails here, and not in a chunk with other rows.
            self._check_size(prompt if isinstance(prompt, str) else _as_json(prompt))
        except UnicodeEncodeError as error:
            bad = error.object[error.start : error.end]
            return RowError("prompt", f"the text is not valid Unicode ({error.reason}): {bad!r}")
        except (BadRow, TypeError, ValueError, RecursionError) as error:
            return RowError("prompt", str(error))
        return prompt

    def _check_size(self, text: str) -> None:
        size = len(text) if len(text) > self.longest else len(text.encode())
        if size > self.longest:
            raise BadRow(
                f"the prompt has {size:,} bytes or more, and {self.longest:,} are allowed "
                "(VLLM_TASKS_MAX_PROMPT_BYTES)"
            )

    def _from_function(self, x: Any) -> Any:
        assert self.prompt_func is not None
        args, kwargs = call_arguments(self.signature, x)
        try:
            return self.prompt_func(*args, **kwargs, **self._beside(kwargs))
        except Exception as error:  # the user's own function: whatever it raises is this row's error
            raise BadRow(f"prompt_func raised {type(error).__name__}: {error}") from error

    def _beside(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What the function gets beside the fields of a record.

        A record may have a field of such a name itself, where the call gives nothing.
        """
        return {
            name: value
            for name, value in self.named.items()
            if value or name in self.keywords or name not in fields
        }

    def _from_template(self, x: Any) -> Any:
        if self.prompt == "{input}" and self.signature == "singleton":
            x = self._read(x) if self.messages_as_json else x
            if is_messages(x):
                return x
        args, kwargs = call_arguments(self.signature, x)
        values = {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
        if self.signature == "singleton":
            values["input"] = x
        return self.template.fill({**values, **self.filled})

    def _read(self, x: Any) -> Any:
        """The chat messages of a text that is JSON, as a CSV has them."""
        if not isinstance(x, str):
            return x
        try:
            found = json.loads(x)
        except ValueError as error:
            raise BadRow(f"messages_as_json=True, and the text is no JSON: {error}") from error
        if not is_messages(found):
            raise BadRow("messages_as_json=True, and the JSON is no list of chat messages with a role each")
        return found

    def _in_chat(self, made: Any) -> str | list[Message]:
        if isinstance(made, str):
            return conversation(made, self.system) if self.chat else made
        if not is_messages(made):
            raise BadRow(f"expected a text or a list of chat messages, got {_shown(made)}")
        if self.system is None:
            return [*made]
        if any(message["role"] == "system" for message in made):
            raise BadRow("the messages have a system message, and the model has system=...: leave one out")
        return [{"role": "system", "content": self.system}, *made]


def conversation(text: str, system: str | None) -> list[Message]:
    """A text as a user's message, after the system message."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def is_messages(x: object) -> bool:
    """Whether `x` is a non-empty list of chat messages: mappings with a `role`."""
    return (
        _is_tuple(x)
        and len(x) > 0
        and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in x)
    )


def _as_json(messages: list[Message]) -> str:
    try:
        return json.dumps(messages, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRow(f"the chat messages are no JSON: {error}") from error


def joined(context: Context) -> str | None:
    """Several pieces of context are put under each other."""
    if context is None or isinstance(context, str):
        return context
    if _is_tuple(context) and all(isinstance(piece, str) for piece in context):
        return "\n".join(context)
    raise InvalidCall(f"context must be a text or a list of texts, got {context!r:.100}")


def _refusal(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], twice: Collection[str]
) -> str | None:
    """Why `function` takes no such arguments; None when it does, or does not tell what it takes."""
    if twice:
        return f"{sorted(twice)} would be given twice, by X and by the call"
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-ins, such as str, do not tell
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def named_parameters(function: Callable[..., Any] | None) -> set[str]:
    """The parameters of `function` that can be given by keyword; `**kwargs` names none, nor does None."""
    if function is None:
        return set()
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-ins, such as str, do not tell
        return set()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _beside_the_record(function: Callable[..., Any] | None, signature: Signature) -> set[str]:
    """What `function` can be given by keyword; the first of its parameters is the record, where that is one
    value."""
    names = named_parameters(function)
    if function is not None and names and signature == "singleton":
        names.discard(next(iter(inspect.signature(function).parameters)))
    return names


def keywords_of(
    function: Callable[..., Any] | None,
    signature: Signature,
    given: Mapping[str, Any],
    known: Collection[str],
) -> dict[str, Any]:
    """What of the keywords of a call is for `function`: those that it names, but for its record and for what
    the model has.

    Raises `InvalidCall` for a name that is a sampling parameter (`known`), too.
    """
    names = _beside_the_record(function, signature) - {"artifacts"}
    found = {name: value for name, value in given.items() if name in names}
    if both := sorted(found.keys() & set(known)):
        raise InvalidCall(
            f"{both[0]!r} is an argument of prompt_func and a sampling parameter of vLLM: give the argument "
            "of prompt_func another name"
        )
    return found


def load_artifact(uri: str, kind: str) -> Any:
    """The contents of a file at a fsspec URI, read once per process: `str`, `json` or `bytes`.

    Raises `InvalidCall` for one that cannot be read, or is outside the places that the site allows.
    """
    check_place("artifact", uri)
    return _loaded(uri, kind)


@functools.lru_cache(maxsize=64)
def _loaded(uri: str, kind: str) -> Any:
    try:
        with fsspec.open(uri, "rb") as file:
            content: bytes = file.read()
        return content if kind == "bytes" else json.loads(content) if kind == "json" else content.decode()
    except (OSError, ValueError, ImportError) as error:
        words = without_secrets(f"artifact {uri!r} cannot be read as {kind}: {error}")
        # Not from the error itself, whose words may be the whole URI.
        raise InvalidCall(words) from None
