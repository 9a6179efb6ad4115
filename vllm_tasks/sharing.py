"""One engine per distinct configuration and process, shared by all models, threads and tasks.

A model *holds* its engine from `init()` (or entering `with`) to `close()` (or leaving it); each call
uses it meanwhile. An engine that was only used stays warm until the process ends; one that was held
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
from dataclasses import dataclass

from vllm_tasks import batching, loop
from vllm_tasks.engines import Done, Engine
from vllm_tasks.engines.http import HttpConfig, HttpEngine
from vllm_tasks.engines.local import LocalConfig, LocalEngine
from vllm_tasks.engines.ray import RayConfig, RayEngine
from vllm_tasks.engines.slots import HeldHere
from vllm_tasks.rows import Request, Result, RowError

Config = HttpConfig | LocalConfig | RayConfig


@dataclass(eq=False)
class Shared:
    """An engine, its start, and how many calls use it. `keep`: it stays warm when nobody does."""

    engine: Engine
    started: asyncio.Task[None]
    calls: int = 0
    keep: bool = True


GC_THRESHOLD = 10_000
_answering = 0
_threshold = gc.get_threshold()

_shared: dict[Config, Shared] = {}
_closing: dict[Config, asyncio.Task[None]] = {}
_held: dict[int, list[Config]] = {}
"""What each model holds, in the order of its entries. Outlives an engine that fails: its successor is
held by the same models."""


async def hold(config: Config, model: int, *, again: bool) -> None:
    """Start the engine if need be and keep it for `model`; with `again`, count every entry."""
    entries = _held.setdefault(model, [])
    if again or config not in entries:
        entries.append(config)  # before the start, which others must not end meanwhile
    try:
        async with _using(config):
            pass
    except BaseException:
        entries.remove(config)
        raise


async def leave(model: int) -> None:
    """Undo the last `hold` of `model`."""
    if entries := _held.get(model):
        await _release(entries.pop())


async def let_go(config: Config, model: int) -> None:
    """Undo all holds of `model`, and close the engine of `config` unless others need it."""
    for held in {config, *_held.pop(model, [])}:
        await _release(held)


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
    async with _using(config) as engine:
        with _rare_collections():
            return await batching.answer(engine, requests, max_batch_size, done)


async def room(config: Config) -> int:
    """How many rows the shared engine of `config` has in flight at most. Starts it if need be."""
    async with _using(config) as engine:
        return engine.window.limit


async def facts(config: Config) -> dict[str, str]:
    """What a server tells of itself: `model` as it is asked for, `root` and `version` where known."""
    async with _using(config) as engine:
        assert isinstance(engine, HttpEngine), "only a server is asked"
        return await engine.facts()


async def has_chat_template(config: Config) -> bool:
    """Whether the engine of `config` has a chat template for its model. Starts it if need be."""
    async with _using(config) as engine:
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


@asynccontextmanager
async def _using(config: Config) -> AsyncIterator[Engine]:
    """The started engine of `config`; those who come while it starts wait for the same start."""
    while closing := _closing.get(config):
        await asyncio.wait({closing})  # two engines of one kind would not fit on the device
    if (failed := _shared.get(config)) and failed.engine.has_failed:
        await _close(config, failed)
    shared = _shared.get(config) or _begin(config)
    shared.calls += 1
    try:
        await asyncio.shield(shared.started)
        yield shared.engine
    finally:
        shared.calls -= 1
        await _close_if_unused(config, shared)


def _begin(config: Config) -> Shared:
    """Start an engine. A start that fails is forgotten at once, also when no call waits for it any more."""
    engine = _new(config)
    shared = _shared[config] = Shared(engine, asyncio.create_task(_start(engine)))

    def forget_if_failed(start: asyncio.Task[None]) -> None:
        if (start.cancelled() or start.exception()) and _shared.get(config) is shared:
            del _shared[config]

    shared.started.add_done_callback(forget_if_failed)
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
        others = [(c, s) for c, s in _shared.items() if s.engine is not engine and isinstance(c, LocalConfig)]
        for config, shared in others:
            if not _is_held(config):
                shared.keep = False
                await _close_if_unused(config, shared)
        await engine.start()


async def _release(config: Config) -> None:
    if shared := _shared.get(config):
        shared.keep = _is_held(config)
        await _close_if_unused(config, shared)


def _is_held(config: Config) -> bool:
    return any(config in entries for entries in _held.values())


async def _close_if_unused(config: Config, shared: Shared) -> None:
    if not (shared.calls or shared.keep or _is_held(config) or _shared.get(config) is not shared):
        await _close(config, shared)


async def _close(config: Config, shared: Shared) -> None:
    del _shared[config]
    closing = _closing[config] = asyncio.create_task(_end(shared))
    closing.add_done_callback(lambda _: _closing.pop(config, None))
    await asyncio.shield(closing)


async def _end(shared: Shared) -> None:
    """Close the engine, also one that is still starting for a call that was interrupted."""
    if not shared.started.done():
        shared.started.cancel()  # which ends what it has begun
        await asyncio.wait({shared.started})
    await shared.engine.close()


async def _close_all() -> None:
    """Close every engine of this process, those that are still starting too."""
    left = list(_shared.values())
    _shared.clear()
    await asyncio.gather(*map(_end, left), *_closing.values())


def _close_at_exit() -> None:
    if _shared or _closing:
        loop.run(_close_all())


def _begin_anew() -> None:
    global _answering
    _answering = 0
    loop.keep_from_parent(dict(_shared), dict(_closing))
    for state in (_shared, _closing, _held):
        state.clear()


atexit.register(_close_at_exit)
os.register_at_fork(after_in_child=_begin_anew)  # the engines and their loop stay with the parent
