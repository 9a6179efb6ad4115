"""The attempts of one row that failed: whether there is another one, and when."""

from __future__ import annotations

import email.utils
import math
import random
import time
from dataclasses import dataclass

from vllm_tasks.rows import RowError, RowErrorKind

BACKOFF_BASE, BACKOFF_LIMIT = 0.5, 30.0
"""Seconds: an attempt waits a random time up to min(limit, base * 2**attempt), so-called full jitter."""
RETRY_AFTER_LIMIT = 300.0
"""Seconds: a longer Retry-After is obeyed only so far."""


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
    servers: int
    patience: float
    failures: int = 0
    timeouts: int = 0
    lost: int = 0
    refusals: int = 0
    refused_since: float = 0.0

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
        in_vain = self.lost - self.servers
        if in_vain > self.retries:
            return RowError("connection", f"{error} (after {self.lost} attempts)", retryable=True)
        return backoff(in_vain) if in_vain > 0 else 0.0

    def refuse(self, full: Full) -> float | RowError:
        """The server is full. The row waits for the patience at least, whatever the `retries`."""
        self.refusals += 1
        self.refused_since = self.refused_since or time.monotonic()
        waited = time.monotonic() - self.refused_since
        if self.refusals > self.retries and waited > self.patience:
            tries = f" (after {self.refusals} attempts in {waited:.0f} s)"
            return RowError(full.kind, full.message + tries, retryable=True)
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
