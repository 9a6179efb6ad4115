"""Makes a prompt of a record by a template or a function, with context, signature and chat."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import fsspec

from vllm_tasks.calls.functions import made_of
from vllm_tasks.calls.media import NO_MEDIA, Media, refuse_addresses
from vllm_tasks.calls.messages import conversation, ended, is_messages, is_token_ids
from vllm_tasks.calls.prompt_func import (
    Signature,
    beside_the_record,
    call_arguments,
    described,
    is_tuple,
    refusal,
)
from vllm_tasks.calls.template import ARTIFACT, BadRow, Template, text_of
from vllm_tasks.errors import SHOWN, InvalidCall, is_of_the_row, near
from vllm_tasks.hosts import is_web, options_of
from vllm_tasks.places import check_place, without_secrets
from vllm_tasks.rows import Message, Prompt, Request, RowError
from vllm_tasks.settings import site_settings

if TYPE_CHECKING:
    from vllm_tasks.calls.prompt_file import PromptFile

Context = str | Sequence[str] | None
PAIR = "query", "document"
BAD = BadRow, TypeError, ValueError, RecursionError
"""Exceptions that are the error of the record that they were raised for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompter:
    """Makes the prompts of one call.

    It raises `InvalidCall` if the context and the prompt do not fit together, or an artifact has no text.
    """

    prompt: str
    prompt_func: Callable[..., Any] | None
    signature: Signature
    chat: bool | None
    """Whether texts become chat messages. None: it is not known, and they stay texts here."""
    system: str | None
    artifacts: Mapping[str, Any]
    context: Context
    messages_as_json: bool = False
    file: str | None = None
    """The text of the prompt file, which takes the place of `prompt`."""
    of_pairs: bool = False
    """Whether a record becomes the two texts of a `score`; see `Request`."""
    ending: str = ""
    """Lines at the end of the text, or of the last user message. They follow from the type of the answers,
    which has them in its identity."""
    media: Media = NO_MEDIA
    """The fields of a record that are pictures, audio or video."""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    """The keywords of the call that `prompt_func` names; see `keywords_of`."""
    longest: int = field(default_factory=lambda: site_settings().max_prompt_bytes)
    """The largest size of a prompt, in bytes of UTF-8."""
    limits_places: bool = field(default_factory=lambda: bool(site_settings().places))
    """Whether the site limits the places that files are read from."""

    def __post_init__(self) -> None:
        in_template = self.prompt_func is None and "context" in self.template.fields
        if self.joined_context is None and in_template:
            raise InvalidCall(
                "the prompt has {context}, but no context was given: pass context=..., "
                "or rename the field if it is a column of the records"
            )
        if self.context is not None and not (in_template or "context" in self.named):
            way_out = (
                "put {context} into the prompt" if self.prompt_func is None else "name it in prompt_func"
            )
            raise InvalidCall(f"context was given, but nothing uses it: {way_out}")
        if self.file is not None:
            self._check_file()
        if (
            self.prompt_func is not None
            and self.signature == "singleton"
            and (why := refusal(self.prompt_func, ("a record",), self.named, twice=()))
        ):
            raise InvalidCall(
                f"prompt_func cannot be called with one record: {why}; give it defaults, pass keywords in "
                "the call, or use signature='*args' for tuples or '**kwargs' for dicts"
            )
        try:
            _ = self.filled
        except BadRow as error:
            raise InvalidCall(f"the prompt cannot be filled: {error}") from error

    def _check_file(self) -> None:
        """Refuse a prompt file that uses no field of a record, or one that no record has."""
        named = self.template.of_record - {"context"}
        if not (named or self.media):
            raise InvalidCall(
                "the prompt file uses no field of the record, so all rows would get one answer: write "
                f"{self._field('input' if self.signature == 'singleton' else 'name')} where the record goes"
            )
        if self.signature == "singleton" and (unknown := sorted(named - {"input"})):
            raise InvalidCall(
                f"the prompt file uses {unknown}, but with signature='singleton' a record is one value, "
                "{{ input }}; use signature='**kwargs' for dicts"
            )

    def _field(self, name: str) -> str:
        return f"{{{{ {name} }}}}" if self.file is not None else f"{{{name}}}"

    @functools.cached_property
    def template(self) -> Template | PromptFile:
        if self.file is None:
            return Template.parse(self.prompt)
        from vllm_tasks.calls.prompt_file import PromptFile

        return PromptFile.parse(self.file, self.artifacts, self.longest)

    @functools.cached_property
    def joined_context(self) -> str | None:
        return joined(self.context)

    @functools.cached_property
    def named(self) -> dict[str, Any]:
        """The keyword arguments that `prompt_func` names and so receives."""
        offered = {"context": self.joined_context, "artifacts": self.artifacts}
        names = beside_the_record(self.prompt_func, self.signature)
        return {**{name: value for name, value in offered.items() if name in names}, **self.keywords}

    @functools.cached_property
    def filled(self) -> dict[str, Any]:
        """The values of the template's fields that are the same in all prompts."""
        if self.prompt_func is not None:
            return {}
        if self.file is not None:
            shared = {"artifacts": dict(self.artifacts), "context": self.joined_context}
            return {name: value for name, value in shared.items() if name in self.template.fields}
        values = {f"{ARTIFACT}{name}": value for name, value in self.artifacts.items()}
        filled = {f: text_of(f, values) for f in self.template.fields if f.startswith(ARTIFACT)}
        return filled if self.joined_context is None else {**filled, "context": self.joined_context}

    def identity(self) -> dict[str, Any]:
        """Return all that determines a prompt except its record, for the fingerprint.

        Raises `InvalidCall` if the contents of `prompt_func` cannot be determined.
        """
        return {
            "prompt": None if self.prompt_func or self.file is not None else self.prompt,
            **({} if self.file is None else {"prompt_file": self.file}),
            "prompt_func": made_of(self.prompt_func, "prompt_func"),
            "keywords": made_of(self.keywords, "the keywords of prompt_func"),
            # As a text, data keeps the order of its pairs, and 1.0 apart from 1.
            "artifacts": {
                name: value if isinstance(value, str | bytes) else [json.dumps(value)]
                for name, value in self.artifacts.items()
            },
            "signature": self.signature,
            "chat": self.chat is not False,  # not known: it is assumed
            "system": self.system,
            "context": self.joined_context,
            "messages_as_json": self.messages_as_json,
            **({"media": dict(self.media.fields)} if self.media else {}),
        }

    def check_fields(self, example: Any) -> None:
        """Raise `InvalidCall` if no record like `example` can be a prompt, or a prompt leaves out a column.

        The values of `example` are the names of their columns.
        """
        args, kwargs = call_arguments(self.signature, example)
        media = self.media.fields.keys()
        if lost := sorted(media - fields_of(self.signature, example).keys()):
            raise InvalidCall(
                f"the model names {lost} as pictures, audio or video, and X does not give it; with "
                f"signature={self.signature!r} X gives {sorted(fields_of(self.signature, example))[:20]}"
            )
        if self.prompt_func is not None:
            named = self._beside(kwargs)
            if why := refusal(
                self.prompt_func, args, {**kwargs, **named}, twice=named.keys() & kwargs.keys()
            ):
                raise InvalidCall(f"prompt_func cannot be called with the columns of X: {why}")
            return
        if self.of_pairs:
            if not (len(args) == 2 and not kwargs) and not (not args and kwargs.keys() == set(PAIR)):
                raise InvalidCall(
                    "task='score' takes two columns: X=[query, document] with signature='*args', or "
                    "X={column: 'query', column: 'document'} with signature='**kwargs'"
                )
            return
        given = {"input"} if self.signature == "singleton" else {*map(str, range(len(args))), *kwargs}
        if twice := sorted(given & self.filled.keys()):
            raise InvalidCall(f"{twice} would be given twice, by X and by the call")
        there = given | self.filled.keys()
        if absent := sorted(self.template.fields - there):
            fields = ", ".join(map(self._field, absent[:SHOWN]))
            raise InvalidCall(
                f"the prompt uses {fields}, and X does not give it; with signature={self.signature!r} X "
                f"gives {', '.join(map(repr, sorted(there)[:20])) or 'nothing'}{near(absent[0], there)}"
            )
        if unused := sorted(given - self.template.fields - media):
            columns = fields_of(self.signature, example)
            shown = ", ".join(repr(columns[field]) for field in unused[:SHOWN])
            prompt = f"prompt {self.prompt!r:.100}" if self.file is None else "prompt file"
            raise InvalidCall(
                f"the {prompt} never uses the columns {shown} of X: write {self._field(unused[0])} into it, "
                "or leave them out of X"
            )

    def __call__(self, x: Any) -> Prompt | Request | RowError:
        """Return the text, chat messages or token ids for one record, or its error; or the `Request` that
        `prompt_func` returned, with its prompt worked out."""
        try:
            made = self._pair(x) if self.of_pairs else self._made(x)
        except BAD as error:
            return _error_of(error)
        if inspect.iscoroutine(made):  # as a lambda around an async function returns it
            made.close()
            raise InvalidCall(
                "prompt_func returns a coroutine, which is not awaited here: write a plain function that "
                "returns the prompt"
            )
        try:
            own = made if isinstance(made, Request) else None
            if own and not isinstance(own.sampling, Mapping):
                raise BadRow(f"sampling must be a mapping of names to values, got {described(own.sampling)}")
            prompt = ended(self._as_sent(own.prompt if own else made), self.ending)
            if self.limits_places:
                refuse_addresses(prompt)
            # A prompt that cannot be encoded must fail here, not in a chunk with other rows.
            self._check_size(prompt if isinstance(prompt, str) else _as_json(prompt))
            if self.media:
                prompt = self.media.added(prompt, fields_of(self.signature, x))
        except BAD as error:
            return _error_of(error)
        return replace(own, prompt=prompt) if own else prompt

    def _made(self, x: Any) -> Any:
        return self._from_function(x) if self.prompt_func else self._from_template(x)

    def _pair(self, x: Any) -> list[Message]:
        args, kwargs = ((), {}) if self.prompt_func else call_arguments(self.signature, x)
        made = self._from_function(x) if self.prompt_func else args or [kwargs.get(role) for role in PAIR]
        if not (is_tuple(made) and len(made) == len(PAIR) and all(isinstance(text, str) for text in made)):
            found = ", ".join(map(described, made)) if is_tuple(made) else described(made)
            raise BadRow(f"task='score' takes two texts, a query and a document, got {found}")
        return [{"role": role, "content": text} for role, text in zip(PAIR, made, strict=True)]

    def _check_size(self, text: str) -> None:
        size = len(text) if len(text) > self.longest else len(text.encode())
        if size > self.longest:
            raise BadRow(
                f"the prompt has at least {size:,} bytes, and {self.longest:,} are allowed "
                "(VLLM_TASKS_MAX_PROMPT_BYTES)"
            )

    def _from_function(self, x: Any) -> Any:
        assert self.prompt_func is not None
        args, kwargs = call_arguments(self.signature, x)
        try:
            return self.prompt_func(*args, **kwargs, **self._beside(kwargs))
        except BaseException as error:
            if not is_of_the_row(error):
                raise
            raise BadRow(f"prompt_func raised {type(error).__name__}: {error}") from error

    def _beside(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments that the function gets in addition to the fields of a record.

        If the call gives no value for one, a record may have a field of this name.
        """
        return {
            name: value
            for name, value in self.named.items()
            if value or name in self.keywords or name not in fields
        }

    def _from_template(self, x: Any) -> Any:
        if self.prompt == "{input}" and self.signature == "singleton" and self.file is None:
            x = self._read(x) if self.messages_as_json else x
            if is_messages(x) or is_token_ids(x):
                return x
        return self.template.fill({**fields_of(self.signature, x), **self.filled})

    def _read(self, x: Any) -> Any:
        """Return the chat messages in a text that is JSON, as a CSV file has them."""
        if not isinstance(x, str):
            return x
        try:
            found = json.loads(x)
        except ValueError as error:
            raise BadRow(f"messages_as_json=True, and the text is not JSON: {error}") from error
        if not is_messages(found):
            raise BadRow("messages_as_json=True, and the JSON is not a list of chat messages with roles")
        return found

    def _as_sent(self, made: Any) -> Prompt:
        if isinstance(made, str):
            return conversation(made, self.system) if self.chat else made
        if is_token_ids(made):
            if self.system is not None:
                raise BadRow("the prompt is token ids, which take no system=...: put its tokens before them")
            return [*made]
        if not is_messages(made):
            raise BadRow(f"expected a text, a list of chat messages or token ids, got {described(made)}")
        if self.system is None:
            return [*made]
        if any(message["role"] == "system" for message in made):
            raise BadRow(
                "the messages have a system message, and the model has system=...: remove one of them"
            )
        return [{"role": "system", "content": self.system}, *made]


def _error_of(error: Exception) -> RowError:
    if isinstance(error, UnicodeEncodeError):
        bad = error.object[error.start : error.end]
        return RowError("prompt", f"the text is not valid Unicode ({error.reason}): {bad!r}")
    return RowError("prompt", str(error))


def fields_of(signature: Signature, x: Any) -> dict[str, Any]:
    """Return the values of a record by the names that a prompt has for them."""
    args, kwargs = call_arguments(signature, x)
    by_position = {str(i): arg for i, arg in enumerate(args)}
    return {**by_position, **kwargs, **({"input": x} if signature == "singleton" else {})}


def _as_json(messages: list[Message] | list[int]) -> str:
    try:
        return json.dumps(messages, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadRow(f"the chat messages cannot be JSON: {error}") from error


def joined(context: Context) -> str | None:
    """Return the context as one text, several pieces on lines of their own."""
    if context is None or isinstance(context, str):
        return context
    if is_tuple(context) and all(isinstance(piece, str) for piece in context):
        return "\n".join(context)
    raise InvalidCall(f"context must be a text or a list of texts, got {context!r:.100}")


def load_artifact(uri: str, kind: str, what: str = "artifact") -> Any:
    """Return the contents of a file at an fsspec URI as `str`, `json` or `bytes`.

    It is read once per process, and again when it has changed: each call looks up its size and times, or what
    its store says of it. A web server is not asked again, because its URL may be signed for one way to read.
    `what` names it in errors. Raises `InvalidCall` if it cannot be read, or is outside the places that the
    site allows.
    """
    check_place(what, uri)
    return _loaded(uri, kind, what, _state(uri, what))


def _state(uri: str, what: str) -> str | None:
    """Return what changes with the contents of a file, or None if its store does not say."""
    if is_web(uri):
        return None
    options = options_of(what, uri)
    try:
        files, path = fsspec.url_to_fs(uri, **options)
        files.invalidate_cache()
        return repr(sorted(files.info(path).items(), key=lambda item: item[0]))
    except Exception:  # noqa: BLE001 - stores raise many types; reading the file says what is wrong
        return None


@functools.lru_cache(maxsize=64)
def _loaded(uri: str, kind: str, what: str, _changed: str | None) -> Any:
    try:
        with fsspec.open(uri, "rb", **options_of(what, uri)) as file:
            content: bytes = file.read()
        return content if kind == "bytes" else json.loads(content) if kind == "json" else content.decode()
    except InvalidCall:
        raise
    except Exception as error:  # noqa: BLE001 - stores raise many types
        words = without_secrets(f"{what} {uri!r} cannot be read as {kind}: {error}")
        # Danger: the original error may contain the complete URI with its secrets, so it is not chained.
        raise InvalidCall(words) from None
