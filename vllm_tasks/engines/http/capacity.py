"""Limits the rows that one server gets at once to the number that it accepts."""

from __future__ import annotations

import random
import time

HOLD = 0.5
"""Seconds after a refusal before the limit grows again: a random time from half of this to all of it."""
GROW_EVERY = 0.2
"""Seconds between two steps of growth, long enough for a refusal to arrive."""


class Capacity:
    """The slots at one server: up to `most`, or fewer if it accepts fewer. `open` counts those in use.

    A refusal for load (429, 503) shows exactly how many rows the server accepts: those that it has, without
    the refused one. From then on a row is sent when another one completes, so the server stays full and is
    not flooded. After the server's Retry-After, or a short while without one, the limit grows by one slot,
    then by two, then four, until the next refusal. It grows only if a row that was sent after the last
    refusal has completed, or if no such row is there, whose end could show anything. So an outage costs few
    requests beyond those in flight, and a row that takes minutes does not hold up the others.

    A server that queues rows until our timeout refuses none of them. If no row that was sent after a late
    one has completed either, the slots are halved, once for all rows that were in flight together. One slot
    is added back whenever as many rows have completed as there are slots.
    """

    def __init__(self, most: int) -> None:
        self.open = 0
        self.grows_at = 0.0
        self._most = self._limit = most  # the limit follows from the last refusal
        self._lasting = float(most)  # the number of rows that do not time out
        self._step = 1  # slots that the last growth added; 0 after a refusal
        self._changed = 0.0  # time of the last refusal or halving
        self._sent_since = 0  # rows sent since the last refusal
        self._newest = 0.0  # latest sending time of a completed row

    def has_free_slot(self) -> bool:
        """Whether another row may be sent now."""
        now = time.monotonic()
        may_grow = self._step or not self.open or not self._sent_since or self._newest > self._changed
        if self._limit < self._most and now >= self.grows_at and may_grow:
            self._step = 2 * self._step or 1
            self._limit = min(self._most, self._limit + self._step)
            self.grows_at = now + GROW_EVERY
        return self.open < min(self._limit, int(self._lasting))

    def take_slot(self) -> None:
        """Record that a row is sent."""
        self.open += 1
        self._sent_since += 1

    def refuse(self, retry_after: float | None) -> None:
        """Record a refusal of a row counted in `open`; `retry_after` is in seconds, None if not given."""
        now = time.monotonic()
        self._limit = max(0, min(self._limit, self.open - 1))
        self._sent_since = 0
        if self._step:  # else it is one of many refusals at once
            self._step, self._changed = 0, now
            self.grows_at = now + random.uniform(HOLD / 2, HOLD)
        self.grows_at = max(self.grows_at, now + (retry_after or 0.0))

    def complete(self, sent: float) -> None:
        """Record that a row sent at `sent` (by `time.monotonic`) has completed, or was refused for itself."""
        self._newest = max(self._newest, sent)
        self._lasting = min(self._most, self._lasting + 1 / self._lasting)

    def time_out(self, sent: float) -> None:
        """Record that a row sent at `sent` has timed out."""
        if sent > max(self._newest, self._changed):
            self._changed = time.monotonic()
            self._lasting = max(1.0, self.open / 2)
