"""The attempts of one row that failed: whether there is another one, and when."""

from __future__ import annotations

import email.utils
import math
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import RowError, RowErrorKind

if TYPE_CHECKING:
    from vllm_tasks.engines.servers import Servers

BACKOFF_BASE, BACKOFF_LIMIT = 0.5, 30.0
"""Seconds: an attempt waits a random time up to min(limit, base * 2**attempt), so-called full jitter."""
RETRY_AFTER_LIMIT = 300.0
"""Seconds: a longer Retry-After is obeyed only so far."""
MENDED_BY = {401: "check api_key", 403: "check api_key", 404: "check api_url and model"}
"""Statuses of a call that cannot succeed as it is, and what to do then."""
TURNS = 20
"""A row that is refused while the window was answered so many times over is refused for its own sake."""


class Attempt(Exception):
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


class Full(Attempt):
    """The server has more to do than it takes (429, 503): that is not the row's failure."""


class Denied(Attempt):
    """The server lets this request not pass (401, 403, 404): the row's failure, or that of the whole call."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__("refused", message)
        self.status = status

    def of_the_call(self) -> InvalidCall:
        """What to raise where no row would pass."""
        return InvalidCall(f"{self.message}; {MENDED_BY[self.status]}")


@dataclass
class Tries:
    """One row's attempts so far. Each method says how many seconds to wait, or with which error it ends."""

    retries: int
    servers: Servers
    failures: int = 0
    timeouts: int = 0
    lost: int = 0
    refusals: int = 0
    answers_before: int = 0
    began: float = field(default_factory=time.monotonic)

    def fail(self, failed: Attempt) -> float | RowError:
        """The row's own failure: so many `retries`, but one after a timeout."""
        self.failures += 1
        self.timeouts += failed.kind == "timeout"
        allowed = self.failures <= self.retries and self.timeouts <= 1
        if not (failed.retryable and allowed):
            tries = f" (after {self.failures} attempts)" if self.failures > 1 else ""
            return RowError(failed.kind, failed.message + tries, retryable=failed.retryable)
        return backoff(self.failures) if failed.delay is None else failed.delay

    def lose(self, error: Exception) -> float:
        """The server cannot be had: the next pick takes another one, or waits until one is healthy.

        When more are lost than there are, healthy ones refuse, which ends with the patience.
        """
        self.lost += 1
        in_vain = self.lost - len(self.servers.all)
        if in_vain > self.retries and self.servers.is_silent_since(self.began):
            raise self.servers.unavailable(str(error))
        return backoff(in_vain) if in_vain > 0 else 0.0

    def refuse(self, full: Full) -> float | RowError:
        """The server is full, which is not the row's failure, whatever the `retries`.

        Unless others have had their turn again and again meanwhile, or had it until this row was left alone
        with a server that takes nothing for the patience. Of a server that takes no row at all for so long
        `ServerUnavailable` is raised.
        """
        if not self.refusals:
            self.answers_before = self.servers.answers
        self.refusals += 1
        turns = (self.servers.answers - self.answers_before) / self.servers.places
        impatient = self.servers.is_patience_over()
        if self.refusals > self.retries and (turns >= TURNS or (turns and impatient)):
            return RowError(full.kind, f"{full.message} (after {self.refusals} attempts)", retryable=True)
        if impatient:
            raise self.servers.unavailable(full.message)
        return backoff(self.refusals) if full.delay is None else full.delay


def retry_after(value: str | None) -> float | None:
    """Seconds in a Retry-After header (a number or an HTTP date), None without a usable one."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), RETRY_AFTER_LIMIT)


def backoff(failures: int) -> float:
    """Seconds before attempt `failures + 1`."""
    doublings = min(failures, 16)  # far beyond the limit, and no number too large
    return random.uniform(0, min(BACKOFF_LIMIT, BACKOFF_BASE * 2**doublings))
