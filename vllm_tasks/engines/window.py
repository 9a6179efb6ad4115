"""How many rows one engine has in flight, over all calls that share it."""

from __future__ import annotations

import asyncio


class Window:
    """Capacity for about `limit` rows, given to waiting chunks first come, first served.

    A chunk enters when fewer than `limit` rows are in flight, so that the engine sees the limit
    rounded up to whole chunks. Rows leave one by one as they finish: a slow row holds its own
    place, never that of its chunk.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._turn = asyncio.Lock()  # a queue: of the chunks that wait, the first one has it
        self._has_room = asyncio.Event()

    async def enter(self, rows: int) -> None:
        """Wait for capacity, then take it for `rows` rows."""
        async with self._turn:
            while self.in_flight >= self.limit:
                self._has_room.clear()
                await self._has_room.wait()
            self.in_flight += rows

    def leave(self, rows: int = 1) -> None:
        """Give the room of `rows` finished rows back."""
        self.in_flight -= rows
        if self.in_flight < self.limit:
            self._has_room.set()
