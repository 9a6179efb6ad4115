"""The failures of one attempt over HTTP, by who is to blame.

Unreachable        the server: it cannot be reached now
FailedAttempt      the row, or something that all rows need
├── Full           nobody: the server has no free capacity
└── Denied         the row, or the complete call
"""

from __future__ import annotations

from typing import Literal

from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import RowErrorKind

MENDED_BY = {
    401: "check api_key, basic_auth or headers",
    402: "look at your credit there",
    403: "check api_key, basic_auth or headers",
    404: "check api_url and model",
    405: "check api_url",
    407: "check the user and password of the proxy in HTTP_PROXY or HTTPS_PROXY",
    410: "check api_url and model",
}
"""Statuses that show that a call cannot succeed, and what to do about each."""
FULL = {429, 503}
"""Statuses of a server that is at its capacity."""
RETRIED = {408, 409, 425}
"""Statuses below 500 of a request that may succeed if it is repeated: a timeout of the server and a conflict
over a lock, which OpenAI's clients repeat too, and a request that came too early (RFC 8470)."""
TOO_LONG = (
    "maximum context length",
    "maximum model length",
    "max_model_len",
    "exceeds the available context size",
)
"""Parts of the error messages about a prompt that is too long: vLLM's, and the last one of llama.cpp."""


class Unreachable(Exception):
    """The server cannot be reached now. This counts against the server, not against the row."""


class FailedAttempt(Exception):
    """One failed attempt, with its kind and message as a row's error, and when to try again."""

    def __init__(
        self, kind: RowErrorKind, message: str, *, retryable: bool = False, delay: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.retryable, self.delay = kind, message, retryable, delay

    @property
    def may_be_the_servers(self) -> bool:
        """Whether the cause may be the server, so that every row would fail like this one."""
        return self.retryable and self.kind != "timeout"

    @property
    def is_refusal(self) -> bool:
        """Whether the server has examined the row, so that it must be working."""
        return self.kind in ("too_long", "refused")


class Full(FailedAttempt):
    """The server is at its capacity (429, 503), or this process at its limit of open files.

    The row is not to blame.
    """


class Denied(FailedAttempt):
    """The server (401 to 405, 410) or a proxy (407) denies this request, or it is redirected (3xx).

    The cause is the row or the complete call; `mended_by` says what to do about the call.
    """

    def __init__(self, status: int, message: str, mended_by: str) -> None:
        super().__init__("refused", message)
        self.status, self.mended_by = status, mended_by

    def of_the_call(self) -> InvalidCall:
        """The error of the call, for the case that every row would be denied."""
        return InvalidCall(f"{self.message}; {self.mended_by}")


def kind_of_refusal(words: str) -> Literal["too_long", "refused"]:
    """The kind of a row's error, by the words in which vLLM refuses the row."""
    return "too_long" if any(part in words for part in TOO_LONG) else "refused"


def may_pass(status: int) -> bool:
    """Whether the same request may succeed later, by the HTTP status of a response."""
    return status in RETRIED or status in FULL or status >= 500
