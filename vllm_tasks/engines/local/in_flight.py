"""The unfinished rows of an engine: which wait, which it has, and which are suspected of killing it."""

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
"""A row that was in flight at so many deaths of its engine is a suspect: from then on it is sent alone."""
KILLERS_OF_A_CALL = 6
"""A call fails when so many of its rows have killed the engine, each alone, and none was answered between."""

Call = Mapping[str, Any]
"""The sampling parameters that the rows of one call share, and no others: they stand for the call."""


@dataclass(eq=False)
class Chunk:
    """The rows of one `generate` call: how many are open, and a future for the last of them."""

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
    """A row that is not answered yet. `deaths` are those of the engine while it was in flight."""

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
    """The rows that wait to be handed over, and those that are in flight.

    A suspect goes when nothing is in flight, and nothing goes beside it: what kills then is to blame.
    """

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._waiting: dict[int, OpenRow] = {}
        self.in_flight: dict[int, OpenRow] = {}
        self._some_left = False
        """Whether the engine may still be at work on rows that were dropped."""
        self._killers: list[Call] = []
        """The call of each row that has killed the engine, until a row of that call is answered."""

    @property
    def some_wait(self) -> bool:
        return bool(self._waiting)

    def add(self, requests: Sequence[Request], done: Done) -> tuple[list[int], asyncio.Future[None]]:
        """The names of rows that wait from here on, and what ends when all of them are done."""
        chunk = Chunk(done, len(requests), asyncio.get_running_loop().create_future())
        mine = {next(self._ids): OpenRow(chunk, i, request) for i, request in enumerate(requests)}
        self._waiting |= mine
        return list(mine), chunk.finished

    def hand_over(self) -> Mapping[int, OpenRow]:
        """What goes to the engine now, and is in flight from here on."""
        suspects = {row_id: row for row_id, row in self._waiting.items() if row.is_suspect}
        one = next(iter(self.in_flight.values()), None)
        if one is not None and (one.is_suspect or suspects):
            return {}
        if not suspects:
            going, self._waiting = self._waiting, {}
        else:
            # Of the call that has killed least: what is wrong with all rows of one is to hold up no other.
            first = min(suspects, key=lambda row_id: self._killed_by(suspects[row_id].call))
            going = {first: self._waiting.pop(first)}
        self.in_flight |= going
        return going

    def answered(self, row_id: int) -> OpenRow | None:
        """The row, which is finished now; None for one that was dropped while its answer was on its way."""
        row = self.in_flight.pop(row_id, None)
        if row is not None and self._killers:
            self._killers = [call for call in self._killers if call is not row.call]
        return row

    def drop(self, row_ids: Sequence[int]) -> list[int]:
        """Forget rows that nobody waits for; returns those of them that are in flight."""
        for row_id in row_ids:
            self._waiting.pop(row_id, None)
        left = [row_id for row_id in row_ids if self.in_flight.pop(row_id, None) is not None]
        self._some_left = self._some_left or bool(left)
        return left

    def bury(self, why: str) -> bool:
        """Count a death of the engine against the rows that it had; whether it may be the doing of one."""
        struck, self.in_flight = self.in_flight, {}
        dropped, self._some_left = self._some_left, False
        for row in struck.values():
            # Beside one that was dropped, it was not alone.
            row.deaths = min(row.deaths + 1, DEATHS_OF_A_ROW) if dropped else row.deaths + 1
        given_up = [row for row in struck.values() if row.deaths > DEATHS_OF_A_ROW]
        if not given_up:
            self._waiting = struck | self._waiting
        for row in given_up:  # one, that was alone
            self._give_up(row, why)
        return dropped or bool(given_up)

    def fail(self, error: EngineFailed, call: Call | None = None) -> None:
        """Fail the calls that wait, or one of them."""
        for row in (*self.in_flight.values(), *self._waiting.values()):
            if call is None or row.call is call:
                row.chunk.fail(error)

    def _give_up(self, row: OpenRow, why: str) -> None:
        self._killers.append(row.call)
        words = f"the engine died {row.deaths} times on this row, the last time with no other row: {why}"
        row.settle(RowError("engine", words, retryable=True))
        if (killed := self._killed_by(row.call)) >= KILLERS_OF_A_CALL:
            words = f"the engine died {killed} times without answering a row of this call: {why}"
            self.fail(EngineFailed(words, temporary=True), row.call)

    def _killed_by(self, call: Call) -> int:
        return sum(killer is call for killer in self._killers)
