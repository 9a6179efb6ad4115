"""An answer is the answer to what was asked: kept connections and the names of requests.

A gateway that sends an answer twice puts a kept connection out of step: aiohttp takes the second copy for the
answer to the next request, and each row from then on would get the answer to another one.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace


class Connector(aiohttp.TCPConnector):
    """Hands out no kept connection on which something has come that nobody asked for."""

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's own
    ) -> Connection:
        while True:
            connection = await super().connect(req, traces, timeout)
            if connection.protocol is None or not connection.protocol.should_close:
                return connection
            connection.close()


class RequestNames:
    """A name for each request, which vLLM repeats in the `id` of its answer."""

    HEADER = "X-Request-Id"

    def __init__(self) -> None:
        self._ours = f"vllm-tasks-{uuid.uuid4().hex}-"
        self._numbers = itertools.count()

    def new(self) -> str:
        return f"{self._ours}{next(self._numbers)}"

    def is_of_another(self, answer: object, name: str) -> bool:
        """Whether `answer` says that it is the answer to another request of ours than `name`.

        Catches a second copy that comes when the next request is on its way already. Servers that repeat no
        names are trusted.
        """
        told: Any = answer.get("id") if isinstance(answer, Mapping) else None
        return isinstance(told, str) and self._ours in told and not told.endswith(name)
