"""A proxy that records a server's answers and repeats them for equal requests."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from tests.servers.scripted_server import Asked, Reply


class Recording:
    """Answers of the server at `server`, by request; `reply` is a script for a `ScriptedServer`.

    Requests are equal if their bodies are equal as JSON, in any order of fields; all fields count, and 0
    differs from 0.0. Equal requests in flight are all forwarded, and all get the first answer. Only
    successful POST requests are recorded.
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
    """The JSON value as text; equal values have equal texts."""
    return json.dumps(body, sort_keys=True)
