"""The checks of the fields that both models share, each with a way out."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Self

from pydantic import (
    ModelWrapValidatorHandler,
    Secret,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails

from vllm_tasks.calls.answers import Decoder, check_one_type, without_password
from vllm_tasks.calls.callables import check_importable, import_callable
from vllm_tasks.calls.classes import Classes, check_sampling
from vllm_tasks.calls.datatypes import DataType
from vllm_tasks.calls.functions import made_of
from vllm_tasks.calls.kept import Keep
from vllm_tasks.calls.kept import check_names as check_kept
from vllm_tasks.calls.media import Kind, media_fields
from vllm_tasks.calls.pooling import refuse_text_fields, returns_numbers, task_type
from vllm_tasks.calls.repairs import Repairs, check_repairs
from vllm_tasks.calls.sampling import Target, check_names, known_names
from vllm_tasks.calls.schemas import schema_type
from vllm_tasks.calls.template import Template
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.block_fields import not_shown, own_fields, validated
from vllm_tasks.datalayer.lake.partitions import named, refuse_inexact
from vllm_tasks.datalayer.table_names import check_name
from vllm_tasks.errors import InvalidCall
from vllm_tasks.models.fields import DeclaredFields
from vllm_tasks.models.forms import arranged
from vllm_tasks.models.hints import checked
from vllm_tasks.models.resources import Resources
from vllm_tasks.settings import site_settings

WRITE_OPTIONS = {"table", "partition_by", "compression", "on_length"}

FORM_HEAD = (
    *("task", "prompt", "prompt_file", "signature", "chat", "system", "predict_kwargs"),
    *("db", "datatype", "output_schema", "flatten"),
)
FORM_END = ("metric_values", "uuid")
"""Fields at the head of a form, and those at its end, which nobody fills in."""

HIDDEN = {
    *("api_key", "api_url", "basic_auth", "compute_kwargs", "db", "headers", "ray_config", "uri"),
    *("validation", "vllm_kwargs", "prompt_file"),
}
"""Fields whose values may hold a key or a password: errors say what is wrong, but never show the value."""


class ModelFields(DeclaredFields):
    """The fields that both models share, checked when a model is made."""

    def __init__(self, **fields: Any) -> None:
        site_settings()  # raises `InvalidCall` here; within a check it would become the error of a field
        super().__init__(**fields)

    @field_validator("db", mode="before")
    @classmethod
    def _datalayer_of_url(cls, value: Any) -> Any:
        if isinstance(value, str | os.PathLike):
            return Datalayer(url=SecretStr(os.fspath(value)))
        if not (value is None or isinstance(value, Datalayer | Mapping)):
            raise ValueError(f"db is a {type(value).__name__}; give a Datalayer, or its URL as a text")
        return value

    @field_validator("identifier")
    @classmethod
    def _without_slash(cls, value: str) -> str:
        return value.replace("/", "-")

    @field_validator("max_batch_size", mode="before")
    @classmethod
    def _some_rows(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError(
                f"max_batch_size={value} is not at least 1; None hands over all rows of a call at once"
            )
        return value

    @field_validator("output_schema")
    @classmethod
    def _known_schema(cls, value: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
        if value is not None:
            schema_type(value, flatten=False)
        return value

    @field_validator("model_update_kwargs")
    @classmethod
    def _known_write_options(cls, value: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(value.keys() - WRITE_OPTIONS):
            raise ValueError(f"unknown model_update_kwargs {unknown}; known are {sorted(WRITE_OPTIONS)}")
        if "table" in value:
            check_name("table", value["table"])
        if value.get("on_length", "keep") not in ("keep", "error"):
            raise ValueError(f"on_length={value['on_length']!r} is neither 'keep' nor 'error'")
        if "partition_by" in value:
            named(value["partition_by"])
        return value

    @field_validator("keep")
    @classmethod
    def _kept_once(cls, value: list[Keep]) -> list[Keep]:
        check_kept(value)
        return value

    @field_validator("compute_kwargs")
    @classmethod
    def _known_hints(cls, value: dict[str, Any]) -> dict[str, Any]:
        checked(value)
        return value

    @field_validator("prompt")
    @classmethod
    def _fillable(cls, value: str, info: ValidationInfo) -> str:
        fields = Template.parse(value).fields
        artifacts = info.data.get("artifacts", {})
        if absent := {f for f in fields if "." in f} - {f"artifacts.{a}" for a in artifacts}:
            raise ValueError(f"the prompt uses {sorted(absent)}, but artifacts has {sorted(artifacts)}")
        named = {f for f in fields if "." not in f} - {"context", "input"}
        if info.data.get("signature") == "singleton" and named:
            raise ValueError(
                f"the prompt uses {sorted(named)}, but with signature='singleton' a record is one value, "
                "{input}; use signature='**kwargs' for dicts or '*args' for tuples"
            )
        return value

    @field_validator("prompt_file")
    @classmethod
    def _of_a_place(cls, value: str | None) -> str | None:
        return value and without_password("prompt_file", value)

    @model_validator(mode="after")
    def _media_beside_the_text(self) -> Self:
        """Refuse pictures, audio and video where there is no chat message, or inside its text."""
        media = self.media()
        if media and self.chat is False:
            raise ValueError(f"{sorted(media)} are parts of chat messages, and chat=False: leave it out")
        fields = Template.parse(self.prompt).fields if self.prompt_func is None else set()
        if not self.prompt_file and (twice := sorted(media.keys() & fields)):
            raise ValueError(
                f"the prompt puts {twice} into its text, and as {media[twice[0]]} it is sent beside the "
                f"text: write a prompt without {{{twice[0]}}}"
            )
        return self

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        """Refuse what a prompt file would replace, and a signature whose fields have no names."""
        if not self.prompt_file:
            return self
        if self.prompt != "{input}" or self.prompt_func is not None or self.messages_as_json:
            raise ValueError(
                "prompt_file takes the place of prompt, prompt_func and messages_as_json: leave them out"
            )
        if self.signature not in ("singleton", "**kwargs"):
            raise ValueError(
                f"the fields of a prompt_file have names, and signature={self.signature!r} gives values by "
                "position: use '**kwargs' for dicts, or 'singleton'"
            )
        return self

    @model_validator(mode="after")
    def _carries_the_record(self) -> Self:
        """Refuse a prompt that uses no field of a row: every row would get the same answer."""
        fields = Template.parse(self.prompt).of_record
        if self.prompt_func is None and not (fields - {"context"} or self.media()):
            field = {"singleton": "{input}", "*args": "{0}"}.get(self.signature, "{name of a field}")
            braces = ", and {{ }} are literal braces" if "{{" in self.prompt else ""
            raise ValueError(
                f"the prompt {self.prompt!r:.100} uses no field of the record, so all rows would get one "
                f"answer: write {field} where the record goes{braces}"
            )
        return self

    @model_validator(mode="after")
    def _reads_messages(self) -> Self:
        """Refuse `messages_as_json` beside a prompt, which would embed the messages as JSON text."""
        unchanged = self.prompt == "{input}" and self.prompt_func is None and self.signature == "singleton"
        if self.messages_as_json and not unchanged:
            raise ValueError(
                "messages_as_json=True reads a record that is chat messages and nothing else: leave out "
                "prompt and signature, or the option; a prompt_func can read them by json.loads"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        data = own_fields(data)
        for name in data.keys() - cls.model_fields.keys() if isinstance(data, Mapping) else ():
            if name in known_names("openai") | known_names("local") | known_names("embed"):
                raise ValueError(f"{name!r} is a sampling parameter: put it into predict_kwargs")
            if near := difflib.get_close_matches(name, cls.model_fields, n=1):
                raise ValueError(f"{cls.__name__} has no field {name!r}; did you mean {near[0]!r}?")
            raise ValueError(f"{cls.__name__} has no field {name!r}{cls._elsewhere}")
        return data

    @model_validator(mode="after")
    def _known_sampling(self) -> Self:
        check_names(self.predict_kwargs, self.sampling_target(), self.vllm_python(), self._server_version)
        check_one_type(self.datatype, self.output_schema)
        if isinstance(self.datatype, Classes):
            legacy = self.sampling_target() == "legacy"
            check_sampling(self.predict_kwargs, self.datatype.sampling, legacy=legacy)
        check_repairs(self.repair, self.resample, self.check)
        return self

    @model_validator(mode="after")
    def _numbers_or_text(self) -> Self:
        """Refuse fields for generated text beside a task that returns numbers."""
        if self.task is None or not returns_numbers(self.task):
            return self
        refuse_text_fields(self.task, [name for name in type(self).model_fields if getattr(self, name)])
        if self.task == "score" and self.prompt_func is None:
            if self.prompt != "{input}":
                raise ValueError(
                    "task='score' takes the query and the document as they are: leave out prompt, or use a "
                    "prompt_func that returns (query, document)"
                )
            if self.signature == "singleton":
                raise ValueError(
                    "task='score' takes two columns, and with signature='singleton' a record is one value: "
                    "use signature='*args' (query, document) or '**kwargs' (with these names)"
                )
        if self.task == "score" and (self.chat or self.system is not None or self.messages_as_json):
            raise ValueError("task='score' takes two texts: leave out chat, system and messages_as_json")
        return self

    @model_validator(mode="after")
    def _exact_partitions(self) -> Self:
        if partition_by := named(self.model_update_kwargs.get("partition_by", ())):
            try:
                columns = self._decoder({}).columns
            except InvalidCall:
                # A call may still change the type of an answer (`n`); it reports what is wrong.
                columns = ()
            refuse_inexact(partition_by, columns)
        return self

    @model_validator(mode="after")
    def _hints_that_fit(self) -> Self:
        self.resources()
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _without_secrets(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Errors show the value of their field, but never the complete input: it may hold a key."""
        return validated(data, handler, _displayed)

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the block's schema, from which the UI makes its form."""
        schema: dict[str, Any] = json.loads(cls._schema_as_json(*args, **kwargs))
        return schema

    @classmethod
    @functools.cache  # a save reads the schema more than 100 times, for each field anew: 3 s without this
    def _schema_as_json(cls, *args: Any, **kwargs: Any) -> str:
        first = ("identifier", *cls._reached_by, *FORM_HEAD)
        return json.dumps(arranged(super().model_json_schema(*args, **kwargs), first, FORM_END))

    def _to_block_document(self, *args: Any, **kwargs: Any) -> Any:
        self._check_portable()  # all of Block's ways to save call this method
        return super()._to_block_document(*args, **kwargs)  # type: ignore[misc]  # Block's, by the subclasses

    def _check_portable(self) -> None:
        """Raise `InvalidCall` for a function or judge that another process could not load."""
        for function in self._callables():
            check_importable(function)
        for metric in self.validation.metrics if self.validation else ():
            if metric.unsaved:
                raise InvalidCall(
                    f"the metric {metric.identifier!r} is judged by a model that is not saved: save it, and "
                    "give options={'model': 'vllm-api/NAME'}"
                )

    def _callables(self) -> list[Callable[..., Any]]:
        found = [self.prompt_func, self.check]
        if isinstance(self.datatype, DataType):
            found += [self.datatype.encoder, self.datatype.decoder]
        if self.validation is not None:
            found += [m.object for m in self.validation.metrics if not isinstance(m.object, str)]
        return [function for function in found if function is not None]

    def identity(self) -> str:
        """Return a hash that is equal, in every process, for models with equal fields, functions and classes.

        The `uuid`, the values of validations and the contents of files do not count.

        Returns:
            64 hexadecimal digits.

        Raises:
            InvalidCall: The behaviour of a function cannot be determined from its code.
        """
        fields = self.model_dump(exclude={"uuid", "metric_values"})
        named: list[Any] = [*self._callables()]
        if isinstance(self.output_schema, str):
            named.append(import_callable(self.output_schema))
        made = [made_of(each, "the function") for each in named]
        text = json.dumps([type(self).__name__, fields, made], default=_revealed, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _decoder(self, given: Mapping[str, Any]) -> Decoder:
        if self.task is not None and returns_numbers(self.task):
            kind = task_type(self.task)
            return Decoder(kind.columns, flatten=False, many=False, on_length="keep", type=kind)
        many = {**self.predict_kwargs, **given}.get("n") not in (None, 1)
        on_length = self.model_update_kwargs.get("on_length", "keep")
        repairs = Repairs(self.repair, self.resample, self.check)
        return Decoder.of(
            self.datatype, self.output_schema, self.flatten, many, on_length, self.keep, repairs
        )

    def media(self) -> dict[str, Kind]:
        """Return the fields of a record that are pictures, audio or video, with their kind.

        Raises:
            ValueError: A field is none of a record's, or is named twice.
        """
        return media_fields(self.images, self.audio, self.video, self.signature)

    def resources(self) -> Resources:
        """Return what an engine of this model needs.

        Raises:
            InvalidCall: The hints of `compute_kwargs` contradict the engine arguments.
        """
        raise NotImplementedError

    def _server_version(self) -> str | None:
        """The version of vLLM on the server; None if there is no server, or its version is not known."""
        return None

    def sampling_target(self) -> Target:
        """Return the interface whose sampling parameters a call may use."""
        raise NotImplementedError

    def sampling_names(self) -> frozenset[str]:
        """Return the sampling parameters that a call may use."""
        return known_names(self.sampling_target(), self.vllm_python())

    def vllm_python(self) -> str:
        """Return the interpreter of the engine; empty: this process's, or there is no engine here."""
        return ""


def _revealed(value: Any) -> Any:
    return value.get_secret_value() if isinstance(value, Secret | SecretStr) else str(value)


def _displayed(error: ErrorDetails) -> InitErrorDetails:
    """`error` without its input, where that may hold a secret."""
    hidden = not_shown(error)
    unplaced = not error["loc"] or error["type"] in ("missing", "extra_forbidden")
    if unplaced or HIDDEN & set(error["loc"]):
        return hidden
    return {**hidden, "input": error["input"]}
