"""Which of several servers gets the next row, and how long to wait when none is there."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import requests
from requests.adapters import HTTPAdapter

from vllm_tasks.engines.room import Room
from vllm_tasks.engines.tries import Full
from vllm_tasks.errors import InvalidCall, ServerUnavailable
from vllm_tasks.rows import Request

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


@dataclass(frozen=True)
class Served:
    """What a server says that it serves: all names, of which rows ask for `model` (None: not among them),
    and that one's `root` (its folder, or its own name)."""

    url: str
    names: tuple[str, ...]
    model: str | None
    root: str | None = None


@dataclass(eq=False)
class Server:
    """One server: its base URL and what this process knows of it now."""

    url: str
    model: str | None
    room: Room
    is_asked: bool
    """Whether it need not be asked what it serves, or has been since it was away."""
    in_flight: int = 0
    avoid_until: float = 0.0
    well_until: float = 0.0
    proven: float = 0.0
    """When a request was sent that had been answered before, and was again."""
    owes: Request | None = None
    """Such a request that failed when it was asked again: it must be answered before any other."""
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)
    proving: asyncio.Lock = field(default_factory=asyncio.Lock)

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

    `model` is the name to use for all; None: each server is asked for its own. `prove` asks a server again
    for what was answered before.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None,
        key: Key,
        patience: float,
        max_in_flight: int,
        prove: Callable[[Server, Request], Awaitable[None]],
    ) -> None:
        self._is_sure = model == "" or (model is not None and len(urls) == 1)
        self.all = [Server(url, model, Room(max_in_flight), self._is_sure) for url in urls]
        self.model = model
        self._served: Served | None = None  # what all serve, from the first that told it
        self._are_compared = len(urls) == 1
        self.key = key
        self.patience = patience
        self.places = max_in_flight * len(urls)
        self.answers = 0
        self._heard = 0.0
        self._prove = prove
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
        """Leave a server alone for a while; it may come back with another model."""
        server.avoid_until = time.monotonic() + LEFT_ALONE
        server.is_asked = self._is_sure

    async def check(self, server: Server) -> None:
        """Raise `Unreachable` when a server that a gateway gives no answer from is not healthy.

        One health check a second at most, however many rows ask.
        """
        async with server.checking:
            if not server.is_there:  # the row before us at this lock has found that out
                raise Unreachable(f"{server.url} is not healthy")
            if server.well_until <= time.monotonic():
                await self._check_health(server.url)
                server.well_until = time.monotonic() + PROBE_EVERY

    async def prove(self, server: Server, answered: Request) -> None:
        """Return where the server answers again what was answered before: failures are the rows' own.

        Raises `Unreachable`, `Full` or `InvalidCall` where it does not. One proof serves all rows that failed
        before it was sent.
        """
        failed = time.monotonic()
        async with server.proving:
            if not server.is_there:  # the row before us at this lock has found that out
                raise Unreachable(f"{server.url} fails whatever it is asked")
            if server.proven <= failed:
                sent = time.monotonic()
                try:
                    await self._prove(server, answered)
                except Unreachable:
                    server.owes = answered
                    raise
                server.proven = sent

    def answer(self, server: Server) -> None:
        """A server has dealt with a row, and so has room again."""
        self.answers += 1
        self._heard = time.monotonic()
        self._full_since = None
        server.room.answer()

    def is_patience_over(self) -> bool:
        """Whether for the patience no row has been answered or worked on, but all were refused for load."""
        now = time.monotonic()
        if self._full_since is None or not all(server.room.is_empty for server in self.all):
            self._full_since = now
        return now - self._full_since > self.patience

    def is_silent_since(self, began: float) -> bool:
        """Whether no row has been answered for the patience, nor since `began`."""
        return time.monotonic() - max(self._heard, began) > self.patience

    def forget_model(self) -> None:
        """Ask anew what is served: a server does not know the model that was told, or tells another one."""
        self._served = None
        self._are_compared = len(self.all) == 1
        for server in self.all:
            server.model, server.is_asked = self.model, self._is_sure

    def close(self) -> None:
        """Stop looking for a server, and letting more rows in."""
        for server in self.all:
            server.room.close()
        self._end_search()

    def _end_search(self) -> None:
        if self._search is not None:
            self._search.cancel()
            self._search = None

    async def compare(self) -> None:
        """Before the first row: raise `InvalidCall` where those that are there serve different models."""
        if not self._are_compared:
            await asyncio.gather(*(self._compare(server) for server in self.all if server.is_there))
            self._are_compared = True

    async def _compare(self, server: Server) -> None:
        try:
            await self.model_of(server)
        except Unreachable:
            self.lose(server)

    async def model_of(self, server: Server) -> str:
        """The model to name in requests: the one given, else the one that the server serves.

        Raises `InvalidCall` when the server refuses to tell, or serves several or another one than the
        others; `Unreachable` when it cannot tell now.
        """
        async with server.asking:
            if not (server.is_asked or server.is_there):  # the row before us at this lock has found that out
                raise Unreachable(f"{server.url} does not answer")
            return await self._learn(server)

    async def _learn(self, server: Server) -> str:
        if not server.is_asked:
            served = await self._told_models(server.url)
            if served is not None:
                self._agree(served)
                server.model = self.model or served.model
            server.is_asked = True
        assert server.model is not None
        return server.model

    def _agree(self, served: Served) -> None:
        """Raise `InvalidCall` unless all that were asked serve the same; of a model that is named, its name
        counts, else its root too."""
        first = self._served = self._served or served
        roots = {first.root, served.root} - {None} if self.model is None else ()
        if served.model == first.model and len(roots) <= 1:
            return
        self.forget_model()
        order = [server.url for server in self.all]
        one, other = sorted((first, served), key=lambda each: order.index(each.url))
        now = " now" if one.url == other.url else ""
        raise InvalidCall(
            f"{one.url} serves {_named(one)}, and {other.url} {_named(other)}{now}: all rows of a call are "
            "answered by one model; correct api_url, or pass model='...' with a name that every server has"
        )

    async def facts(self) -> dict[str, str]:
        """What a server tells: `model` as it is to be asked for; `root` (the model's own name or folder)
        and `version` (vLLM's) where it tells them."""
        while True:
            await self.compare()
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
        root = models_in(await self._told(f"{url}/v1/models")).get(model)
        version = (await self._told(f"{url}/version")).get("version")
        known = {"root": root, "version": version}
        return {name: value for name, value in known.items() if isinstance(value, str) and value}

    async def _told(self, url: str) -> dict[str, Any]:
        """A JSON object, empty from a server that has none to give, or that cannot be reached for it.

        That does not count against the server: a gateway may let through only what rows need.
        """
        try:
            _, content = await self._ask(url)
        except Unreachable:
            return {}
        told = json_in(content)
        return told if isinstance(told, dict) else {}

    async def _told_models(self, url: str) -> Served | None:
        """What the server lists; None where the model is named and it lists nothing."""
        try:
            status, content = await self._ask(f"{url}/v1/models")
        except Unreachable as error:
            if self.model is not None:
                return None
            raise Unreachable(f"{error}; with model='...' it need not be asked") from error
        roots = models_in(json_in(self.key.hidden_in(content))) if status == 200 else {}
        names = tuple(roots)
        if self.model is not None:
            return Served(url, names, self.model if self.model in names else None) if names else None
        said = f"HTTP {status} from {url}/v1/models: {self.key.hidden_in(content)[:300]!r}"
        if status >= 500 or status in (408, 429):
            raise Unreachable(said)
        if not names:
            raise InvalidCall(
                f"the server does not tell its model; check api_url and api_key, or pass model='...' ({said})"
            )
        if len(names) > 1:
            raise InvalidCall(f"{url} serves {_shown(names)}: say which is meant, model={names[0]!r:.200}")
        return Served(url, names, names[0], roots[names[0]])

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
                await self._learn(server)
            if server.owes is not None:
                await self._prove(server, server.owes)
                server.owes = None
        except (Unreachable, Full) as error:
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


def json_in(content: bytes) -> Any:
    """A JSON value, None for what is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def models_in(told: Any) -> dict[str, str | None]:
    """The root, where told, of each model in an answer to /v1/models, by its name."""
    listed = told.get("data") if isinstance(told, dict) else None
    entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    roots = {e["id"]: e.get("root") for e in entries if isinstance(e.get("id"), str)}
    return {name: root if isinstance(root, str) else None for name, root in roots.items()}


def _named(served: Served) -> str:
    return _shown(served.names) + (f" ({served.root!r:.200})" if served.root else "")


def _shown(names: tuple[str, ...]) -> str:
    """Names of models in an error, however many and long they are."""
    return ", ".join(f"{name!r:.200}" for name in names[:20]) + ", ..." * (len(names) > 20)


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
