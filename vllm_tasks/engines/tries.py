"""The attempts of one row that failed: whether there is another one, and when."""

from __future__ import annotations

import email.utils
import math
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_tasks.rows import RowError, RowErrorKind

if TYPE_CHECKING:
    from vllm_tasks.engines.servers import Servers

BACKOFF_BASE, BACKOFF_LIMIT = 0.5, 30.0
"""Seconds: an attempt waits a random time up to min(limit, base * 2**attempt), so-called full jitter."""
RETRY_AFTER_LIMIT = 300.0
"""Seconds: a longer Retry-After is obeyed only so far."""
TURNS = 20
"""A row that is refused while the window was answered so many times over is refused for its own sake."""


class Attempt(Exception):
    """One failed attempt: what it would be as a row's error, and when to try again."""

    def __init__(
        self, kind: RowErrorKind, message: str, *, retryable: bool = False, delay: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.retryable, self.delay = kind, message, retryable, delay


class Full(Attempt):
    """The server has more to do than it takes (429, 503): that is not the row's failure."""


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

    def fail(self, failed: Attempt) -> float | RowError:
        """The row's own failure: so many `retries`, but one after a timeout."""
        self.failures += 1
        self.timeouts += failed.kind == "timeout"
        allowed = self.failures <= self.retries and self.timeouts <= 1
        if not (failed.retryable and allowed):
            tries = f" (after {self.failures} attempts)" if self.failures > 1 else ""
            return RowError(failed.kind, failed.message + tries, retryable=failed.retryable)
        return backoff(self.failures) if failed.delay is None else failed.delay

    def lose(self, error: Exception) -> float | RowError:
        """The server cannot be had: the next pick takes another one, or waits until one is healthy.

        When more are lost than there are, healthy ones refuse, and that counts.
        """
        self.lost += 1
        in_vain = self.lost - len(self.servers.all)
        if in_vain > self.retries:
            return RowError("connection", f"{error} (after {self.lost} attempts)", retryable=True)
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
