"""Several equal engines as one: each chunk to the least loaded, near what shares its beginning."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_tasks.engines import Done
from vllm_tasks.engines.local.engine import LocalEngine
from vllm_tasks.engines.window import Window
from vllm_tasks.errors import EngineFailed, VllmTasksError
from vllm_tasks.rows import Request, Result

logger = logging.getLogger(__name__)

BEGINNINGS = (1024, 256, 64)
"""Characters that prompts must share to be asked side by side; vLLM's cache keeps blocks of 16 tokens."""
REMEMBERED = 1024
"""Beginnings of late that a replica is known for."""
LEEWAY = 0.1
"""Share of its window by which a replica may be fuller and still be chosen for the beginning of a prompt.

A window is 1.1 times what vLLM runs at once, so no other replica goes hungry meanwhile.
"""


@dataclass(eq=False)
class Replica:
    """One engine: how many rows it has and has not answered, and the beginnings of what it had of late."""

    engine: LocalEngine
    open: int = 0
    beginnings: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def remember(self, beginnings: Sequence[int]) -> None:
        for beginning in beginnings:
            self.beginnings[beginning] = None
            self.beginnings.move_to_end(beginning)
        while len(self.beginnings) > REMEMBERED:
            self.beginnings.popitem(last=False)


class Replicas:
    """An `Engine` of equal engines. One that failed for good is left out, and its rows go to the others."""

    def __init__(self, engines: Sequence[LocalEngine]) -> None:
        self.window = Window(1)  # the sum of theirs, when they have told their size
        self._engines = list(engines)
        self._replicas: list[Replica] = []

    @property
    def has_failed(self) -> bool:
        return all(engine.has_failed for engine in self._engines)

    async def start(self) -> None:
        """Start all at once; where one does not start, none is left."""
        try:
            async with asyncio.TaskGroup() as group:
                for engine in self._engines:
                    group.create_task(engine.start())
        except ExceptionGroup as failures:
            await self.close()
            raise first_of(failures) from None
        except BaseException:
            await self.close()
            raise
        self._replicas = [Replica(engine) for engine in self._engines]
        self.window.limit = sum(engine.window.limit for engine in self._engines)

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        left = dict(enumerate(requests))
        while left:
            replica = self._choose(next(iter(left.values())))
            await self._ask(replica, left, done)

    async def has_chat_template(self) -> bool:
        return await self._engines[0].has_chat_template()

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def _choose(self, request: Request) -> Replica:
        """The replica for a chunk that begins with `request`; a healthy one before one that starts again."""
        ready = [r for r in self._replicas if r.engine.is_ready] or self._replicas
        replica = least = min(ready, key=lambda r: r.open)
        beginnings = beginnings_of(request)
        for beginning in beginnings:
            near = [
                r
                for r in ready
                if beginning in r.beginnings and r.open <= least.open + LEEWAY * r.engine.window.limit
            ]
            if near:
                replica = min(near, key=lambda r: r.open)
                break
        replica.remember(beginnings)
        return replica

    async def _ask(self, replica: Replica, left: dict[int, Request], done: Done) -> None:
        """Ask `replica` for the rows that are left; those that it answers no longer are, also if it fails."""
        places = list(left)

        def settle(i: int, result: Result) -> None:
            del left[places[i]]
            replica.open -= 1
            done(places[i], result)

        replica.open += len(places)
        try:
            await replica.engine.generate([left[place] for place in places], settle)
        except EngineFailed as error:
            # It is the call that has failed, or the last of all.
            if not replica.engine.has_failed or self._replicas == [replica]:
                raise
            self._leave_out(replica, error)
        finally:
            replica.open -= len(left)

    def _leave_out(self, replica: Replica, error: EngineFailed) -> None:
        if replica not in self._replicas:  # another chunk has seen it
            return
        self._replicas.remove(replica)
        self.window.limit -= replica.engine.window.limit
        logger.warning("a replica is left out, %d go on: %s", len(self._replicas), error)


def beginnings_of(request: Request) -> list[int]:
    """A number for each of the beginnings of the prompt, the longest first; a short prompt has fewer."""
    prompt = request.prompt
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return [hash((length, text[:length])) for length in BEGINNINGS if len(text) >= length]


def first_of(failures: ExceptionGroup[Exception]) -> Exception:
    """The failure to tell of: equal engines fail to start for the same reason."""
    ours = [e for e in failures.exceptions if isinstance(e, VllmTasksError)]
    return (ours or failures.exceptions)[0]
