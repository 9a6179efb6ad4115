"""How many rows one server gets at once: as many as it takes."""

from __future__ import annotations

import random
import time

HOLD = 0.5
"""Seconds without more rows after a refusal: half to all of it."""
GROW_EVERY = 0.2
"""Seconds between two steps of growth: time enough for a refusal to arrive."""


class Capacity:
    """Places at one server: `most`, or as many as it takes. Whoever takes one counts it in `open`.

    A refusal for load (429, 503) tells exactly how many rows the server takes: those that are there, but for
    the refused one. From then on a row goes out when another is answered, so that the server stays full and
    is not stormed. After the server's Retry-After, or else a short while, one place is added, then two, four
    and so on, until the next refusal: not before a row was answered that had been sent since the last one,
    unless none is there. So an outage costs a few requests beyond those that it found under way.

    Where rows wait at the server until our timeout, nothing is refused. When nothing that was sent since such
    a row has been answered either, half of the places go, once for all rows that were on their way together;
    one comes back whenever as many rows as there are places have been answered.
    """

    def __init__(self, most: int) -> None:
        self.open = 0
        self.grows_at = 0.0
        self._most = self._limit = most  # the limit is what the last refusal told
        self._lasting = float(most)  # as many as do not time out
        self._step = 1  # places that the last growth added; 0 while held back
        self._changed = 0.0  # when it refused, or was cut
        self._newest = 0.0  # when the last of the answered rows was sent

    def has_place(self) -> bool:
        """Whether another row may go there now."""
        now = time.monotonic()
        may_grow = self._step or not self.open or self._newest > self._changed
        if self._limit < self._most and now >= self.grows_at and may_grow:
            self._step = 2 * self._step or 1
            self._limit = min(self._most, self._limit + self._step)
            self.grows_at = now + GROW_EVERY
        return self.open < min(self._limit, int(self._lasting))

    def refuse(self, retry_after: float | None) -> None:
        """A row that is in here has been refused, perhaps with the seconds until the server wants another."""
        now = time.monotonic()
        self._limit = max(0, min(self._limit, self.open - 1))
        if self._step:  # else this refusal is one of many at once
            self._step, self._changed = 0, now
            self.grows_at = now + random.uniform(HOLD / 2, HOLD)
        self.grows_at = max(self.grows_at, now + (retry_after or 0.0))

    def answer(self, sent: float) -> None:
        """A row that was sent at `sent` (by `time.monotonic`) was answered, or refused for its own sake."""
        self._newest = max(self._newest, sent)
        self._lasting = min(self._most, self._lasting + 1 / self._lasting)

    def time_out(self, sent: float) -> None:
        """A row that was sent at `sent` has got no answer in time."""
        if sent > max(self._newest, self._changed):
            self._changed = time.monotonic()
            self._lasting = max(1.0, self.open / 2)
