"""The proxy that records the responses of a server."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from benchmarks.recording import Recording
from tests.servers.scripted_server import Asked, Reply, ScriptedServer


def test_equal_requests_in_flight_have_one_answer() -> None:
    """The first response is recorded, and both requests get it."""
    both = asyncio.Event()
    asked: list[Asked] = []

    async def script(request: Asked) -> Reply:
        asked.append(request)
        number = len(asked)
        if number == 2:
            both.set()
        await both.wait()
        await asyncio.sleep(0.2 * number)
        return Reply({"answer": number})

    async def ask(url: str) -> list[Any]:
        async def one(body: Any) -> Any:
            async with aiohttp.request("POST", url, json=body) as reply:
                return await reply.json(content_type=None)

        at_once = await asyncio.gather(one({"a": 1, "b": 2}), one({"b": 2, "a": 1}))
        return [*at_once, await one({"a": 1, "b": 2})]

    with ScriptedServer(script) as server:
        recording = Recording(server.url)
        with ScriptedServer(recording.reply) as proxy:
            assert asyncio.run(ask(f"{proxy.url}/v1/completions")) == [{"answer": 1}] * 3
    assert len(asked) == 2
    assert len(recording.answers) == 1
