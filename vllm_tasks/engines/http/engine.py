"""Rows over HTTP: pooled connections, retries, failover. The server may be anybody's."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from vllm_tasks.engines import Done, wire
from vllm_tasks.engines.http.attempts import Attempts, retry_after
from vllm_tasks.engines.http.connections import NAME, Connector, Names
from vllm_tasks.engines.http.control import Control, Key, lacks_template, untrusted
from vllm_tasks.engines.http.failures import (
    MENDED_BY,
    Denied,
    FailedAttempt,
    Full,
    Unreachable,
    kind_of_refusal,
)
from vllm_tasks.engines.http.files import OUT_OF_FILES, TOO_MANY_FILES, most_connections
from vllm_tasks.engines.http.servers import Server, Servers
from vllm_tasks.engines.http.streaming import EVENTS, Ended, Pieces, streamed
from vllm_tasks.engines.window import Window
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Completion, Request, Result, RowError, given_up

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
"""Seconds to get a connection accepted."""
KEEPALIVE = 4.0
"""Seconds an idle connection is kept: vLLM's server closes its end after 5."""
FULL = {429, 503}
"""What a server says that is asked for more than it takes."""
GATEWAY = {502, 503, 504}
"""What a gateway says while the server behind it is away; vLLM itself says 503 when its engine is dead."""
WITHHELD = "content_filter"
"""The finish reason of an answer that a gateway keeps back, whole or in part."""
TRIAL = Request([{"role": "user", "content": "Hello"}], {"max_tokens": 1})
"""What tells whether chat is refused, where a server does not say it otherwise."""
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
    grace_period: float
    max_response_bytes: int
    stream: bool

    def __repr__(self) -> str:
        return f"HttpConfig({', '.join(self.urls)})"  # never the key


class HttpEngine:
    """An `Engine` whose rows are HTTP requests, one each.

    The `window` admits the rows of all calls in whole chunks, so that it may be exceeded by one chunk. Of
    these only rows with a place at a server become tasks; see `Servers`.
    """

    has_failed = False  # a server may come back

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        most = most_connections(config.max_in_flight, len(config.urls))
        self.window = Window(most * len(config.urls))
        self._key = Key(config.api_key)
        self._names = Names()
        self._control = Control(self._key)
        model = "" if config.protocol == "legacy" else config.model  # legacy names none
        self._servers = Servers(config.urls, model, self._control, config.grace_period, most, self._ask_again)
        self._answered: dict[str, Request] = {}  # by path, the last one
        self._at_work: Counter[str] = Counter()  # by path, the rows that have a place
        self._denied: Counter[str] = Counter()
        self._trying = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        connect = min(CONNECT_TIMEOUT, self.config.timeout / 2)  # else it would be the row that is late
        self._session = aiohttp.ClientSession(
            connector=Connector(self._names, limit=0, keepalive_timeout=KEEPALIVE, ssl=self._control.tls),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout, sock_connect=connect),
            headers={**self._key.headers(), "Content-Type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def facts(self) -> dict[str, str]:
        """See `Servers.facts`."""
        return await self._servers.facts()

    async def has_chat_template(self) -> bool:
        """Asked once, of one server. Where nothing tells, as behind gateways: unless chat is refused."""
        async with self._trying:
            if (told := self._servers.has_chat_template) is None:
                told = await self._told_template()
                self._servers.has_chat_template = told = await self._takes_chat() if told is None else told
            return told

    async def _told_template(self) -> bool | None:
        """What the first server says that can be reached; None: it does not tell, or none can be."""
        for server in self._servers.all:
            with suppress(Unreachable):
                await self._servers.know(server)
                assert server.model is not None
                return await self._control.has_chat_template(server.url, server.model)
        return None

    async def _takes_chat(self) -> bool:
        """Whether chat is not refused for want of a chat template, tried with one row of one token."""
        answer = await self._answer(TRIAL, Attempts(self.config.retries, self._servers))
        if not isinstance(answer, RowError) or not lacks_template(answer.message):
            return True
        logger.warning(
            "texts are sent as plain text: %s refuses chat for want of a chat template (%s); chat=False says "
            "so without a trial",
            ", ".join(self.config.urls), answer.message,
        )  # fmt: skip
        return False

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        await self._servers.compare()
        async with asyncio.TaskGroup() as group:
            for i, request in enumerate(requests):
                attempts = Attempts(self.config.retries, self._servers)
                attempts.server = await self._servers.place()
                task = group.create_task(self._row(i, request, attempts, done))
                # A callback too: a task cancelled before its first step gives nothing back.
                task.add_done_callback(lambda _, attempts=attempts: attempts.leave())  # type: ignore[misc]

    async def _row(self, i: int, request: Request, attempts: Attempts, done: Done) -> None:
        done(i, await self._answer(request, attempts))

    async def _answer(self, request: Request, attempts: Attempts) -> Result:
        """Try until the row has its answer or its error; raises what is the call's fault."""
        while True:
            server = attempts.server = attempts.server or await self._servers.place()
            try:
                outcome = await self._outcome(server, request, attempts)
            except Unreachable as error:
                self._servers.lose(server, str(error))
                if self._names.are_carried:
                    self._servers.hear()
                outcome = attempts.lose(str(error))
            except Full as full:
                attempts.leave()  # before it is asked whether others are at work
                outcome = attempts.refuse(full)
            finally:
                attempts.leave()
            if not isinstance(outcome, float):
                return outcome
            await asyncio.sleep(outcome)

    async def _outcome(self, server: Server, request: Request, attempts: Attempts) -> Result | float:
        """The answer, the row's own error, or the seconds until it is tried again.

        Raises `Unreachable` and `Full` for what is the server's, `InvalidCall` for what is the call's.
        """
        path = wire.path_of(self.config.protocol, request)
        self._at_work[path] += 1
        try:
            await self._servers.trust(server)
            return await self._attempt(server, request)
        except Full:
            raise
        except Denied as denied:
            await self._blame(server, path, denied)
            return attempts.fail(denied)
        except FailedAttempt as failed:
            outcome = attempts.fail(failed)
            if isinstance(outcome, RowError) and failed.may_be_anybodys:
                await self._blame(server, path, failed)
            return outcome
        finally:
            self._at_work[path] -= 1

    async def _blame(self, server: Server, path: str, failed: FailedAttempt) -> None:
        """Return where the failure is the row's own: others are answered by this server meanwhile.

        The row keeps its place until that is known, so that not all rows are sent to find out.
        """
        if isinstance(failed, Denied) and not await self._others_are_answered(path):
            self._servers.forget_model()
            raise failed.of_the_call()
        if answered := self._answered.get(path):
            await self._servers.prove(server, answered)
        elif self.window.in_flight > 1:  # nothing to compare with: its own word counts
            await self._servers.check(server)

    async def _others_are_answered(self, path: str) -> bool:
        """Whether any row of this path is; False when all of it that are at work are denied."""
        self._denied[path] += 1
        try:
            while path not in self._answered and self._denied[path] < self._at_work[path]:
                self._servers.news.clear()
                await self._servers.news.wait()
            return path in self._answered
        finally:
            self._denied[path] -= 1

    async def _ask_again(self, server: Server, answered: Request) -> None:
        """Ask the server for what was answered before; raises as `_outcome`."""
        try:
            await self._attempt(server, answered)
        except Full:
            raise
        except Denied as denied:
            self._servers.forget_model()
            raise denied.of_the_call() from denied
        except FailedAttempt as failed:
            if not failed.is_verdict:
                raise Unreachable(failed.message) from failed

    async def _attempt(self, server: Server, request: Request) -> Completion:
        """One request; raises `Unreachable`, `FailedAttempt`, or `InvalidCall`."""
        with self._names.new() as name:
            return await self._ask(server, request, name)

    async def _ask(self, server: Server, request: Request, name: str) -> Completion:
        path = wire.path_of(self.config.protocol, request)
        model = None if path == "/generate" else server.model
        try:
            fields = wire.body_of(request, model)
            # vLLM leaves the prompt's logprobs out of a stream without a word.
            streams = self.config.stream and fields.get("prompt_logprobs") is None
            body = json.dumps(streamed(fields) if streams else fields).encode()
        except (TypeError, ValueError) as error:  # prompts have been checked before
            raise InvalidCall(f"a sampling parameter cannot be sent: {error}") from error
        sent = time.monotonic()
        try:
            response, status, content = await self._post(server.url + path, body, name)
        except FailedAttempt as failed:
            if failed.kind == "timeout":
                server.capacity.time_out(sent)
            if isinstance(failed, Full):
                server.capacity.refuse(None)
            raise
        seconds = time.monotonic() - sent
        if status not in FULL:
            self._servers.answer(server, sent)
        if status != 200:
            refused = refusal(status, response, content, self._key)
            if status in GATEWAY and "Retry-After" not in response.headers:
                await self._servers.check(server)  # else it is not the row's failure
            if isinstance(refused, Full):
                server.capacity.refuse(refused.delay)
            raise refused
        completion = self._completion(server, path, request, name, content)
        self._answered[path] = request
        return replace(completion, seconds=seconds)

    def _completion(
        self, server: Server, path: str, request: Request, name: str, content: bytes
    ) -> Completion:
        """The answer in a body; raises `FailedAttempt` for what is none to the request of this name."""
        try:
            answer = json.loads(content)
            if self._names.is_of_another(answer, name):
                raise FailedAttempt("connection", f"{server.url} answered another request", retryable=True)
            completion = wire.parse(path, request, answer)
        except (ValueError, RecursionError) as error:
            raise self._no_answer(error, f"the answer from {server.url}", content) from error
        if reason := given_up(completion):
            raise FailedAttempt(
                "server", f"{server.url} gave the row up before its end ({reason})", retryable=True
            )
        if any(choice.finish_reason == WITHHELD for choice in completion.choices):
            raise FailedAttempt("refused", f"{server.url} withheld the answer (finish_reason {WITHHELD!r})")
        return completion

    async def _post(self, url: str, body: bytes, name: str) -> tuple[aiohttp.ClientResponse, int, bytes]:
        """The response, its status (of a stream, that of an error within it) and its body.

        Raises `Unreachable` without a connection, `InvalidCall` without a trusted one, else `FailedAttempt`.
        """
        assert self._session is not None, "start() comes first"
        data = io.BytesIO(body) if len(body) >= STREAMED else body
        try:
            async with self._session.post(
                url, data=data, headers={NAME: name}, allow_redirects=False
            ) as response:
                return response, *await self._read(response)
        except aiohttp.ClientSSLError as error:
            raise untrusted(url, error) from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
                raise Full("connection", TOO_MANY_FILES, retryable=True) from error
            raise Unreachable(str(error)) from error
        except TimeoutError as error:
            waited = f"no answer from {url} within timeout={self.config.timeout:g} s"
            raise FailedAttempt("timeout", waited, retryable=True) from error
        except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError) as error:
            said = self._key.hidden_in(f"{error!r}")
            raise FailedAttempt(
                "connection", f"the connection to {url} broke: {said}", retryable=True
            ) from error
        except aiohttp.ClientError as error:
            # Its repr would show the headers that we sent, with the key.
            said = self._key.hidden_in(f"{type(error).__name__}: {error}")
            raise FailedAttempt("response", f"not an HTTP answer: {said}") from error

    def _no_answer(self, error: Exception, what: str, content: bytes) -> FailedAttempt:
        """`what`, which is `content`, is not as the protocol promises."""
        shown = self._key.hidden_in(content)
        why = error if shown == content else "it repeats api_key"  # the error may show a part of it
        return FailedAttempt("response", f"{why}; {what} began with {shown[:100]!r}")

    async def _read(self, response: aiohttp.ClientResponse) -> tuple[int, bytes]:
        if response.status != 200 or response.content_type != EVENTS:
            return response.status, b"".join([part async for part in self._parts(response)])
        pieces = Pieces()
        try:
            async for part in self._parts(response):
                pieces.take(part)
            return pieces.status, json.dumps(pieces.whole()).encode()
        except Ended as error:
            raise FailedAttempt("connection", f"{response.url}: {error}", retryable=True) from error
        except (ValueError, RecursionError) as error:
            what = f"a piece in the stream from {response.url}"
            raise self._no_answer(error, what, pieces.last) from error

    async def _parts(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The body as it comes, unless it is larger than the limit."""
        limit, size = self.config.max_response_bytes, 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > limit:
                raise FailedAttempt(
                    "response",
                    f"the response is larger than {limit} bytes (VLLM_TASKS_MAX_RESPONSE_BYTES)",
                )
            yield part


def refusal(status: int, response: aiohttp.ClientResponse, content: bytes, key: Key) -> Exception:
    """What a status other than 200 means: `InvalidCall` for the call, `FailedAttempt` for the row."""
    words = words_of(key.hidden_in(content))
    said = f"HTTP {status} from {response.url}: {words!r}"
    if status in MENDED_BY:
        return Denied(status, said)
    if 300 <= status < 400:
        there = key.hidden_in(response.headers.get("Location", ""))
        return InvalidCall(f"{said}: redirects are not followed; set api_url to {there!r}")
    if status == 408 or status in FULL or status >= 500:
        failed = Full if status in FULL else FailedAttempt
        return failed("server", said, retryable=True, delay=retry_after(response.headers.get("Retry-After")))
    if status < 300:
        return FailedAttempt("response", f"{said}: an answer comes with HTTP 200")
    return FailedAttempt(kind_of_refusal(words), said)


def words_of(content: bytes) -> str:
    """The server's own words: the `message` of an OpenAI or FastAPI error, else the body's beginning."""
    text = content.decode(errors="replace")
    try:
        answer: Any = json.loads(text)
        answer = answer.get("error", answer)
        return str(answer.get("message") or answer.get("detail") or text)[:500]
    except (ValueError, AttributeError, RecursionError):
        return text[:500]
