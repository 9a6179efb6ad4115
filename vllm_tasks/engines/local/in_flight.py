"""The unfinished rows of an engine: those that wait, those in flight, and those suspected of killing it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_tasks.engines import Done
from vllm_tasks.errors import EngineFailed, VllmTasksError
from vllm_tasks.rows import Request, Result, RowError

DEATHS_OF_A_ROW = 2
"""Deaths of its engine while a row was in flight that make the row a suspect, which is then sent alone."""
KILLERS_OF_A_CALL = 6
"""A call fails when this many of its rows have killed the engine, each alone, and none completed between."""

Call = Mapping[str, Any]
"""The sampling parameters, one object for all rows of a call and no others: it identifies the call. Rows with
parameters of their own count like a call of their own."""


@dataclass(eq=False)
class Chunk:
    """The rows of one `generate` call: the number of open ones, and a future for the end of the last."""

    done: Done
    open: int
    finished: asyncio.Future[None]

    def settle(self, index: int, result: Result) -> None:
        self.done(index, result)
        self.open -= 1
        if self.open == 0 and not self.finished.done():
            self.finished.set_result(None)

    def fail(self, error: VllmTasksError) -> None:
        if not self.finished.done():
            self.finished.set_exception(error)


@dataclass(slots=True)
class OpenRow:
    """An unfinished row. `deaths` counts the engine's deaths while the row was in flight."""

    chunk: Chunk
    index: int
    request: Request
    deaths: int = 0

    @property
    def is_suspect(self) -> bool:
        return self.deaths >= DEATHS_OF_A_ROW

    @property
    def call(self) -> Call:
        return self.request.sampling

    def settle(self, result: Result) -> None:
        self.chunk.settle(self.index, result)


class Rows:
    """The rows that wait to be sent, and those in flight.

    A suspect is sent when nothing is in flight, and alone, so that it is to blame if the engine dies.
    """

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._waiting: dict[int, OpenRow] = {}
        self.in_flight: dict[int, OpenRow] = {}
        self._dropped = False
        """Whether the engine may still be processing rows that were dropped."""
        self._killers: list[Call] = []
        """The call of each row that has killed the engine, until a row of that call completes."""

    @property
    def some_wait(self) -> bool:
        return bool(self._waiting)

    def add(self, requests: Sequence[Request], done: Done) -> tuple[list[int], asyncio.Future[None]]:
        """Add waiting rows. Returns their ids, and a future that ends when all of them are done."""
        chunk = Chunk(done, len(requests), asyncio.get_running_loop().create_future())
        mine = {next(self._ids): OpenRow(chunk, i, request) for i, request in enumerate(requests)}
        self._waiting |= mine
        return list(mine), chunk.finished

    def hand_over(self) -> Mapping[int, OpenRow]:
        """The rows to send to the engine now, which count as in flight from here on."""
        suspects = {row_id: row for row_id, row in self._waiting.items() if row.is_suspect}
        one = next(iter(self.in_flight.values()), None)
        if one is not None and (one.is_suspect or suspects):
            return {}
        if not suspects:
            going, self._waiting = self._waiting, {}
        else:
            # From the call with the fewest kills, so that a call whose rows all kill does not hold up others.
            first = min(suspects, key=lambda row_id: self._killed_by(suspects[row_id].call))
            going = {first: self._waiting.pop(first)}
        self.in_flight |= going
        return going

    def complete(self, row_id: int) -> OpenRow | None:
        """Remove and return a completed row; None if it was dropped before its answer arrived."""
        row = self.in_flight.pop(row_id, None)
        if row is not None and self._killers:
            self._killers = [call for call in self._killers if call is not row.call]
        return row

    def drop(self, row_ids: Sequence[int]) -> list[int]:
        """Forget rows that no call waits for. Returns those of them that are in flight."""
        for row_id in row_ids:
            self._waiting.pop(row_id, None)
        left = [row_id for row_id in row_ids if self.in_flight.pop(row_id, None) is not None]
        self._dropped = self._dropped or bool(left)
        return left

    def count_death(self, why: str) -> bool:
        """Count an engine's death against the rows in flight. Returns whether one of them may be to blame."""
        struck, self.in_flight = self.in_flight, {}
        dropped, self._dropped = self._dropped, False
        for row in struck.values():
            # A dropped row may have been beside it, so it was not surely alone.
            row.deaths = min(row.deaths + 1, DEATHS_OF_A_ROW) if dropped else row.deaths + 1
        given_up = [row for row in struck.values() if row.deaths > DEATHS_OF_A_ROW]
        if not given_up:
            self._waiting = struck | self._waiting
        for row in given_up:  # at most one, which was alone
            self._give_up(row, why)
        return dropped or bool(given_up)

    def fail(self, error: EngineFailed, call: Call | None = None) -> None:
        """Fail all calls that wait, or only `call`."""
        for row in (*self.in_flight.values(), *self._waiting.values()):
            if call is None or row.call is call:
                row.chunk.fail(error)

    def _give_up(self, row: OpenRow, why: str) -> None:
        self._killers.append(row.call)
        words = f"the engine died {row.deaths} times on this row, the last time with no other row: {why}"
        row.settle(RowError("engine", words, retryable=True))
        if (killed := self._killed_by(row.call)) >= KILLERS_OF_A_CALL:
            words = f"the engine died {killed} times without completing a row of this call: {why}"
            self.fail(EngineFailed(words, temporary=True), row.call)

    def _killed_by(self, call: Call) -> int:
        return sum(killer is call for killer in self._killers)
