"""The values that pass between prompts, batching and engines. They are immutable and hold no clients."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

Message = Mapping[str, Any]
"""One chat message in vLLM's format: `role`, `content` (a text or a list of content parts) and more."""

Prompt = str | list[Message] | list[int]
"""A text, chat messages, or token ids."""


class Conversation(list[Message]):
    """The chat messages of a text that is sent as chat although no server reports a chat template.

    If the server then refuses chat for want of one, `text` is sent instead.
    """

    def __init__(self, messages: Iterable[Message], text: str) -> None:
        super().__init__(messages)
        self.text = text


RowErrorKind = Literal[
    "read",
    "prompt",
    "too_long",
    "refused",
    "timeout",
    "connection",
    "server",
    "response",
    "engine",
    "output",
]

CAUSES: Mapping[str, str] = {
    "read": "the row could not be read",
    "prompt": "no prompt could be made of the row",
    "too_long": "the prompt does not fit into the model's context",
    "refused": "the request was refused",  # by HTTP 4xx, or its own validation
    "timeout": "every attempt took longer than the timeout",
    "connection": "the connection broke at every attempt, while the server was up",
    "server": "the server failed or was full at every attempt",  # HTTP 5xx, 408, 409, 425 or 429
    "response": "the response does not follow the protocol",
    "engine": "the local engine failed on the row, or died on it repeatedly",
    "output": "the answer is not of the requested type",
}
"""What each kind of error means, as pages say it."""

SENDER = re.compile(r"HTTP \d{3} from \S+: ")
"""The beginning of a message that a server sent."""

GIVEN_UP = frozenset(("abort", "error", "insufficient_system_resource", "network_error"))
"""Finish reasons for an answer that was given up: vLLM's `abort` at a shutdown or a pause and `error` after
an internal error (vLLM's server raises such an error, its engine does not); DeepSeek's and GLM's. All in
small letters: Cohere has ERROR."""

BuiltinType = Literal["str", "int", "float", "bool", "json", "bytes"]
"""The types of an answer, and of the columns that store answers."""

ColumnKind = BuiltinType | Literal["vector"]
"""The types of columns that store answers: beside the built-in ones, a list of numbers of 32 bits."""

Task = Literal["generate", "embed", "score", "classify", "reward"]
"""What a model does with a prompt: generate text, or (the tasks that vLLM calls pooling) return numbers."""


@dataclass(frozen=True, slots=True)
class Request:
    """The request of one row: a text, chat messages or token ids, and its sampling parameters.

    A `prompt_func` may return one, to give a row parameters of its own. They override those of the call. An
    engine gets all parameters of a row in `sampling`, and rows with the same ones share one mapping. The pair
    of a `score` is two messages, with the roles `query` and `document`.

    Args:
        prompt: A text, a list of chat messages, or a list of token ids.
        sampling: Sampling parameters by vLLM's names.
        output_schema: The schema of the row's answer, as that of a model. It needs `datatype="json"`.
        lora: The LoRA adapter that answers: `{"lora_name": ..., "lora_path": ...}`. Of a server, which has
            loaded it, only its name counts, which may also be given as a text.
        model: The server's name of the model that answers.
    """

    prompt: Prompt
    sampling: Mapping[str, Any] = field(default_factory=dict)
    task: Task = "generate"
    """What the model does with the prompt. The call sets it, whatever a `prompt_func` returns."""
    output_schema: dict[str, Any] | str | None = None
    lora: Mapping[str, Any] | str | None = None
    model: str | None = None
    record: Any = None
    """The record of the prompt, if a check of its answer needs it."""
    earlier: Completion | None = None
    """The answer that was not accepted, if this is a further attempt."""


def is_chat(prompt: Prompt) -> TypeGuard[list[Message]]:
    """Return whether a prompt is chat messages, rather than a text or token ids."""
    return not isinstance(prompt, str) and not isinstance(prompt[0], int)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with its log probability (natural log), and those that vLLM reports for the likeliest tokens.

    `top` is a list of pairs, because several tokens may have the same text. Over HTTP, a completion (not a
    chat) reports them by their text, so only the last of such tokens is in `top`.
    """

    token: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` answers to a request. A field that the protocol did not carry is None.

    `data` has the numbers of a pooling task: the vector, the score, or the probabilities of the classes. The
    label of the most probable class is the `text`.

    `finish_reason` is vLLM's, such as `stop`, `abort` or `length` (truncated at `max_tokens` or the context).
    The local engine returns `token_ids` unless `echo` is set; a server does with `return_token_ids=True`.
    """

    text: str
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: list[TokenLogprob] | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    data: list[float] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The complete answer for one row: `n` choices, and the numbers of tokens that vLLM counted.

    `seconds` is the time from handing the row to the engine (the HTTP request, or the local engine's process)
    to its completion, without the wait for a slot in the window. It is the time of the attempt that
    succeeded. `usage` is all that the server counted, which may include cached tokens. Two completions that
    differ in these alone are equal.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    model: str | None = None
    seconds: float | None = field(default=None, compare=False)
    usage: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class Attempted(Completion):
    """The last answer to a row with a check or further attempts. Its tokens are those of all attempts."""

    attempts: int = 1
    values: list[Any] | RowError = field(default_factory=list, compare=False, repr=False)
    """The values of its choices, which need not be read again, or why it is not accepted."""


def given_up(completion: Completion) -> str:
    """Return why the server or engine gave up an answer before its end; empty for a complete answer."""
    reasons = {str(choice.finish_reason) for choice in completion.choices}
    return ", ".join(sorted(reason for reason in reasons if reason.lower() in GIVEN_UP))


def cause_of(kind: str) -> str:
    """Return why a row of this kind of error failed, as a sentence with the kind."""
    return f"{CAUSES[kind]} ({kind})"


def without_sender(message: str) -> str:
    """Return an error's message without the status and the address of a server, which are not a cause."""
    return SENDER.sub("", message, count=1)


def error_in_words(error: str) -> str:
    """Return an error as the column `_error` has it, with its cause in words instead of its kind."""
    kind, _, message = error.partition(": ")
    return f"{cause_of(kind)}: {without_sender(message)}" if kind in CAUSES else error


def reason_of(kind: str, message: str) -> str:
    """Return a row's error without the model's answer, which is private and kept in `_error` alone."""
    return message.partition(": ")[0] if kind == "output" else message


@dataclass(frozen=True, slots=True)
class RowError:
    """The reason why one row has no answer.

    `index` is the row's position in the call, from 0. `retryable` says whether the same row may succeed
    later (a timeout, a lost connection) or not (a prompt that is too long).
    """

    kind: RowErrorKind
    message: str
    retryable: bool = False
    index: int = -1

    @property
    def reason(self) -> str:
        """The message for logs and pages: `message` without the model's answer."""
        return reason_of(self.kind, self.message)


Result = Completion | RowError
