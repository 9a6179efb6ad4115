"""How many rows one server gets at once: as many as it takes."""

from __future__ import annotations

import asyncio
import random
import time

from vllm_tasks.window import Window

HOLD_BASE, HOLD_LIMIT = 0.25, 2.0
"""Seconds without more rows after a refusal: half to all of min(limit, base * 2**refusals in a row)."""
GROW_EVERY = 0.5
"""Seconds between two steps of growth: time enough for a refusal to arrive."""


class Room:
    """Places at one server: `most`, or as many as it takes once it has said that it is full.

    A refusal for load (429, 503) tells exactly how many rows the server takes: those that are there, but for
    the refused one. They become the limit, and from then on a row goes out when another is answered, so that
    the server stays full and is not stormed. Nothing is divided: many rows are refused at once, and a window
    that is halved for each collapses. After the server's Retry-After, or else a while that doubles with each
    refusal in a row, one row more is let in, then two, four and so on, until the next refusal or until all
    have room. So an outage costs a few requests beyond those that it found under way.

    Where requests beyond its capacity wait at the server until our timeout, nothing is refused: half of the
    places are taken away, once for all rows that were on their way together, and come back more slowly.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._places = Window(most)
        self._step = 1  # places that the last growth added; 0 while held back
        self._in_vain = 0
        self._answered = True  # since it is held back
        self._every = GROW_EVERY
        self._halved = 0.0
        self._growth: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        await self._places.enter(1)

    async def __aexit__(self, *_: object) -> None:
        self._places.leave(1)

    @property
    def is_empty(self) -> bool:
        return not self._places.in_flight

    @property
    def is_full(self) -> bool:
        return self._places.in_flight >= self._places.limit

    def refuse(self, retry_after: float | None) -> None:
        """A row that is in here has been refused, perhaps with the seconds until the server wants another."""
        self._places.limit = min(self._places.limit, self._places.in_flight - 1)
        if self._step:  # else this refusal is one of many at once
            self._step, self._answered = 0, False
            self._in_vain += 1
            self._hold(pause(self._in_vain))
        if retry_after is not None:
            self._hold(retry_after)

    def answer(self) -> None:
        """A row that is in here has been answered, or refused for its own sake."""
        self._answered = True

    def time_out(self, sent: float, timeout: float) -> None:
        """A row that was sent at `sent` (by `time.monotonic`) has got no answer in `timeout` seconds."""
        if sent > self._halved:
            self._halved = time.monotonic()
            self._places.limit = max(1, self._places.in_flight // 2)
            self._step, self._every = 0, timeout
            self._hold(timeout)

    def close(self) -> None:
        """Grow no more."""
        if self._growth is not None:
            self._growth.cancel()

    def _hold(self, seconds: float) -> None:
        """Grow in so many seconds, or later if that has been said already."""
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        if self._growth is not None:
            self._growth.cancel()
            due = max(due, self._growth.when())
        self._growth = loop.call_at(due, self._grow)

    def _grow(self) -> None:
        if not (self._step or self._answered or self.is_empty):  # nothing has changed there
            self._hold(self._every)
            return
        if self._step:  # and none of the rows before was refused
            self._in_vain = 0
        self._step = 2 * self._step or 1
        self._places.limit = min(self._most, self._places.limit + self._step)
        self._places.leave(0)
        if self._places.limit < self._most:
            self._growth = asyncio.get_running_loop().call_later(self._every, self._grow)


def pause(refusals: int) -> float:
    """Seconds to hold back after so many refusals in a row."""
    longest = min(HOLD_LIMIT, HOLD_BASE * 2.0 ** min(refusals, 16))
    return random.uniform(longest / 2, longest)
