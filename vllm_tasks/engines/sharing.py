"""One engine per distinct configuration and process, shared by all models, threads and tasks.

A model *holds* its engine by a lease, from `init()` (or entering `with`) to `close()` (or leaving it); each
call uses it meanwhile. An engine that was only used stays warm until the process ends; one that was held
is closed when its last holder lets go and its last call has ended. All state lives on the engine
loop, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from vllm_tasks.engines import Done, Engine, batching, loop
from vllm_tasks.engines.http.engine import HttpConfig, HttpEngine
from vllm_tasks.engines.local.engine import LocalConfig, LocalEngine
from vllm_tasks.engines.local.slots import HeldHere
from vllm_tasks.engines.ray.engine import RayConfig, RayEngine
from vllm_tasks.rows import Request, Result, RowError

Config = HttpConfig | LocalConfig | RayConfig

GC_THRESHOLD = 10_000
_answering = 0
_threshold = gc.get_threshold()

_shared: dict[Config, Shared] = {}


class Shared:
    """The engine of one configuration, or its successor where it has failed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.users = 0
        """Calls that are at work, and what models hold."""
        self.stays = True
        """Whether the engine stays warm without users: until somebody lets go of it."""
        self.engine: Engine | None = None
        self.started: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def used(self) -> AsyncIterator[Engine]:
        """The started engine; those who come while it starts wait for the same start."""
        self.users += 1
        try:
            yield await self._ready()
        finally:
            self.users -= 1
            await self.close_if_unused()

    async def let_go(self) -> None:
        self.stays = False
        await self.close_if_unused()

    async def close_if_unused(self) -> None:
        if not (self.users or self.stays) and _shared.get(self.config) is self:  # else it is of our parent
            await self.close()

    async def close(self) -> None:
        if self.engine is not None and self.started is not None:
            self._closing = asyncio.create_task(self._end(self.engine, self.started))
            self.engine = None
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def _end(self, engine: Engine, started: asyncio.Task[None]) -> None:
        """Close the engine, also one that is still starting for a call that was interrupted."""
        try:
            if not started.done():
                started.cancel()  # which ends what it has begun
                await asyncio.wait({started})
            await engine.close()
        finally:
            self._closing = None
            if not self.users:
                _shared.pop(self.config, None)

    async def _ready(self) -> Engine:
        while self._closing is not None:
            await asyncio.wait({self._closing})  # two engines of one kind would not fit on the device
        if self.engine is not None and self.engine.has_failed:
            await self.close()
        if self.engine is None or self.started is None:
            self.engine, self.stays = _new(self.config), True
            self.started = asyncio.create_task(_start(self.engine))
            self.started.add_done_callback(self._forget_if_failed)
        engine = self.engine
        await asyncio.shield(self.started)
        return engine

    def _forget_if_failed(self, start: asyncio.Task[None]) -> None:
        """At once, also when no call waits for the start any more."""
        if (start.cancelled() or start.exception()) and start is self.started:
            self.engine = None


class Lease:
    """What one model holds, entry by entry, whatever becomes of the engines. No copy of the model has it."""

    def __init__(self) -> None:
        self._held: list[Shared] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lease)  # models are equal by their fields

    def __reduce__(self) -> tuple[type[Lease], tuple[()]]:
        return Lease, ()

    async def hold(self, config: Config, *, again: bool) -> None:
        """Start the engine if need be and keep it; with `again`, count every entry."""
        held, shared = self._held, _of(config)
        async with shared.used():
            if held is self._held and (again or shared not in held):  # else all was let go meanwhile
                held.append(shared)
                shared.users += 1

    async def leave(self) -> None:
        """Undo the last `hold`."""
        if self._held:
            shared = self._held.pop()
            shared.users -= 1
            await shared.let_go()

    async def let_go(self, config: Config) -> None:
        """Undo all holds, and close the engine of `config` unless others need it."""
        held, self._held = self._held, []
        for shared in held:
            shared.users -= 1
        for shared in {_of(config), *held}:
            await shared.let_go()


async def answer(
    config: Config,
    requests: Sequence[Request | RowError],
    max_batch_size: int | None,
    done: Done = lambda _i, _result: None,
) -> list[Result]:
    """Answer requests through the shared engine of `config`, in input order; see `batching.answer`.

    Starts it if need be, but not for a call in which no row has become a request.
    """
    failed: list[Result] = [request for request in requests if isinstance(request, RowError)]
    if len(failed) == len(requests):
        return failed
    async with _of(config).used() as engine:
        with _rare_collections():
            return await batching.answer(engine, requests, max_batch_size, done)


async def capacity(config: Config) -> int:
    """How many rows the shared engine of `config` has in flight at most. Starts it if need be."""
    async with _of(config).used() as engine:
        return engine.window.limit


async def facts(config: Config) -> dict[str, str]:
    """What a server tells of itself: `model` as it is asked for, `root` and `version` where known."""
    async with _of(config).used() as engine:
        assert isinstance(engine, HttpEngine), "only a server is asked"
        return await engine.facts()


async def has_chat_template(config: Config) -> bool:
    """Whether the engine of `config` has a chat template for its model. Starts it if need be."""
    async with _of(config).used() as engine:
        return await engine.has_chat_template()


@contextmanager
def _rare_collections() -> Iterator[None]:
    """While calls run, garbage is collected every `GC_THRESHOLD` new objects instead of every 700.

    The rows in flight live long enough to be promoted each time, so that the collector went through the
    whole heap over and over: half of the CPU time of a row over HTTP (measured, benchmark P6).
    """
    global _answering, _threshold
    if not _answering:
        _threshold = gc.get_threshold()
        if 0 < _threshold[0] < GC_THRESHOLD:  # 0: collection is off, and stays off
            gc.set_threshold(GC_THRESHOLD, *_threshold[1:])
    _answering += 1
    try:
        yield
    finally:
        _answering -= 1
        if not _answering:
            gc.set_threshold(*_threshold)


def _of(config: Config) -> Shared:
    shared = _shared.setdefault(config, Shared(config))
    if shared.engine is None:
        shared.config = config  # an equal one, whose time limits may be others
    return shared


def _new(config: Config) -> Engine:
    if isinstance(config, HttpConfig):
        return HttpEngine(config)
    return RayEngine(config) if isinstance(config, RayConfig) else LocalEngine(config)


async def _start(engine: Engine) -> None:
    """Start it; where it would wait for GPUs that warm engines of this process hold, those are closed."""
    try:
        await engine.start()
    except HeldHere:
        for shared in list(_shared.values()):
            if shared.engine is not engine and isinstance(shared.config, LocalConfig):
                await shared.let_go()
        await engine.start()


async def _close_all() -> None:
    """Close every engine of this process, those that are still starting too."""
    await asyncio.gather(*(shared.close() for shared in _shared.values()))


def _close_at_exit() -> None:
    if _shared:
        loop.run(_close_all())


def _begin_anew() -> None:
    global _answering
    _answering = 0
    loop.keep_from_parent(dict(_shared))
    _shared.clear()


atexit.register(_close_at_exit)
os.register_at_fork(after_in_child=_begin_anew)  # the engines and their loop stay with the parent
