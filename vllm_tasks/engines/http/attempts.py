"""The attempts of one row that failed: whether there is another one, and when."""

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
"""Seconds: an attempt waits a random time up to min(limit, base * 2**attempt), so-called full jitter."""
RETRY_AFTER_LIMIT = 300.0
"""Seconds: a longer Retry-After is obeyed only so far."""
FEW = 3
"""Refusals of one row that the server's being full explains; from then on it lets others pass, too."""
TURNS = 20
"""A row that is refused while the window was answered so many times over is refused for its own sake."""


@dataclass(eq=False)
class Attempts:
    """One row's attempts so far, and where it has a place now."""

    retries: int
    servers: Servers
    server: Server | None = None
    began: float = field(default_factory=time.monotonic)
    failures: int = 0
    timeouts: int = 0
    lost: int = 0
    refusals: int = 0
    answers_before: int = 0

    def leave(self) -> None:
        """Give the place back, if it has one."""
        if self.server is not None:
            server, self.server = self.server, None
            self.servers.leave(server)

    def fail(self, failed: FailedAttempt) -> float | RowError:
        """The row's own failure: so many `retries`, but one after a timeout; the seconds until then."""
        self.failures += 1
        self.timeouts += failed.kind == "timeout"
        allowed = self.failures <= self.retries and self.timeouts <= 1
        if not (failed.retryable and allowed):
            attempts = f" (after {self.failures} attempts)" if self.failures > 1 else ""
            return RowError(failed.kind, failed.message + attempts, retryable=failed.retryable)
        return backoff(self.failures) if failed.delay is None else failed.delay

    def lose(self, why: str) -> float:
        """The server cannot be had: the row gets another one, or the first that is found.

        When more are lost than there are, healthy ones refuse, which ends with the grace period.
        """
        self.lost += 1
        in_vain = self.lost - len(self.servers.all)
        if in_vain > self.retries and self.servers.is_silent_since(self.began):
            raise self.servers.unavailable(why)
        return backoff(in_vain) if in_vain > 0 and not self.servers.is_any_there else 0.0

    def refuse(self, full: Full) -> float | RowError:
        """The server is full, which is not the row's failure, whatever the `retries`: it waits for a place.

        Unless others have had their turn again and again meanwhile, or had it until this row was left alone
        with a server that takes nothing for the grace period. Raises `ServerUnavailable` for
        a server that takes no row at all for so long.
        """
        if not self.refusals:
            self.answers_before = self.servers.answers
        self.refusals += 1
        turns = (self.servers.answers - self.answers_before) / self.servers.places
        impatient = self.servers.is_grace_period_over(self.began)
        if self.refusals > self.retries and (turns >= TURNS or (turns and impatient)):
            return RowError(full.kind, f"{full.message} (after {self.refusals} attempts)", retryable=True)
        if impatient and full.kind == "connection":  # it is our own files that there are too few of
            raise InvalidCall(full.message)
        if impatient:
            raise self.servers.unavailable(full.message)
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
    doublings = min(failures, 16)  # far beyond the limit, and no number too large
    return random.uniform(0, min(BACKOFF_LIMIT, BACKOFF_BASE * 2**doublings))
