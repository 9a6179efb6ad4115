"""The fields that both models share, with their defaults and their words in forms."""

from __future__ import annotations

from typing import Any, ClassVar
from uuid import uuid4

from pydantic import BaseModel, Field

from vllm_tasks.calls.answers import Artifact
from vllm_tasks.calls.callables import DottedCallable
from vllm_tasks.calls.classes import Classes
from vllm_tasks.calls.datatypes import DataType
from vllm_tasks.calls.kept import Keep
from vllm_tasks.calls.prompt_func import Signature
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.rows import BuiltinType, Task
from vllm_tasks.validation import Validation

VLLM_DOCS = "https://docs.vllm.ai/en/latest"


class DeclaredFields(BaseModel):
    """The fields that both models share; `ModelFields` checks them."""

    _elsewhere: ClassVar[str] = ""
    """Appended to the error about an unknown field: where it may belong."""
    _reached_by: ClassVar[tuple[str, ...]] = ()
    """Fields that locate the model or its server; the form shows them after the identifier."""

    identifier: str = Field(
        min_length=1,
        title="Identifier",
        description="Your name for the model. Its outputs are in the table _outputs__NAME; '/' becomes '-'.",
    )
    uuid: str = Field(
        default_factory=lambda: str(uuid4()),
        title="UUID",
        description="Identity of this instance. Empty: a new one.",
    )
    db: Datalayer | None = Field(
        default=None,
        title="Datalayer",
        description="Rows are read from it and outputs written to it, unless the call names another.",
    )
    artifacts: dict[str, Artifact] = Field(
        default={},
        title="Artifacts",
        description="Files for templates, {artifacts.name}, and prompt functions (artifacts=...), such as "
        '{"rules": {"uri": "s3://bucket/rules.txt"}}.',
    )
    task: Task | None = Field(
        default=None,
        title="Task",
        description="Empty: generate text. Others return numbers: embed (a vector), score (of a query and a "
        "document), classify (a label with probabilities), reward (a number).",
    )
    signature: Signature = Field(
        default="singleton",
        title="Signature",
        description="What the prompt takes a record for: one value {input} (singleton), a tuple {0} "
        "(*args), a dict {name} (**kwargs), or both.",
    )
    datatype: DataType | Classes | BuiltinType | None = Field(
        default=None,
        title="Data type",
        description="Type of an answer: str (the default), int, float, bool, json, bytes, your own type, or "
        "classes of which it is one, with a probability.",
    )
    output_schema: dict[str, Any] | str | None = Field(
        default=None,
        title="Output schema",
        description='Columns, such as {"name": "str", "age": "int"}, a JSON Schema, or the dotted path of a '
        "pydantic model. vLLM is given the schema, and every answer is checked against it.",
    )
    flatten: bool = Field(
        default=False, title="Flatten", description="In tables, an answer that is a list becomes rows."
    )
    check: DottedCallable | None = Field(
        default=None,
        title="Check",
        description="Dotted path of f(value, row) -> None, or why the value of an answer is not accepted.",
    )
    repair: int = Field(
        default=0,
        ge=0,
        title="Repairs",
        description="repair: how often an answer that fails its type, schema or check is sent back with the "
        "reason.",
    )
    resample: int = Field(
        default=0,
        ge=0,
        title="New samples",
        description="resample: how often a row is sampled anew instead, if its answer fails.",
    )
    keep: list[Keep] = Field(
        default=[],
        title="Columns beside the answer",
        description="keep: what tables keep besides: reasoning, tool_calls, logprobs, mean_logprob (a cheap "
        "confidence), token_ids, prompt, usage.",
    )
    model_update_kwargs: dict[str, Any] = Field(
        default={},
        title="Options of the outputs",
        description="model_update_kwargs: table, partition_by, compression, on_length (keep, error).",
    )
    predict_kwargs: dict[str, Any] = Field(
        default={},
        title="Sampling parameters",
        description="predict_kwargs by vLLM's names, such as {\"max_tokens\": 60}; a call's override them.",
    )
    compute_kwargs: dict[str, Any] = Field(
        default={},
        repr=False,  # values of `env` may be secrets
        title="Resources",
        description="compute_kwargs: hints such as num_gpus, memory, image, env or work_pool.",
    )
    validation: Validation | None = Field(
        default=None,
        title="Validation",
        description="Data sets, metrics and limits of validate, unless the call has its own.",
    )
    metric_values: dict[str, dict[str, float]] = Field(
        default={},
        title="Metric values",
        description="Values of the last validation, by data set and metric. The validation writes them.",
    )
    prompt: str = Field(
        default="{input}",
        title="Prompt",
        description="Template with plain keys: {input}, {0}, {name}, {context}, {artifacts.name}.",
    )
    prompt_file: str | None = Field(
        default=None,
        title="Prompt file",
        description="Path or URI of a Jinja template, used in place of the prompt: {{ input }}, {{ name }}, "
        "{{ context }}, {{ artifacts.name }}.",
    )
    prompt_func: DottedCallable | None = Field(
        default=None,
        title="Prompt function",
        description="Dotted path of f(x, ...) -> text, chat messages or a Request, in place of the prompt.",
    )
    images: str | None = Field(
        default=None,
        title="Pictures",
        description="images: field of a record that has a picture or a list of them, as bytes, path, URI or "
        "data: URL. They are sent before the text of the prompt.",
    )
    audio: str | None = Field(
        default=None, title="Audio", description="audio: field of a record that has audio, as for pictures."
    )
    video: str | None = Field(
        default=None, title="Video", description="video: field of a record that has video, as for pictures."
    )
    max_batch_size: int | None = Field(
        default=4,
        ge=1,
        title="Rows in a chunk",
        description="max_batch_size: rows handed to the engine at once. It has no visible effect over "
        "HTTP, where max_in_flight limits the concurrent requests. Empty: all.",
    )
    chat: bool | None = Field(
        default=None,
        title="Chat",
        description="Send texts as a user's message (true) or as plain text (false). Empty: as a message if "
        "the model has a chat template.",
    )
    system: str | None = Field(
        default=None,
        title="System message",
        description="Put before chat messages that have no system message of their own.",
    )
    messages_as_json: bool = Field(
        default=False,
        title="Messages as JSON",
        description="A record is a JSON text of chat messages, as in a CSV.",
    )
