"""Rows over HTTP: pooled connections, retries, failover. The server may be anybody's."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from vllm_tasks.engines import Done, wire
from vllm_tasks.engines.connections import NAME, Connector, Names
from vllm_tasks.engines.servers import Key, Server, Servers, Unreachable, untrusted
from vllm_tasks.engines.tries import Attempt, Full, Tries, retry_after
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Completion, Request, Result, RowError, given_up
from vllm_tasks.window import Window

CONNECT_TIMEOUT = 10.0
"""Seconds to get a connection accepted."""
KEEPALIVE = 4.0
"""Seconds an idle connection is kept: vLLM's server closes its end after 5."""
FATAL = {401: "check api_key", 403: "check api_key", 404: "check api_url and model"}
FULL = {429, 503}
"""What a server says that is asked for more than it takes."""
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


class HttpEngine:
    """An `Engine` whose rows are HTTP requests, one each.

    Three limits, outermost first. The `window` admits the rows of all calls in whole chunks, so that
    it may be exceeded by one chunk. Of these `_room` lets exactly the window's limit become tasks: the
    rest must not wait at a slow server, where they would fill the window. Each server's `room`
    is `max_in_flight` rows, which matters while others are down, whose share would come on top; and less
    where the server does not take so many (see `Room`).
    """

    has_failed = False  # a server may come back

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
        tries = Tries(self.config.retries, self._servers)
        while True:
            server = await self._servers.pick()
            server.in_flight += 1
            try:
                async with server.room:
                    with self._names.new() as name:
                        return await self._attempt(server, request, name)
            except Unreachable as error:
                self._servers.lose(server)
                next_one = tries.lose(error)
            except Full as full:
                next_one = tries.refuse(full)
            except Attempt as failed:
                next_one = tries.fail(failed)
            finally:
                server.in_flight -= 1
            if isinstance(next_one, RowError):
                return next_one
            await asyncio.sleep(next_one)

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
        sent = time.monotonic()
        try:
            response, content = await self._post(server.url + path, body, name)
        except Attempt as failed:
            if failed.kind == "timeout":
                server.room.time_out(sent, self.config.timeout)
            raise
        seconds = time.monotonic() - sent
        if response.status not in FULL:
            self._servers.answer(server)
        if response.status != 200:
            if response.status == 404:
                self._servers.forget_model(server)
            refused = refusal(response, content, self._key)
            if response.status in GATEWAY and "Retry-After" not in response.headers:
                await self._servers.check(server)  # else it is not the row's failure
            if isinstance(refused, Full):
                server.room.refuse(refused.delay)
            raise refused
        return replace(self._completion(server, path, request, name, content), seconds=seconds)

    def _completion(
        self, server: Server, path: str, request: Request, name: str, content: bytes
    ) -> Completion:
        """The answer in a response's body; raises `Attempt` for what is none to the request of this name."""
        try:
            answer = json.loads(content)
            if self._names.is_of_another(answer, name):
                raise Attempt("connection", f"{server.url} answered another request", retryable=True)
            completion = wire.parse(path, request, answer)
        except (ValueError, RecursionError) as error:
            begin = self._key.hidden_in(content)[:100]
            why = self._key.hidden_in(f"{error}")
            raise Attempt("response", f"{why}; the answer from {server.url} began with {begin!r}") from error
        if reason := given_up(completion):
            raise Attempt("server", f"{server.url} gave the row up before its end ({reason})", retryable=True)
        return completion

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
    if status == 408 or status in FULL or status >= 500:
        failed = Full if status in FULL else Attempt
        return failed("server", said, retryable=True, delay=retry_after(response.headers.get("Retry-After")))
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
