"""One engine per distinct configuration and process, shared by all models, threads and tasks.

A model *holds* its engine from `init()` (or entering `with`) to `close()` (or leaving it); each call
uses it meanwhile. An engine that was only used stays warm until the process ends; one that was held
is closed when its last holder lets go and its last call has ended. All state lives on the engine
loop, so nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import atexit
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_tasks import batching, loop
from vllm_tasks.engines import Engine
from vllm_tasks.engines.http import HttpConfig, HttpEngine
from vllm_tasks.engines.local import LocalConfig, LocalEngine
from vllm_tasks.errors import EngineFailed
from vllm_tasks.rows import Request, Result, RowError

Config = HttpConfig | LocalConfig


@dataclass(eq=False)
class Shared:
    """An engine and who needs it. `holders` counts how often each model has entered."""

    engine: Engine
    started: asyncio.Task[None]
    holders: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    keep: bool = True


_shared: dict[Config, Shared] = {}
_closing: dict[Config, asyncio.Task[None]] = {}


async def hold(config: Config, model: str, *, again: bool) -> None:
    """Start the engine if need be and keep it for `model`; with `again`, count every entry."""
    shared = await _ready(config)
    shared.keep = True
    if again or not shared.holders[model]:
        shared.holders[model] += 1


async def let_go(config: Config, model: str, *, all_holds: bool) -> None:
    """Undo one `hold` of `model`, or all; closes the engine when nobody is left."""
    shared = _shared.get(config)
    if shared is None:
        return
    shared.holders[model] = 0 if all_holds else max(0, shared.holders[model] - 1)
    shared.holders += Counter()  # drops the zeros
    if not shared.holders:
        shared.keep = False
        await _close_if_unused(config, shared)


async def answer(
    config: Config, requests: Sequence[Request | RowError], max_batch_size: int | None
) -> list[Result]:
    """Answer requests through the shared engine of `config`, in input order.

    Starts it if need be, but not for a call in which no row has become a request.
    """
    failed: list[Result] = [request for request in requests if isinstance(request, RowError)]
    if len(failed) == len(requests):
        return failed
    shared = await _ready(config)
    shared.calls += 1
    try:
        return await batching.answer(shared.engine, requests, max_batch_size)
    except EngineFailed:
        _forget(config, shared)  # the next call starts a new one
        raise
    finally:
        shared.calls -= 1
        await _close_if_unused(config, shared)


async def close_all() -> None:
    """Close every engine of this process."""
    engines = [shared.engine for shared in _shared.values()]
    _shared.clear()
    await asyncio.gather(*(engine.close() for engine in engines), *_closing.values())


async def _ready(config: Config) -> Shared:
    """The started engine of `config`; those who come while it starts wait for the same start."""
    if closing := _closing.get(config):
        await asyncio.shield(closing)  # two engines of one kind would not fit on the device
    shared = _shared.get(config)
    if shared is None:
        engine = LocalEngine(config) if isinstance(config, LocalConfig) else HttpEngine(config)
        shared = _shared[config] = Shared(engine, asyncio.create_task(engine.start()))
    try:
        await asyncio.shield(shared.started)
    except Exception:
        _forget(config, shared)
        raise
    return shared


async def _close_if_unused(config: Config, shared: Shared) -> None:
    if shared.calls or shared.keep or _shared.get(config) is not shared:
        return
    del _shared[config]
    task = _closing[config] = asyncio.create_task(shared.engine.close())
    try:
        await asyncio.shield(task)
    finally:
        _closing.pop(config, None)


def _forget(config: Config, shared: Shared) -> None:
    if _shared.get(config) is shared:
        del _shared[config]


def _close_at_exit() -> None:
    if _shared:
        loop.run(close_all())


def _begin_anew() -> None:
    _shared.clear()
    _closing.clear()


atexit.register(_close_at_exit)
os.register_at_fork(after_in_child=_begin_anew)  # the engines and their loop stay with the parent
