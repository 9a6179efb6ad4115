"""Several equal engines as one. A chunk goes to one that had its prefix, or else to the least loaded."""

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

PREFIX_LENGTHS = (1024, 256, 64)
"""Characters that prompts must share to go to one replica. vLLM's cache keeps blocks of 16 tokens."""
REMEMBERED = 1024
"""Number of recent prefixes that are remembered for each replica."""
LEEWAY = 0.1
"""Fraction of its window by which a replica may be fuller and still be chosen for the prefix of a prompt.

A window is 1.1 times the rows that vLLM runs at once, so the other replicas still have enough rows.
"""


@dataclass(eq=False)
class Replica:
    """One engine, the number of its unfinished rows, and the prefixes of its recent chunks."""

    engine: LocalEngine
    open: int = 0
    prefixes: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def remember(self, prefixes: Sequence[int]) -> None:
        for prefix in prefixes:
            self.prefixes[prefix] = None
            self.prefixes.move_to_end(prefix)
        while len(self.prefixes) > REMEMBERED:
            self.prefixes.popitem(last=False)


class Replicas:
    """An `Engine` of equal engines. One that has failed is removed, and the others get its rows."""

    def __init__(self, engines: Sequence[LocalEngine]) -> None:
        self.window = Window(1)  # the sum of the engines' windows once they have started
        self._engines = list(engines)
        self._replicas: list[Replica] = []

    @property
    def has_failed(self) -> bool:
        return all(engine.has_failed for engine in self._engines)

    @property
    def is_outdated(self) -> bool:
        return any(engine.is_outdated for engine in self._engines)

    async def start(self) -> None:
        """Start all at the same time. If one does not start, close all of them."""
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
            await self._send(replica, left, done)

    async def has_chat_template(self) -> bool:
        return await self._engines[0].has_chat_template()

    async def close(self) -> None:
        await asyncio.gather(*(engine.close() for engine in self._engines))

    def _choose(self, request: Request) -> Replica:
        """The replica for a chunk that begins with `request`: one that is ready, if there is any."""
        ready = [r for r in self._replicas if r.engine.is_ready] or self._replicas
        replica = least = min(ready, key=lambda r: r.open)
        prefixes = prefixes_of(request)
        for prefix in prefixes:
            near = [
                r
                for r in ready
                if prefix in r.prefixes and r.open <= least.open + LEEWAY * r.engine.window.limit
            ]
            if near:
                replica = min(near, key=lambda r: r.open)
                break
        replica.remember(prefixes)
        return replica

    async def _send(self, replica: Replica, left: dict[int, Request], done: Done) -> None:
        """Send the rows that are `left`. Completed rows are removed from it, even if the replica fails."""
        positions = list(left)

        def settle(i: int, result: Result) -> None:
            del left[positions[i]]
            replica.open -= 1
            done(positions[i], result)

        replica.open += len(positions)
        try:
            await replica.engine.generate([left[position] for position in positions], settle)
        except EngineFailed as error:
            # Only the call has failed, or this was the last replica.
            if not replica.engine.has_failed or self._replicas == [replica]:
                raise
            self._remove(replica, error)
        finally:
            replica.open -= len(left)

    def _remove(self, replica: Replica, error: EngineFailed) -> None:
        if replica not in self._replicas:  # another chunk has removed it
            return
        self._replicas.remove(replica)
        self.window.limit -= replica.engine.window.limit
        logger.warning("a replica has failed, %d are left: %s", len(self._replicas), error)


def prefixes_of(request: Request) -> list[int]:
    """A hash of each prefix of the prompt, the longest first. A short prompt has fewer prefixes."""
    prompt = request.prompt
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return [hash((length, text[:length])) for length in PREFIX_LENGTHS if len(text) >= length]


def first_of(failures: ExceptionGroup[Exception]) -> Exception:
    """The failure to raise: equal engines fail to start for the same reason."""
    ours = [e for e in failures.exceptions if isinstance(e, VllmTasksError)]
    return (ours or failures.exceptions)[0]
