"""Limits the rows that one engine has in flight, over all calls that share it."""

from __future__ import annotations

import asyncio


class Window:
    """Capacity for about `limit` rows, given to waiting chunks in order of arrival.

    A chunk enters when fewer than `limit` rows are in flight, so the engine sees the limit
    rounded up to complete chunks. Rows leave one by one as they finish: a slow row holds only
    its own slot, not those of its chunk.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._turn = asyncio.Lock()  # a queue: the first waiting chunk holds it
        self._has_capacity = asyncio.Event()

    async def enter(self, rows: int) -> None:
        """Wait for capacity, then take it for `rows` rows."""
        async with self._turn:
            while self.in_flight >= self.limit:
                self._has_capacity.clear()
                await self._has_capacity.wait()
            self.in_flight += rows

    def leave(self, rows: int = 1) -> None:
        """Release the capacity of `rows` finished rows."""
        self.in_flight -= rows
        if self.in_flight < self.limit:
            self._has_capacity.set()
