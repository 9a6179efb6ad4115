"""How many rows one engine has in flight, over all calls that share it."""

from __future__ import annotations

import asyncio
from collections import deque


class Window:
    """Room for about `limit` rows, given to waiting chunks first come, first served.

    A chunk enters when fewer than `limit` rows are in flight, so that the engine sees the limit
    rounded up to whole chunks. Rows leave one by one as they finish: a slow row holds its own
    place, never that of its chunk.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    async def enter(self, rows: int) -> None:
        """Wait for room, then take it for `rows` rows."""
        if self.in_flight < self.limit and not self._waiting:
            self.in_flight += rows
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, rows))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # our turn came while we were cancelled
                self.leave(rows)
            raise

    def leave(self, rows: int = 1) -> None:
        """Give the room of `rows` finished rows back."""
        self.in_flight -= rows
        while self._waiting and self.in_flight < self.limit:
            turn, waiting_rows = self._waiting.popleft()
            if not turn.done():
                self.in_flight += waiting_rows
                turn.set_result(None)
