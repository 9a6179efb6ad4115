"""Which of several servers gets the next row, and how long to wait when none is there."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter

from vllm_tasks.engines.room import Room
from vllm_tasks.errors import InvalidCall, ServerUnavailable

logger = logging.getLogger(__name__)

LEFT_ALONE = 5.0
"""Seconds that a server which refused a connection gets no rows while others are there."""
PROBE_EVERY = 1.0
"""Seconds between two health checks of a server that is in doubt."""
CONTROL_TIMEOUT = 10.0
"""Seconds for a control call (health, models)."""
CONTROL_BYTES = 2**20
"""Largest answer to a control call that is read."""

Words = TypeVar("Words", str, bytes)


class Unreachable(Exception):
    """The server cannot be had now: that counts against the server, not against the row."""


@dataclass(frozen=True)
class Key:
    """The bearer token, or none. It goes into the header and nowhere else."""

    secret: str | None = field(repr=False)

    def headers(self) -> dict[str, str]:
        """Raises `InvalidCall` for a key that a header cannot carry, such as one with a line end."""
        if not self.secret:
            return {}
        if not re.fullmatch("[!-~]+", self.secret):
            raise InvalidCall(
                "api_key has a space, a line end or another character that an HTTP header cannot carry; "
                "a key read from a file needs .strip()"
            )
        return {"Authorization": f"Bearer {self.secret}"}

    def hidden_in(self, words: Words) -> Words:
        """What a server said, without the key, should it have echoed it."""
        if not self.secret:
            return words
        if isinstance(words, bytes):
            return words.replace(self.secret.encode(), b"***")
        return words.replace(self.secret, "***")


@dataclass(eq=False)
class Server:
    """One server: its base URL and what this process knows of it now."""

    url: str
    model: str | None
    room: Room
    in_flight: int = 0
    avoid_until: float = 0.0
    well_until: float = 0.0
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_there(self) -> bool:
        """Whether it may get rows, as far as we know."""
        return self.avoid_until <= time.monotonic()


class TrustedBy(HTTPAdapter):
    """Has `requests` trust the certificates that a context trusts, and no others of its own."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs, ssl_context=self.context)

    def cert_verify(self, *_: Any) -> None:
        """Add no authorities to the context, which verifies by itself."""


class Servers:
    """The servers of one engine, each with room for `max_in_flight` rows.

    `model` is the name to use for all; None: each server is asked for its own.
    """

    def __init__(
        self, urls: Sequence[str], model: str | None, key: Key, patience: float, max_in_flight: int
    ) -> None:
        self.all = [Server(url, model, Room(max_in_flight)) for url in urls]
        self.model = model
        self.key = key
        self.patience = patience
        self.places = max_in_flight * len(urls)
        self.answers = 0
        self._full_since: float | None = None
        self.tls = ssl.create_default_context()  # for rows and control calls alike; obeys SSL_CERT_FILE
        self._search: asyncio.Task[None] | None = None
        self._waiting = 0

    async def pick(self) -> Server:
        """The server with the fewest rows of ours, of those that take more; raises `ServerUnavailable` after
        the patience."""
        while True:
            there = [s for s in self.all if s.is_there]
            if there:
                return min(there, key=lambda s: (s.room.is_full, s.in_flight))
            await self._wait_for_any()

    def lose(self, server: Server) -> None:
        """Leave a server alone for a while."""
        server.avoid_until = time.monotonic() + LEFT_ALONE

    async def check(self, server: Server) -> None:
        """Raise `Unreachable` when a server that a gateway gives no answer from is not healthy.

        One health check a second at most, however many rows ask.
        """
        async with server.asking:
            if not server.is_there:  # the row before us at this lock has found that out
                raise Unreachable(f"{server.url} is not healthy")
            if server.well_until <= time.monotonic():
                await self._check_health(server.url)
                server.well_until = time.monotonic() + PROBE_EVERY

    def answer(self, server: Server) -> None:
        """A server has dealt with a row, and so has room again."""
        self.answers += 1
        self._full_since = None
        server.room.answer()

    def is_patience_over(self) -> bool:
        """Whether for the patience no row has been answered or worked on, but all were refused for load."""
        now = time.monotonic()
        if self._full_since is None or not all(server.room.is_empty for server in self.all):
            self._full_since = now
        return now - self._full_since > self.patience

    def forget_model(self, server: Server) -> None:
        """Ask the server anew for its model: it does not know the one that it told us."""
        server.model = self.model

    def close(self) -> None:
        """Stop looking for a server, and letting more rows in."""
        for server in self.all:
            server.room.close()
        self._end_search()

    def _end_search(self) -> None:
        if self._search is not None:
            self._search.cancel()
            self._search = None

    async def model_of(self, server: Server) -> str:
        """The model to name in requests: the one given, else the first that the server lists.

        Raises `InvalidCall` when the server refuses to tell, `Unreachable` when it cannot now.
        """
        async with server.asking:
            if server.model is None:
                if not server.is_there:  # the row before us at this lock has found that out
                    raise Unreachable(f"{server.url} does not answer")
                server.model = await self._first_model(server.url)
            return server.model

    async def facts(self) -> dict[str, str]:
        """What a server tells: `model` as it is to be asked for; `root` (the model's own name or folder)
        and `version` (vLLM's) where it tells them."""
        while True:
            server = await self.pick()
            try:
                model = await self.model_of(server)
            except Unreachable:
                self.lose(server)
                continue
            told = await self._told_of(server.url, model)
            if told or server.is_there:  # else rows have found out meanwhile that it is away
                return {"model": model, **told}

    async def _told_of(self, url: str, model: str) -> dict[str, str]:
        """The `root` of the model and the server's `version`, where it tells them."""
        listed = (await self._told(f"{url}/v1/models")).get("data")
        entries = listed if isinstance(listed, list) else []
        roots = [e.get("root") for e in entries if isinstance(e, dict) and e.get("id") == model]
        version = (await self._told(f"{url}/version")).get("version")
        known = {"root": roots[0] if roots else None, "version": version}
        return {name: value for name, value in known.items() if isinstance(value, str) and value}

    async def _told(self, url: str) -> dict[str, Any]:
        """A JSON object, empty from a server that has none to give, or that cannot be reached for it.

        That does not count against the server: a gateway may let through only what rows need.
        """
        try:
            _, content = await self._ask(url)
            told = json.loads(content)
        except (Unreachable, ValueError, RecursionError):
            return {}
        return told if isinstance(told, dict) else {}

    async def _first_model(self, url: str) -> str:
        try:
            status, content = await self._ask(f"{url}/v1/models")
        except Unreachable as error:
            raise Unreachable(f"{error}; with model='...' it need not be asked") from error
        said = f"HTTP {status} from {url}/v1/models: {self.key.hidden_in(content)[:300]!r}"
        if status >= 500 or status in (408, 429):
            raise Unreachable(said)
        try:
            name = json.loads(content)["data"][0]["id"]
            if status == 200 and isinstance(name, str):
                return name
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        raise InvalidCall(
            f"the server does not tell its model; check api_url and api_key, or pass model='...' ({said})"
        )

    async def _wait_for_any(self) -> None:
        """All rows wait for one and the same search, so that a dead server is not stormed."""
        if self._search is None or self._search.done():
            self._search = asyncio.create_task(self._find_any())
        self._waiting += 1
        try:
            await asyncio.shield(self._search)
        finally:
            self._waiting -= 1
            if not self._waiting:  # cancelled calls leave no search behind
                self._end_search()

    async def _find_any(self) -> None:
        """Return when some server is able to answer."""
        started = time.monotonic()
        urls = ", ".join(s.url for s in self.all)
        logger.warning("no server answers at %s; waiting up to %g s", urls, self.patience)
        while True:
            for server in self.all:
                ailment = await self._ailment(server)
                if ailment is None:
                    logger.info("%s answers after %.1f s", server.url, time.monotonic() - started)
                    server.avoid_until = 0.0
                    return
            left = started + self.patience - time.monotonic()
            if left <= 0:
                raise self.unavailable(ailment)
            await asyncio.sleep(min(PROBE_EVERY, left))

    def unavailable(self, last: str | None) -> ServerUnavailable:
        """What ends a call after the patience; `last` is what was heard last."""
        urls = ", ".join(s.url for s in self.all)
        return ServerUnavailable(
            f"no server answered at {urls} for {self.patience:g} s (last: {last}); start it, "
            "correct api_url, or wait longer with VLLM_TASKS_PATIENCE (seconds)"
        )

    async def _ailment(self, server: Server) -> str | None:
        """Why the server cannot work, None when it can; one without /health can when it answers."""
        try:
            await self._check_health(server.url)
            async with server.asking:
                if server.model is None:
                    server.model = await self._first_model(server.url)
        except Unreachable as error:
            return str(error)
        return None

    async def _check_health(self, url: str) -> None:
        """Raise `Unreachable` unless the server says that it is well, or has no /health."""
        status, _ = await self._ask(f"{url}/health")
        if status >= 500:
            raise Unreachable(f"HTTP {status} from {url}/health")

    async def _ask(self, url: str) -> tuple[int, bytes]:
        """Status and body of a control call."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._get, url), CONTROL_TIMEOUT)
        except TimeoutError as error:
            raise Unreachable(f"no answer from {url} within {CONTROL_TIMEOUT:g} s") from error
        except requests.exceptions.SSLError as error:
            if _is_cut(error):
                raise Unreachable(self.key.hidden_in(str(error))) from error
            raise untrusted(url, error) from error
        except requests.RequestException as error:
            raise Unreachable(self.key.hidden_in(str(error))) from error

    def _get(self, url: str) -> tuple[int, bytes]:
        with requests.Session() as session:
            session.trust_env = False  # as for the rows: a .netrc would replace the key, a proxy see it
            session.mount("https://", TrustedBy(self.tls))
            # Redirects are not followed: the key must not travel to another host.
            with session.get(
                url, headers=self.key.headers(), timeout=CONTROL_TIMEOUT, allow_redirects=False, stream=True
            ) as response:
                content = bytearray()
                for part in response.iter_content(CONTROL_BYTES):  # a part may be one small HTTP chunk
                    content += part
                    if len(content) >= CONTROL_BYTES:
                        break
                return response.status_code, bytes(content)


def untrusted(url: str, error: Exception) -> InvalidCall:
    """No encrypted connection comes about, and waiting would not help."""
    return InvalidCall(
        f"no encrypted connection to {url}: {error}; name the authority of its certificate in SSL_CERT_FILE, "
        "or correct api_url"
    )


def _is_cut(error: BaseException | None) -> bool:
    """Whether the far side only went away, as a server does that restarts."""
    while error is not None and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        error = error.__context__
    return error is not None
