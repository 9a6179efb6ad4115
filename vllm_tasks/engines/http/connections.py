"""Matches responses to requests: kept connections and the names of requests.

A gateway that sends a response twice puts a kept connection out of step. aiohttp takes the second copy as the
response to the next request, and every later row would get the answer to another one.
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
"""The header with a request's name, which vLLM repeats in the `id` of its response."""


class Names:
    """The names of the requests in flight, and the connection of each."""

    def __init__(self) -> None:
        self._ours = f"vllm-tasks-{uuid.uuid4().hex}-"
        self._numbers = itertools.count()
        self._carriers: dict[str, ResponseHandler] = {}

    @contextmanager
    def new(self) -> Iterator[str]:
        """Yield a unique name for one request."""
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
        """Whether `answer` names another request of ours than `name`; closes the connection if so.

        This catches a second copy that arrives when the next request has been sent already. Servers that
        repeat no names are trusted.
        """
        found: Any = answer.get("id") if isinstance(answer, Mapping) else None
        if not isinstance(found, str) or self._ours not in found or found.endswith(name):
            return False
        if name in self._carriers:
            self._carriers[name].abort()
        return True


class Connector(aiohttp.TCPConnector):
    """Never reuses a connection on which data has arrived that no request was waiting for."""

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
