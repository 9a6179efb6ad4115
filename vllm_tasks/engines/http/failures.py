"""What may become of one attempt over HTTP, by whose failure it is.

Unreachable        the server's: it cannot be had now
FailedAttempt            the row's, or everybody's
├── Full           nobody's: there is more to do than is taken
└── Denied         the row's, or the whole call's
"""

from __future__ import annotations

from typing import Literal

from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import RowErrorKind

MENDED_BY = {401: "check api_key", 403: "check api_key", 404: "check api_url and model"}
"""Statuses of a call that cannot succeed as it is, and what to do then."""
TOO_LONG = ("maximum context length", "maximum model length", "max_model_len")
"""How vLLM's refusals of a prompt that is too long say so."""


class Unreachable(Exception):
    """The server cannot be had now: that counts against the server, not against the row."""


class FailedAttempt(Exception):
    """One failed attempt: what it would be as a row's error, and when to try again."""

    def __init__(
        self, kind: RowErrorKind, message: str, *, retryable: bool = False, delay: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.retryable, self.delay = kind, message, retryable, delay

    @property
    def may_be_anybodys(self) -> bool:
        """Whether all rows would fail so while something is away: the row alone does not tell."""
        return self.retryable and self.kind != "timeout"

    @property
    def is_verdict(self) -> bool:
        """Whether the server has judged the row, which one that is away cannot."""
        return self.kind in ("too_long", "refused")


class Full(FailedAttempt):
    """The server has more to do than it takes (429, 503), or this process more files open than it may.

    That is not the row's failure.
    """


class Denied(FailedAttempt):
    """The server lets this request not pass (401, 403, 404): the row's failure, or that of the whole call."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__("refused", message)
        self.status = status

    def of_the_call(self) -> InvalidCall:
        """What to raise where no row would pass."""
        return InvalidCall(f"{self.message}; {MENDED_BY[self.status]}")


def kind_of_refusal(words: str) -> Literal["too_long", "refused"]:
    """What is wrong with a row that vLLM refuses in these words."""
    return "too_long" if any(part in words for part in TOO_LONG) else "refused"
