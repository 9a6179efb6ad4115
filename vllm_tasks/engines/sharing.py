"""One engine per distinct configuration and process, shared by all models, threads and tasks.

A model *holds* its engine with a lease, from `init()` (or entering `with`) to `close()` (or leaving it). Each
call uses the engine while it runs. An engine that was only used stays warm until the process ends. One that
was held is closed when its last holder has released it and its last call has ended. All state is accessed
on the engine loop only, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from vllm_tasks.engines import Done, Engine, batching, loop
from vllm_tasks.engines.http.engine import HttpEngine
from vllm_tasks.engines.http.transport import HttpConfig
from vllm_tasks.engines.local.engine import LocalConfig, LocalEngine
from vllm_tasks.engines.local.slots import HeldHere
from vllm_tasks.engines.ray.engine import RayConfig, RayEngine
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Request, Result, RowError

Config = HttpConfig | LocalConfig | RayConfig

GC_THRESHOLD = 10_000
_running_calls = 0
_threshold = gc.get_threshold()

_shared: dict[Config, Shared] = {}


class Shared:
    """The engine of one configuration, or its replacement if it has failed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.users = 0
        """Number of running calls and of holds by models."""
        self.stays = True
        """Whether the engine stays warm without users. False after the first release."""
        self.engine: Engine | None = None
        self.started: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def used(self) -> AsyncIterator[Engine]:
        """Yield the started engine. Callers that arrive while it starts wait for the same start."""
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
        if not (self.users or self.stays) and _shared.get(self.config) is self:  # else a parent's
            await self.close()

    async def close(self) -> None:
        if self.engine is not None and self.started is not None:
            self._closing = asyncio.create_task(self._end(self.engine, self.started))
            self.engine = None
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def _end(self, engine: Engine, started: asyncio.Task[None]) -> None:
        """Close the engine, even one that is still starting for an interrupted call."""
        try:
            if not started.done():
                started.cancel()  # which ends the processes that it has started
                await asyncio.wait({started})
            await engine.close()
        finally:
            self._closing = None
            if not self.users:
                _shared.pop(self.config, None)

    async def _ready(self) -> Engine:
        while self._closing is not None:
            await asyncio.wait({self._closing})  # two engines would not fit on the device
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
        """Forget a failed start immediately, even if no call waits for it any more."""
        if (start.cancelled() or start.exception()) and start is self.started:
            self.engine = None


class Lease:
    """The holds of one model, even if engines have failed since. Copies of the model do not share them."""

    def __init__(self) -> None:
        self._held: list[Shared] = []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lease)  # models are equal by their fields

    def __reduce__(self) -> tuple[type[Lease], tuple[()]]:
        return Lease, ()

    async def hold(self, config: Config, *, again: bool) -> None:
        """Start the engine if necessary and hold it. With `again`, a repeated hold counts once more."""
        held, shared = self._held, _of(config)
        async with shared.used():
            if held is self._held and (again or shared not in held):  # else all was released meanwhile
                held.append(shared)
                shared.users += 1

    async def leave(self) -> None:
        """Undo the last `hold`."""
        if self._held:
            shared = self._held.pop()
            shared.users -= 1
            await shared.let_go()

    async def let_go(self, config: Config) -> None:
        """Undo all holds and close the engine of `config`, unless others need it."""
        held, self._held = self._held, []
        for shared in held:
            shared.users -= 1
        for shared in {_of(config), *held}:
            await shared.let_go()


async def generate(
    config: Config,
    requests: Sequence[Request | RowError],
    max_batch_size: int | None,
    done: Done = lambda _i, _result: None,
    follow_up: batching.FollowUp = batching.final,
) -> list[Result]:
    """Process requests with the shared engine of `config` and return their results in input order.

    Starts the engine if necessary, but not if every request is a `RowError`. See `batching.generate`.
    """
    failed: list[Result] = [request for request in requests if isinstance(request, RowError)]
    if len(failed) == len(requests):
        return failed
    async with _of(config).used() as engine:
        with _rare_collections():
            return await batching.generate(engine, requests, max_batch_size, done, follow_up)


async def capacity(config: Config) -> int:
    """The most rows that the shared engine of `config` has in flight. Starts it if necessary."""
    async with _of(config).used() as engine:
        return engine.window.limit


async def facts(config: Config) -> dict[str, str]:
    """Facts that a server reports: its `model` name for requests, and `root` and `version` where known."""
    async with _of(config).used() as engine:
        assert isinstance(engine, HttpEngine), "only servers report facts"
        return await engine.facts()


async def check_current(config: Config) -> None:
    """Raise `InvalidCall` if the engine of `config` runs with former contents of files of its model.

    Its answers would be recorded as those of the present files.
    """
    engine = shared.engine if (shared := _shared.get(config)) else None
    if isinstance(engine, LocalEngine | RayEngine) and not engine.has_failed and engine.is_outdated:
        raise InvalidCall(
            f"files of the model {engine.model!r} have changed, and its engine in this process was started "
            "with the former ones: end it with model.close(), and the next call starts one with those of now"
        )


async def check_served(config: Config, max_tokens: int | None) -> None:
    """Raise `InvalidCall` if a server reports that it would refuse every row; see `Control.check_served`."""
    async with _of(config).used() as engine:
        assert isinstance(engine, HttpEngine), "only servers report this"
        await engine.check_served(max_tokens)


async def has_chat_template(config: Config) -> bool | None:
    """Whether the engine of `config` has a chat template for its model; None if a server does not report it.

    Starts the engine if necessary.
    """
    async with _of(config).used() as engine:
        return await engine.has_chat_template()


async def refuses_chat(config: Config) -> bool:
    """Whether a server of `config` has refused texts that were sent as chat, for want of a chat template."""
    async with _of(config).used() as engine:
        return isinstance(engine, HttpEngine) and engine.refuses_chat


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Collect garbage every `GC_THRESHOLD` new objects instead of every 700 while calls run.

    Rows in flight live long enough to be promoted each time, so the collector scanned the complete
    heap over and over. It took half of the CPU time of a row over HTTP (measured, benchmark P6).
    """
    global _running_calls, _threshold
    if not _running_calls:
        _threshold = gc.get_threshold()
        if 0 < _threshold[0] < GC_THRESHOLD:  # 0: collection is off and stays off
            gc.set_threshold(GC_THRESHOLD, *_threshold[1:])
    _running_calls += 1
    try:
        yield
    finally:
        _running_calls -= 1
        if not _running_calls:
            gc.set_threshold(*_threshold)


def _of(config: Config) -> Shared:
    shared = _shared.setdefault(config, Shared(config))
    if shared.engine is None:
        shared.config = config  # equal, but perhaps with other time limits
    return shared


def _new(config: Config) -> Engine:
    if isinstance(config, HttpConfig):
        return HttpEngine(config)
    return RayEngine(config) if isinstance(config, RayConfig) else LocalEngine(config)


async def _start(engine: Engine) -> None:
    """Start the engine. If warm engines of this process hold the GPUs that it needs, close them first."""
    try:
        await engine.start()
    except HeldHere:
        for shared in list(_shared.values()):
            if shared.engine is not engine and isinstance(shared.config, LocalConfig):
                await shared.let_go()
        await engine.start()


async def _close_all() -> None:
    """Close every engine of this process, including those that are still starting."""
    await asyncio.gather(*(shared.close() for shared in _shared.values()))


def _close_at_exit() -> None:
    if _shared:
        loop.run(_close_all())


def _reset_in_child() -> None:
    global _running_calls
    _running_calls = 0
    loop.keep_from_parent(dict(_shared))
    _shared.clear()


atexit.register(_close_at_exit)
os.register_at_fork(after_in_child=_reset_in_child)  # engines and their loop belong to the parent
