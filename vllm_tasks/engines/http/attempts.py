"""Decides after a failed attempt whether the row gets another one, and when."""

from __future__ import annotations

import email.utils
import math
import random
import time
from dataclasses import dataclass, field

from vllm_tasks.engines.http.failures import FailedAttempt, Full
from vllm_tasks.engines.http.servers import Server, Servers
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import RowError

BACKOFF_BASE, BACKOFF_LIMIT = 0.5, 30.0
"""Seconds: an attempt waits a random time up to min(limit, base * 2**attempt), called full jitter."""
RETRY_AFTER_LIMIT = 300.0
"""The longest Retry-After that is obeyed, in seconds."""
FEW = 3
"""Refusals of a row after which it waits before each further attempt and lets other rows pass."""
TURNS = 20
"""A row fails if it is still refused after this many windows of other rows have completed."""


@dataclass(eq=False)
class Attempts:
    """The attempts of one row so far, and the server at which it has a slot now."""

    retries: int
    servers: Servers
    server: Server | None = None
    began: float = field(default_factory=time.monotonic)
    failures: int = 0
    timeouts: int = 0
    lost: int = 0
    refusals: int = 0
    completed_before: int = 0

    def release(self) -> None:
        """Release the row's slot, if it has one."""
        if self.server is not None:
            server, self.server = self.server, None
            self.servers.release(server)

    def fail(self, failed: FailedAttempt) -> float | RowError:
        """Count a failure; returns the seconds until the next attempt, or the error if none is left.

        There are `retries`, but after timeouts only one.
        """
        self.failures += 1
        self.timeouts += failed.kind == "timeout"
        allowed = self.failures <= self.retries and self.timeouts <= 1
        if not (failed.retryable and allowed):
            attempts = f" (after {self.failures} attempts)" if self.failures > 1 else ""
            return RowError(failed.kind, failed.message + attempts, retryable=failed.retryable)
        return backoff(self.failures) if failed.delay is None else failed.delay

    def lose(self, why: str) -> float:
        """Count a lost server; returns the seconds until the row tries another one.

        A row that has lost more servers than exist fails at servers that look healthy. It gives up once
        nothing has completed for the grace period.
        """
        self.lost += 1
        in_vain = self.lost - len(self.servers.all)
        if in_vain > self.retries and self.servers.is_heartbeat_overdue(self.began):
            raise self.servers.unavailable(why)
        return backoff(in_vain) if in_vain > 0 and not self.servers.is_any_there else 0.0

    def refuse(self, full: Full) -> float | RowError:
        """Count a refusal by a full server; returns the seconds until the row waits for a slot again.

        A refusal is not the row's failure, whatever the `retries`. The row fails only if many other rows have
        completed meanwhile, or if some have and the server then accepts nothing for the grace period. Raises
        `ServerUnavailable` if the server accepts no row at all for the grace period.
        """
        if not self.refusals:
            self.completed_before = self.servers.completed
        self.refusals += 1
        turns = (self.servers.completed - self.completed_before) / self.servers.slots
        is_overdue = self.servers.is_grace_period_over(self.began)
        if self.refusals > self.retries and (turns >= TURNS or (turns and is_overdue)):
            return RowError(full.kind, f"{full.message} (after {self.refusals} attempts)", retryable=True)
        if is_overdue and full.kind == "connection":  # this process has too few files, not the server
            raise InvalidCall(full.message)
        if is_overdue:
            raise self.servers.overloaded(full.message)
        return backoff(self.refusals - FEW) if self.refusals > FEW else 0.0


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
    doublings = min(failures, 16)  # far beyond the limit, without overflow
    return random.uniform(0, min(BACKOFF_LIMIT, BACKOFF_BASE * 2**doublings))
