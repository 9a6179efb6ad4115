"""What crosses the boundaries between prompts, batching and engines: frozen values, no clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Message = Mapping[str, Any]
"""One chat message as vLLM takes it: `role`, `content` (text or a list of content parts), ..."""

RowErrorKind = Literal[
    "read",  # the row could not be read
    "prompt",  # the row could not be turned into a prompt
    "too_long",  # the prompt does not fit into the model's context
    "refused",  # vLLM refused this request (HTTP 4xx, or its own validation)
    "timeout",  # every attempt took longer than `timeout`
    "connection",  # the connection broke at every attempt while the server was up
    "server",  # the server kept answering 5xx, 408 or 429
    "response",  # the answer was not what the protocol promises
    "engine",  # the local engine failed on this row, or died on it again and again
    "output",  # the answer is not of the type asked for
]

GIVEN_UP = frozenset(("abort", "error"))
"""vLLM's finish reasons of an answer that it did not end: by a shutdown or a pause, or by an error of its
own, of which its engine, unlike its server, raises none."""

BuiltinType = Literal["str", "int", "float", "bool", "json", "bytes"]
"""Types of an answer, and of the columns that answers are kept in."""


@dataclass(frozen=True, slots=True)
class Request:
    """One row on its way to an engine: a text, or chat messages, and its sampling parameters.

    All rows of a call share one `sampling` mapping.
    """

    prompt: str | list[Message]
    sampling: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token with its log probability (natural log), and those that vLLM gives for the likeliest tokens.

    `top` is a list of pairs, as several tokens may read alike. Over HTTP a completion (not a chat) has them
    by their text, so there the last one of such tokens stands for all.
    """

    token: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion. What the protocol did not carry is None.

    `finish_reason` is vLLM's: `stop`, `length` (truncated at `max_tokens` or at the context), `abort`, ...
    `token_ids` come from the local engine unless `echo` is set, over HTTP with `return_token_ids=True`.
    """

    text: str
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: list[TokenLogprob] | None = None
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The full answer of one row: `n` choices, and the tokens that vLLM counted.

    `seconds`: from handing the row to the engine (the server's request, the local host) to its answer,
    without waiting for a place in the window; of several attempts, the one that succeeded. Two answers that
    differ in it alone are equal.
    """

    choices: tuple[Choice, ...]
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    model: str | None = None
    seconds: float | None = field(default=None, compare=False)

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


def given_up(completion: Completion) -> str:
    """Why vLLM gave an answer up before its end; empty for one that it has ended."""
    return ", ".join(sorted(GIVEN_UP & {choice.finish_reason for choice in completion.choices}))


def reason_of(kind: str, message: str) -> str:
    """A row's error without what the model said, which stands in `_error` and is not for everyone."""
    return message.partition(": ")[0] if kind == "output" else message


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row has no answer.

    `index` is the row's position in the call, from 0. `retryable` says whether the same row may
    succeed later (a timeout, a lost connection) or not (a prompt that is too long).
    """

    kind: RowErrorKind
    message: str
    retryable: bool = False
    index: int = -1

    @property
    def reason(self) -> str:
        """The message for logs and pages."""
        return reason_of(self.kind, self.message)


Result = Completion | RowError
