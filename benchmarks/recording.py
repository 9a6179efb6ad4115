"""A proxy that keeps what a server answers, and answers equal requests equally from then on."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from tests.servers.scripted_server import Asked, Reply


class Recording:
    """Answers of the server at `server`, by request; `reply` is a script of a `ScriptedServer`.

    Requests are equal when their bodies are equal as JSON, whatever the order of their fields: no field is
    left out, and 0 is not 0.0. Of equal requests in flight all are forwarded, and have the answer that came
    first. What is no success is not kept, and neither is what is not asked by POST.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self.answers: dict[str, Reply] = {}

    async def reply(self, asked: Asked) -> Reply:
        if asked.body is None:
            return await self._forward("GET", asked)
        known = self.answers.get(canonical(asked.body))
        if known is not None:
            return known
        found = await self._forward("POST", asked)
        return self.answers.setdefault(canonical(asked.body), found) if found.status == 200 else found

    async def _forward(self, method: str, asked: Asked) -> Reply:
        url = f"{self._server}{asked.path}"
        async with aiohttp.request(method, url, json=asked.body) as answer:
            return Reply(await answer.read(), answer.status, {"Content-Type": answer.content_type})


def canonical(body: Any) -> str:
    """The JSON value as a text that is the same for equal values."""
    return json.dumps(body, sort_keys=True)
