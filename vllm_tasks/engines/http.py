"""Rows over HTTP: pooled connections, retries, failover. The server may be anybody's."""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import requests

from vllm_tasks.engines import Done, wire
from vllm_tasks.engines.servers import Server, Servers
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


class Unreachable(Exception):
    """The server accepted no connection: that counts against the server, not against the row."""


class HttpEngine:
    """An `Engine` whose rows are HTTP requests, one each."""

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        self.window = Window(config.max_in_flight * len(config.urls))
        self._headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        self._servers = Servers(config.urls, config.model, self._headers, config.patience)
        self._session: aiohttp.ClientSession | None = None
        # A chunk may be larger than the window; the server still never sees more than this.
        self._room = asyncio.Semaphore(self.window.limit)

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout, sock_connect=CONNECT_TIMEOUT),
            headers={**self._headers, "Content-Type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        self._servers.close()
        if self._session is not None:
            await self._session.close()

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
        failures = timeouts = refused = 0
        while True:
            server = await self._servers.pick()
            server.in_flight += 1
            try:
                return await self._attempt(server, request)
            except Unreachable as error:
                # Not the row's failure: the next pick takes another server, or waits until one is
                # healthy. Refused again and again by healthy servers, it is the row's after all.
                self._servers.unreachable(server)
                refused += 1
                if refused > self.config.retries:
                    return RowError("connection", f"{error} ({refused} times)", retryable=True)
                continue
            except Attempt as failed:
                failures += 1
                timeouts += failed.kind == "timeout"
                allowed = failures <= self.config.retries and timeouts <= 1
                if not (failed.retryable and allowed):
                    tries = f" (after {failures} attempts)" if failures > 1 else ""
                    return RowError(failed.kind, failed.message + tries, retryable=failed.retryable)
                delay = failed.delay
            finally:
                server.in_flight -= 1
            await asyncio.sleep(backoff(failures) if delay is None else delay)

    async def _attempt(self, server: Server, request: Request) -> Result:
        assert self._session is not None, "start() comes first"
        path = wire.path_of(self.config.protocol, request)
        try:
            model = None if path == "/generate" else await self._servers.model_of(server)
            body = json.dumps(wire.body_of(request, model)).encode()
            async with self._session.post(server.url + path, data=body, allow_redirects=False) as response:
                content = await self._read(response)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(str(error)) from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Unreachable(str(error)) from error
        except TimeoutError as error:
            raise Attempt(
                "timeout", f"no answer within timeout={self.config.timeout:g} s", retryable=True
            ) from error
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            raise Attempt("connection", f"the connection broke: {error!r}", retryable=True) from error
        except aiohttp.ClientError as error:
            raise Attempt("response", f"not an HTTP answer: {error!r}") from error
        if response.status != 200:
            raise refusal(response, content)
        try:
            return wire.parse(path, request, json.loads(content))
        except (wire.WrongShape, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Attempt(
                "response", f"{error}; the answer began with {content[:100]!r}", retryable=False
            ) from error

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


def refusal(response: aiohttp.ClientResponse, content: bytes) -> Exception:
    """What a status other than 200 means: `InvalidCall` for the call, `Attempt` for the row."""
    status, words = response.status, words_of(content)
    said = f"HTTP {status} from {response.url}: {words!r}"
    if status in FATAL:
        return InvalidCall(f"{said}; {FATAL[status]}")
    if 300 <= status < 400:
        return InvalidCall(
            f"{said}: redirects are not followed; set api_url to {response.headers.get('Location')!r}"
        )
    if status in RETRIED or status >= 500:
        return Attempt("server", said, retryable=True, delay=retry_after(response.headers.get("Retry-After")))
    too_long = "maximum context length" in words or "max_model_len" in words
    return Attempt("too_long" if too_long else "refused", said)


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
        except ValueError:
            return None
    return min(max(seconds, 0.0), RETRY_AFTER_LIMIT)


def backoff(failures: int) -> float:
    """Seconds before attempt `failures + 1`."""
    return random.uniform(0, min(BACKOFF_LIMIT, BACKOFF_BASE * 2**failures))
