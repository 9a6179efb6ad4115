"""Which of several servers gets the next row, and how long to wait when none is there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import requests

from vllm_tasks.errors import InvalidCall, ServerUnavailable

logger = logging.getLogger(__name__)

LEFT_ALONE = 5.0
"""Seconds that a server which refused a connection gets no rows while others are there."""
PROBE_EVERY = 1.0
"""Seconds between two health checks while no server is there."""
CONTROL_TIMEOUT = 10.0
"""Seconds for a control call (health, models)."""


@dataclass(eq=False)
class Server:
    """One server: its base URL and what this process knows of it now."""

    url: str
    model: str | None
    in_flight: int = 0
    avoid_until: float = 0.0
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)


class Servers:
    """The servers of one engine."""

    def __init__(
        self, urls: Sequence[str], model: str | None, headers: dict[str, str], patience: float
    ) -> None:
        self.all = [Server(url, model) for url in urls]
        self.headers = headers
        self.patience = patience
        self._awaited: asyncio.Task[None] | None = None

    async def pick(self) -> Server:
        """The server with the fewest rows of ours; raises `ServerUnavailable` after the patience."""
        while True:
            now = time.monotonic()
            there = [s for s in self.all if s.avoid_until <= now]
            if there:
                return min(there, key=lambda s: s.in_flight)
            # All rows wait for one and the same search, so that a dead server is not stormed.
            if self._awaited is None or self._awaited.done():
                self._awaited = asyncio.create_task(self._await_any())
            await asyncio.shield(self._awaited)

    def unreachable(self, server: Server) -> None:
        """Leave a server alone for a while."""
        server.avoid_until = time.monotonic() + LEFT_ALONE

    def close(self) -> None:
        """Stop looking for a server."""
        if self._awaited is not None:
            self._awaited.cancel()

    async def model_of(self, server: Server) -> str:
        """The model to name in requests: the one given, else the first that the server lists.

        Raises `InvalidCall` when the server refuses to tell, `requests.ConnectionError` or
        `requests.Timeout` when it is not there.
        """
        async with server.asking:
            if server.model is None:
                server.model = await asyncio.to_thread(self._first_model, server.url)
        return server.model

    def _first_model(self, url: str) -> str:
        with self._get(f"{url}/v1/models") as response:
            if response.status_code >= 500:
                raise requests.ConnectionError(f"HTTP {response.status_code} from {url}/v1/models")
            try:
                response.raise_for_status()
                return str(response.json()["data"][0]["id"])
            except (requests.HTTPError, ValueError, LookupError, TypeError) as error:
                raise InvalidCall(
                    f"{url}/v1/models does not tell its model (HTTP {response.status_code}: "
                    f"{response.text[:300]!r}); check api_url and api_key, or pass model='...'"
                ) from error

    async def _await_any(self) -> None:
        """Return when a health check succeeds on some server."""
        started = time.monotonic()
        urls = ", ".join(s.url for s in self.all)
        logger.warning("no server answers at %s; waiting up to %g s", urls, self.patience)
        while True:
            for server in self.all:
                ailment = await asyncio.to_thread(self._ailment, server.url)
                if ailment is None:
                    logger.info("%s answers after %.1f s", server.url, time.monotonic() - started)
                    server.avoid_until = 0.0
                    return
            if time.monotonic() - started >= self.patience:
                raise ServerUnavailable(
                    f"no server answered at {urls} for {self.patience:g} s (last: {ailment}); start it, "
                    "correct api_url, or wait longer with VLLM_TASKS_PATIENCE (seconds)"
                )
            await asyncio.sleep(PROBE_EVERY)

    def _ailment(self, url: str) -> str | None:
        """Why the server cannot work, None when it can; one without /health can when it answers."""
        try:
            with self._get(f"{url}/health") as response:
                return (
                    f"HTTP {response.status_code} from {url}/health" if response.status_code >= 500 else None
                )
        except (requests.ConnectionError, requests.Timeout) as error:
            return str(error)

    def _get(self, url: str) -> requests.Response:
        # Redirects are not followed: the key must not travel to another host.
        return requests.get(url, headers=self.headers, timeout=CONTROL_TIMEOUT, allow_redirects=False)
