"""Rows over HTTP: pooled connections, retries, failover. The server may be anybody's."""

from __future__ import annotations

import asyncio
import email.utils
import io
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from vllm_tasks.engines import Done, wire
from vllm_tasks.engines.connections import NAME, Connector, Names
from vllm_tasks.engines.servers import Key, Server, Servers, Unreachable, untrusted
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Request, Result, RowError, RowErrorKind
from vllm_tasks.window import Window

BACKOFF_BASE, BACKOFF_LIMIT = 0.5, 30.0
"""Seconds: an attempt waits a random time up to min(limit, base * 2**attempt), so-called full jitter."""
RETRY_AFTER_LIMIT = 300.0
"""Seconds: a longer Retry-After is obeyed only so far."""
CONNECT_TIMEOUT = 10.0
"""Seconds to get a connection accepted."""
KEEPALIVE = 4.0
"""Seconds an idle connection is kept: vLLM's server closes its end after 5."""
FATAL = {401: "check api_key", 403: "check api_key", 404: "check api_url and model"}
RETRIED = {408, 429}
GATEWAY = {502, 503, 504}
"""What a gateway says while the server behind it is away; vLLM itself says 503 when its engine is dead."""
TOO_LONG = ("maximum context length", "maximum model length", "max_model_len")
"""How vLLM's refusals of a prompt that is too long say so."""
STREAMED = 2**20
"""Bytes: aiohttp wants larger bodies as a file, so that sending one does not hold up the loop."""


@dataclass(frozen=True)
class HttpConfig:
    """What distinguishes one HTTP engine from another; equal configurations share an engine."""

    urls: tuple[str, ...]
    protocol: wire.Protocol
    api_key: str | None
    model: str | None
    timeout: float
    retries: int
    max_in_flight: int
    patience: float
    max_response_bytes: int

    def __repr__(self) -> str:
        return f"HttpConfig({', '.join(self.urls)})"  # never the key


class Attempt(Exception):
    """One failed attempt: what it would be as a row's error, and when to try again."""

    def __init__(
        self, kind: RowErrorKind, message: str, *, retryable: bool = False, delay: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.retryable, self.delay = kind, message, retryable, delay


class HttpEngine:
    """An `Engine` whose rows are HTTP requests, one each.

    Three limits, outermost first. The `window` admits the rows of all calls in whole chunks, so that
    it may be exceeded by one chunk. Of these `_room` lets exactly the window's limit become tasks: the
    rest must not wait at a slow server, where they would fill the window. Each server's `room`
    is `max_in_flight` rows: it matters while others are down, whose share would come on top.
    """

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        self.window = Window(config.max_in_flight * len(config.urls))
        self._key = Key(config.api_key)
        self._names = Names()
        model = "" if config.protocol == "legacy" else config.model  # legacy names none
        self._servers = Servers(config.urls, model, self._key, config.patience, config.max_in_flight)
        self._session: aiohttp.ClientSession | None = None
        self._room = asyncio.Semaphore(self.window.limit)

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=Connector(self._names, limit=0, keepalive_timeout=KEEPALIVE, ssl=self._servers.tls),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout, sock_connect=CONNECT_TIMEOUT),
            headers={**self._key.headers(), "Content-Type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        self._servers.close()
        if self._session is not None:
            await self._session.close()

    async def facts(self) -> dict[str, str]:
        """See `Servers.facts`."""
        return await self._servers.facts()

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        async with asyncio.TaskGroup() as group:
            for i, request in enumerate(requests):
                await self._room.acquire()
                task = group.create_task(self._row(i, request, done))
                task.add_done_callback(lambda _: self._room.release())

    async def _row(self, i: int, request: Request, done: Done) -> None:
        done(i, await self._answer(request))

    async def _answer(self, request: Request) -> Result:
        """Try until the row has its answer or its error; raises what is the call's fault."""
        failures = timeouts = lost = 0
        while True:
            server = await self._servers.pick()
            server.in_flight += 1
            try:
                async with server.room:
                    with self._names.new() as name:
                        return await self._attempt(server, request, name)
            except Unreachable as error:
                # Not the row's failure: the next pick takes another server, or waits until one is
                # healthy. When more are lost than there are, healthy ones refuse, and that counts.
                self._servers.lose(server)
                lost += 1
                in_vain = lost - len(self.config.urls)
                if in_vain > self.config.retries:
                    return RowError("connection", f"{error} (after {lost} attempts)", retryable=True)
                delay = backoff(in_vain) if in_vain > 0 else 0.0
            except Attempt as failed:
                failures += 1
                timeouts += failed.kind == "timeout"
                allowed = failures <= self.config.retries and timeouts <= 1
                if not (failed.retryable and allowed):
                    tries = f" (after {failures} attempts)" if failures > 1 else ""
                    return RowError(failed.kind, failed.message + tries, retryable=failed.retryable)
                delay = backoff(failures) if failed.delay is None else failed.delay
            finally:
                server.in_flight -= 1
            await asyncio.sleep(delay)

    async def _attempt(self, server: Server, request: Request, name: str) -> Result:
        """One request, under this name; raises `Unreachable`, `Attempt`, or `InvalidCall`."""
        if not server.is_there:  # lost while this row waited for its room
            raise Unreachable(f"{server.url} does not answer")
        path = wire.path_of(self.config.protocol, request)
        model = None if path == "/generate" else await self._servers.model_of(server)
        try:
            body = json.dumps(wire.body_of(request, model)).encode()
        except (TypeError, ValueError) as error:  # prompts have been checked before
            raise InvalidCall(f"a sampling parameter cannot be sent: {error}") from error
        sent = time.perf_counter()
        response, content = await self._post(server.url + path, body, name)
        seconds = time.perf_counter() - sent
        if response.status != 200:
            if response.status == 404:
                self._servers.forget_model(server)
            refused = refusal(response, content, self._key)
            if response.status in GATEWAY and "Retry-After" not in response.headers:
                await self._servers.check(server)  # else it is not the row's failure
            raise refused
        try:
            answer = json.loads(content)
            if self._names.is_of_another(answer, name):
                raise Attempt("connection", f"{server.url} answered another request", retryable=True)
            return replace(wire.parse(path, request, answer), seconds=seconds)
        except (ValueError, RecursionError) as error:
            begin = self._key.hidden_in(content)[:100]
            why = self._key.hidden_in(f"{error}")
            raise Attempt("response", f"{why}; the answer from {server.url} began with {begin!r}") from error

    async def _post(self, url: str, body: bytes, name: str) -> tuple[aiohttp.ClientResponse, bytes]:
        """The response and its body.

        Raises `Unreachable` without a connection, `InvalidCall` without a trusted one, else `Attempt`.
        """
        assert self._session is not None, "start() comes first"
        data = io.BytesIO(body) if len(body) >= STREAMED else body
        try:
            async with self._session.post(
                url, data=data, headers={NAME: name}, allow_redirects=False
            ) as response:
                return response, await self._read(response)
        except aiohttp.ClientSSLError as error:
            raise untrusted(url, error) from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(str(error)) from error
        except TimeoutError as error:
            waited = f"no answer from {url} within timeout={self.config.timeout:g} s"
            raise Attempt("timeout", waited, retryable=True) from error
        except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError) as error:
            said = self._key.hidden_in(f"{error!r}")
            raise Attempt("connection", f"the connection to {url} broke: {said}", retryable=True) from error
        except aiohttp.ClientError as error:
            # Its repr would show the headers that we sent, with the key.
            said = self._key.hidden_in(f"{type(error).__name__}: {error}")
            raise Attempt("response", f"not an HTTP answer: {said}") from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        """The body, unless it is larger than the limit."""
        limit = self.config.max_response_bytes
        content = bytearray()
        async for part in response.content.iter_any():
            content += part
            if len(content) > limit:
                raise Attempt(
                    "response",
                    f"the response is larger than {limit} bytes (VLLM_TASKS_MAX_RESPONSE_BYTES)",
                )
        return bytes(content)


def refusal(response: aiohttp.ClientResponse, content: bytes, key: Key) -> Exception:
    """What a status other than 200 means: `InvalidCall` for the call, `Attempt` for the row."""
    status, words = response.status, words_of(key.hidden_in(content))
    said = f"HTTP {status} from {response.url}: {words!r}"
    if status in FATAL:
        return InvalidCall(f"{said}; {FATAL[status]}")
    if 300 <= status < 400:
        there = key.hidden_in(response.headers.get("Location", ""))
        return InvalidCall(f"{said}: redirects are not followed; set api_url to {there!r}")
    if status in RETRIED or status >= 500:
        return Attempt("server", said, retryable=True, delay=retry_after(response.headers.get("Retry-After")))
    if status < 300:
        return Attempt("response", f"{said}: an answer comes with HTTP 200")
    return Attempt("too_long" if any(t in words for t in TOO_LONG) else "refused", said)


def words_of(content: bytes) -> str:
    """The server's own words: the `message` of an OpenAI or FastAPI error, else the body's beginning."""
    text = content.decode(errors="replace")
    try:
        answer: Any = json.loads(text)
        answer = answer.get("error", answer)
        return str(answer.get("message") or answer.get("detail") or text)[:500]
    except (ValueError, AttributeError, RecursionError):
        return text[:500]


def retry_after(value: str | None) -> float | None:
    """Seconds in a Retry-After header (a number or an HTTP date), None without a usable one."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if math.isnan(seconds) else min(max(seconds, 0.0), RETRY_AFTER_LIMIT)


def backoff(failures: int) -> float:
    """Seconds before attempt `failures + 1`."""
    doublings = min(failures, 16)  # far beyond the limit, and no number too large
    return random.uniform(0, min(BACKOFF_LIMIT, BACKOFF_BASE * 2**doublings))
