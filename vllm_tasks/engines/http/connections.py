"""An answer is the answer to what was asked: kept connections and the names of requests.

A gateway that sends an answer twice puts a kept connection out of step: aiohttp takes the second copy for the
answer to the next request, and each row from then on would get the answer to another one.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import aiohttp

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

NAME = "X-Request-Id"
"""The header of a request's name, which vLLM repeats in the `id` of its answer."""


class Names:
    """The names of the requests under way, and what connection carries each."""

    def __init__(self) -> None:
        self._ours = f"vllm-tasks-{uuid.uuid4().hex}-"
        self._numbers = itertools.count()
        self._carriers: dict[str, ResponseHandler] = {}

    @contextmanager
    def new(self) -> Iterator[str]:
        """A name for one request."""
        name = f"{self._ours}{next(self._numbers)}"
        try:
            yield name
        finally:
            self._carriers.pop(name, None)

    @property
    def are_carried(self) -> bool:
        """Whether any request has a connection."""
        return bool(self._carriers)

    def carry(self, name: str, protocol: ResponseHandler) -> None:
        self._carriers[name] = protocol

    def is_of_another(self, answer: object, name: str) -> bool:
        """Whether `answer` says that it is the answer to another request of ours than `name`.

        Such a connection is closed. Catches a second copy that comes when the next request is on its way
        already. Servers that repeat no names are trusted.
        """
        told: Any = answer.get("id") if isinstance(answer, Mapping) else None
        if not isinstance(told, str) or self._ours not in told or told.endswith(name):
            return False
        if name in self._carriers:
            self._carriers[name].abort()
        return True


class Connector(aiohttp.TCPConnector):
    """Hands out no kept connection on which something has come that nobody asked for."""

    def __init__(self, names: Names, **options: Any) -> None:
        super().__init__(**options)
        self._names = names

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's own
    ) -> Connection:
        while True:
            connection = await super().connect(req, traces, timeout)
            protocol = connection.protocol
            if protocol is None or not protocol.should_close:
                break
            connection.close()
        if protocol is not None:
            self._names.carry(req.headers[NAME], protocol)
        return connection
