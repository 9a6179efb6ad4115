"""What a server does on demand, and calls of a `VllmAPI` that meet it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tests.servers.scripted_server import Asked, Deed, Reply
from vllm_tasks import RowError, VllmAPI
from vllm_tasks.engines import loop as engine_loop
from vllm_tasks.engines.http.engine import HttpEngine
from vllm_tasks.engines.http.servers import Servers

KEY = "sk-secret-0123456789"


Make = Callable[..., VllmAPI]


def ended(reason: str) -> Reply:
    """An answer that vLLM has given up, as it is by a shutdown, a pause or an error of its own."""
    return Reply({"choices": [{"index": 0, "text": "", "finish_reason": reason}], "usage": {}})


def once(*deeds: Deed) -> Callable[[Asked], Deed]:
    """A script that does these for the first requests, and the usual for all later ones."""
    left = list(deeds)

    def script(asked: Asked) -> Deed:
        return left.pop(0) if left and asked.body is not None else None

    return script


def by_prompt(**deeds: Deed) -> Callable[[Asked], Deed]:
    """A script that treats some prompts in their own way."""
    return lambda asked: deeds.get(asked.prompt) if asked.body is not None else None


def only_error(model: VllmAPI, x: Any = "x", **sampling: Any) -> RowError:
    """The error of a call with one row, which must fail."""
    (error,) = model.predict_batches([x], on_error="return", **sampling)
    assert isinstance(error, RowError)
    return error


def on_servers(model: VllmAPI, work: Callable[[Servers], Awaitable[object]]) -> None:
    """Do `work` with the servers of an engine of its own; it may not take long."""

    async def do() -> None:
        engine = HttpEngine(model.engine_config())
        await engine.start()
        try:
            await asyncio.wait_for(work(engine._servers), 10)
        finally:
            await engine.close()

    engine_loop.run(do())


async def lose_all(servers: Servers) -> None:
    """Mark all servers as lost, as if a row had found each of them away."""
    for server in servers.all:
        servers.lose(server, "away")


def serves(*names: str, root: str | None = None, then: Callable[[Asked], Deed] | None = None) -> Any:
    """A script of a server that lists these models, the second one on as adapters of the first."""
    entries = [{"id": name, "root": root, "parent": names[0] if i else None} for i, name in enumerate(names)]

    def script(asked: Asked) -> Deed:
        if asked.path == "/v1/models":
            return Reply({"data": entries})
        return then(asked) if then else None

    return script


OK = b"HTTP/1.1 200 OK\r\n"
