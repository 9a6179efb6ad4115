"""Rows over HTTP: pooled connections, retries and failover, for any server."""

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
from vllm_tasks.engines.http.control import STRUCTURED, Control, lacks_template, of_proxy, untrusted
from vllm_tasks.engines.http.credentials import Credentials
from vllm_tasks.engines.http.failures import (
    MENDED_BY,
    Denied,
    FailedAttempt,
    Full,
    Unreachable,
    kind_of_refusal,
)
from vllm_tasks.engines.http.files import OUT_OF_FILES, TOO_MANY_FILES, most_connections
from vllm_tasks.engines.http.servers import Server, Servers, Template
from vllm_tasks.engines.http.streaming import EVENTS, Ended, Pieces, streamed
from vllm_tasks.engines.http.urls import Endpoint
from vllm_tasks.engines.window import Window
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Completion, Conversation, Request, Result, RowError, given_up

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
"""Seconds to open a connection."""
KEEPALIVE = 4.0
"""Seconds that an idle connection is kept. vLLM's server closes its end after 5."""
FULL = {429, 503}
"""Statuses of a server that is at its capacity."""
GATEWAY = {502, 503, 504}
"""Statuses of a gateway whose server is down. vLLM itself returns 503 when its engine is dead."""
WITHHELD = "content_filter"
"""The finish reason of an answer that a gateway withholds, completely or in part."""
TEMPLATES = {True: Template.THERE, False: Template.ABSENT, None: Template.UNREPORTED}
"""What a server's report says of its chat template."""
STREAMED = 2**20
"""Bytes from which a body is given to aiohttp as a file, so that sending it does not block the loop."""


@dataclass(frozen=True)
class HttpConfig:
    """The configuration of an HTTP engine. Equal configurations share an engine."""

    endpoints: tuple[Endpoint, ...]
    protocol: wire.Protocol
    credentials: Credentials
    model: str | None
    timeout: float
    retries: int
    max_in_flight: int
    grace_period: float
    max_response_bytes: int
    stream: bool

    def __repr__(self) -> str:
        return f"HttpConfig({', '.join(map(str, self.endpoints))})"  # never a secret


class HttpEngine:
    """An `Engine` that sends each row as one HTTP request.

    The `window` admits the rows of all calls in complete chunks, so it may be exceeded by one chunk. Of
    these rows only those with a slot at a server become tasks; see `Servers`.
    """

    has_failed = False  # because a server may come back

    def __init__(self, config: HttpConfig) -> None:
        self.config = config
        most = most_connections(config.max_in_flight, len(config.endpoints))
        self.window = Window(most * len(config.endpoints))
        self._credentials = config.credentials
        self._names = Names()
        self._control = Control(self._credentials)
        model = "" if config.protocol == "legacy" else config.model  # legacy has no names
        self._servers = Servers(
            config.endpoints, model, self._control, config.grace_period, most, self._repeat
        )
        self._completed: dict[str, Request] = {}  # the last one, by path
        self._at_work: Counter[str] = Counter()  # rows that have a slot, by path
        self._denied: Counter[str] = Counter()
        self._asking_for_template = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        connect = min(CONNECT_TIMEOUT, self.config.timeout / 2)  # else the row would time out first
        self._session = aiohttp.ClientSession(
            connector=Connector(self._names, limit=0, keepalive_timeout=KEEPALIVE, ssl=self._control.tls),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout, sock_connect=connect),
            headers={**self._credentials.headers(), "Content-Type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def facts(self) -> dict[str, str]:
        """Facts that a server reports about itself; see `Servers.facts`."""
        return await self._servers.facts()

    async def has_chat_template(self) -> bool | None:
        """Ask once, at one server; None if it does not report it, as gateways do not."""
        async with self._asking_for_template:
            if self._servers.template is Template.UNASKED:
                await self._servers.compare()
                self._servers.template = TEMPLATES[await self._reported_template()]
            return {Template.THERE: True, Template.ABSENT: False}.get(self._servers.template)

    @property
    def refuses_chat(self) -> bool:
        """Whether a server has refused chat because the model has no chat template."""
        return self._servers.template is Template.REFUSED

    async def _reported_template(self) -> bool | None:
        """The report of the first server that responds. If none does, one is waited for."""
        for server in self._servers.all:
            try:
                return await self._template_of(server)
            except Unreachable as error:
                self._servers.lose(server, str(error))
        with suppress(Unreachable):  # some gateways close the connection for a path that they do not know
            return await self._template_of(await self._servers.first_identified())
        return None

    async def _template_of(self, server: Server) -> bool | None:
        await self._servers.identify(server)
        assert server.model is not None
        return await self._control.has_chat_template(server.endpoint, server.model)

    def _refuse_chat(self, refusal: RowError) -> None:
        """Note that a row was refused for want of a chat template."""
        if not self.refuses_chat:
            self._servers.template = Template.REFUSED
            logger.warning(
                "texts are sent as plain text: %s refuses chat, because the model has no chat template (%s); "
                "chat=False sends them so from the first row on",
                ", ".join(map(str, self.config.endpoints)), refusal.message,
            )  # fmt: skip

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        await self._servers.compare()
        if any(request.sampling.get(STRUCTURED) for request in requests):
            await self._servers.check_structure()
        async with asyncio.TaskGroup() as group:
            for i, request in enumerate(requests):
                attempts = Attempts(self.config.retries, self._servers)
                attempts.server = await self._servers.take_slot()
                task = group.create_task(self._row(i, request, attempts, done))
                # In a callback too: a task that is cancelled before its first step releases nothing itself.
                task.add_done_callback(lambda _, attempts=attempts: attempts.release())  # type: ignore[misc]

    async def _row(self, i: int, request: Request, attempts: Attempts, done: Done) -> None:
        done(i, await self._process(request, attempts))

    async def _process(self, request: Request, attempts: Attempts) -> Result:
        """Send the row until it has an answer or an error. Raises the errors of the call."""
        while True:
            if self.refuses_chat and isinstance(request.prompt, Conversation):
                request = replace(request, prompt=text_of(request.prompt))
            server = attempts.server = attempts.server or await self._servers.take_slot()
            try:
                outcome = await self._outcome(server, request, attempts)
            except Unreachable as error:
                self._servers.lose(server, str(error))
                if self._names.are_carried:
                    self._servers.heartbeat()
                outcome = attempts.lose(str(error))
            except Full as full:
                attempts.release()  # because `refuse` checks whether other rows have slots
                outcome = attempts.refuse(full)
            finally:
                attempts.release()
            is_conversation = isinstance(request.prompt, Conversation)
            if isinstance(outcome, RowError) and is_conversation and lacks_template(outcome.message):
                self._refuse_chat(outcome)
            elif not isinstance(outcome, float):
                return outcome
            else:
                await asyncio.sleep(outcome)

    async def _outcome(self, server: Server, request: Request, attempts: Attempts) -> Result | float:
        """The answer, the row's own error, or the seconds until the next attempt.

        Raises `Unreachable` and `Full` if the server is to blame, `InvalidCall` if the call is.
        """
        path = wire.path_of(self.config.protocol, request)
        self._at_work[path] += 1
        try:
            await self._servers.trust(server)
            return await self._attempt(server, request)
        except Full:
            raise
        except Denied as denied:
            if denied.status != 404 or "model" not in request.sampling:  # else the row's own name is wrong
                await self._blame(server, path, denied)
            return attempts.fail(denied)
        except FailedAttempt as failed:
            outcome = attempts.fail(failed)
            if isinstance(outcome, RowError) and failed.may_be_the_servers:
                await self._blame(server, path, failed)
            return outcome
        finally:
            self._at_work[path] -= 1

    async def _blame(self, server: Server, path: str, failed: FailedAttempt) -> None:
        """Return if the row is to blame, because this server completes other rows; else raise its error.

        The row keeps its slot until that is known, so that the remaining rows are not all sent meanwhile.
        """
        if isinstance(failed, Denied) and not await self._others_complete(path):
            self._servers.forget_model()
            raise failed.of_the_call()
        if completed := self._completed.get(path):
            await self._servers.prove(server, completed)
        elif self.window.in_flight > 1:  # no request to repeat: only its health is known
            await self._servers.check(server)

    async def _others_complete(self, path: str) -> bool:
        """Whether any row of this path has completed; False once all of its rows with slots are denied."""
        self._denied[path] += 1
        try:
            while path not in self._completed and self._denied[path] < self._at_work[path]:
                self._servers.news.clear()
                await self._servers.news.wait()
            return path in self._completed
        finally:
            self._denied[path] -= 1

    async def _repeat(self, server: Server, completed: Request) -> None:
        """Repeat a request that has completed before. Raises the errors of `_outcome`."""
        try:
            await self._attempt(server, completed)
        except Full:
            raise
        except Denied as denied:
            self._servers.forget_model()
            raise denied.of_the_call() from denied
        except FailedAttempt as failed:
            if not failed.is_refusal:
                raise Unreachable(failed.message) from failed

    async def _attempt(self, server: Server, request: Request) -> Completion:
        """Send one request. Raises `Unreachable`, `FailedAttempt` or `InvalidCall`."""
        with self._names.new() as name:
            return await self._send(server, request, name)

    async def _send(self, server: Server, request: Request, name: str) -> Completion:
        path = wire.path_of(self.config.protocol, request)
        model = None if path == "/generate" else server.model
        try:
            fields = wire.body_of(request, model)
            # vLLM silently leaves the prompt's logprobs out of a stream.
            streams = self.config.stream and fields.get("prompt_logprobs") is None
            body = json.dumps(streamed(fields) if streams else fields).encode()
        except (TypeError, ValueError) as error:  # prompts have been checked
            raise InvalidCall(f"a sampling parameter cannot be sent: {error}") from error
        sent = time.monotonic()
        try:
            response, status, content = await self._post(server.endpoint, path, body, name)
        except FailedAttempt as failed:
            if failed.kind == "timeout":
                server.capacity.time_out(sent)
            if isinstance(failed, Full):
                server.capacity.refuse(None)
            raise
        seconds = time.monotonic() - sent
        if status not in FULL:
            self._servers.complete(server, sent)
        if status != 200:
            refused = refusal(status, response, server.endpoint.shown(path), content, self._credentials)
            if status in GATEWAY and "Retry-After" not in response.headers:
                await self._servers.check(server)  # raises if the server is down
            if isinstance(refused, Full):
                server.capacity.refuse(refused.delay)
            raise refused
        completion = self._completion(server, path, request, name, content)
        self._completed[path] = request
        return replace(completion, seconds=seconds)

    def _completion(
        self, server: Server, path: str, request: Request, name: str, content: bytes
    ) -> Completion:
        """The completion in a body. Raises `FailedAttempt` if it is not one for the request `name`."""
        try:
            answer = json.loads(content)
            if self._names.is_of_another(answer, name):
                raise FailedAttempt(
                    "connection", f"{server.endpoint} answered another request", retryable=True
                )
            completion = wire.parse(path, request, answer)
        except (ValueError, RecursionError) as error:
            raise self._unreadable(error, f"the response from {server.endpoint}", content) from error
        if reason := given_up(completion):
            raise FailedAttempt("server", f"{server.endpoint} ended the row early ({reason})", retryable=True)
        if any(choice.finish_reason == WITHHELD for choice in completion.choices):
            raise FailedAttempt(
                "refused", f"{server.endpoint} withheld the answer (finish_reason {WITHHELD!r})"
            )
        return completion

    async def _post(
        self, endpoint: Endpoint, path: str, body: bytes, name: str
    ) -> tuple[aiohttp.ClientResponse, int, bytes]:
        """The response, its status (of an error within the stream, if there is one) and its body.

        Raises `Unreachable` without a connection, `InvalidCall` without a trusted one, or `FailedAttempt`.
        """
        assert self._session is not None, "start() comes first"
        data = io.BytesIO(body) if len(body) >= STREAMED else body
        url = endpoint.shown(path)
        try:
            async with self._session.post(
                endpoint.url_of(path), data=data, headers={NAME: name}, allow_redirects=False,
                proxy=endpoint.proxy,
            ) as response:  # fmt: skip
                return response, *await self._read(response, url)
        except aiohttp.ClientHttpProxyError as error:
            raise of_proxy(url, error) from None
        except aiohttp.ClientSSLError as error:
            raise untrusted(url, error) from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
                raise Full("connection", TOO_MANY_FILES, retryable=True) from error
            raise Unreachable(str(error)) from error
        except TimeoutError as error:
            waited = f"no response from {url} within timeout={self.config.timeout:g} s"
            raise FailedAttempt("timeout", waited, retryable=True) from error
        except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError) as error:
            reason = self._credentials.hidden_in(f"{error!r}")
            raise FailedAttempt(
                "connection", f"the connection to {url} broke: {reason}", retryable=True
            ) from error
        except aiohttp.ClientError as error:
            # Its repr would show the headers of our request, with the key.
            reason = self._credentials.hidden_in(f"{type(error).__name__}: {error}")
            raise FailedAttempt("response", f"not an HTTP response: {reason}") from error

    def _unreadable(self, error: Exception, what: str, content: bytes) -> FailedAttempt:
        """The failure for `content`, described by `what`, that does not follow the protocol."""
        redacted = self._credentials.hidden_in(content)
        # The error may show a part of the secret.
        why = error if redacted == content else "it repeats api_key or a header"
        return FailedAttempt("response", f"{why}; {what} began with {redacted[:100]!r}")

    async def _read(self, response: aiohttp.ClientResponse, url: str) -> tuple[int, bytes]:
        if response.status != 200 or response.content_type != EVENTS:
            return response.status, b"".join([part async for part in self._parts(response)])
        pieces = Pieces()
        try:
            async for part in self._parts(response):
                pieces.take(part)
            return pieces.status, json.dumps(pieces.complete()).encode()
        except Ended as error:
            raise FailedAttempt("connection", f"{url}: {error}", retryable=True) from error
        except (ValueError, RecursionError) as error:
            what = f"a piece in the stream from {url}"
            raise self._unreadable(error, what, pieces.last) from error

    async def _parts(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Yield the body in parts. Raises `FailedAttempt` if it is larger than the limit."""
        limit, size = self.config.max_response_bytes, 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > limit:
                raise FailedAttempt(
                    "response",
                    f"the response is larger than {limit} bytes (VLLM_TASKS_MAX_RESPONSE_BYTES)",
                )
            yield part


def text_of(conversation: Conversation) -> str:
    """The text of a conversation. Raises `InvalidCall` for a system text, which only chat can carry."""
    if conversation[0]["role"] == "system":
        raise InvalidCall(
            "system needs chat messages, and the model has no chat template: put the words into the prompt"
        )
    return conversation.text


def refusal(
    status: int, response: aiohttp.ClientResponse, url: str, content: bytes, credentials: Credentials
) -> Exception:
    """The error for a status other than 200: `InvalidCall` for the call, `FailedAttempt` for the row."""
    words = words_of(credentials.hidden_in(content))
    error = f"HTTP {status} from {url}: {words!r}"
    if status in MENDED_BY:
        return Denied(status, error)
    if 300 <= status < 400:
        target = credentials.hidden_in(response.headers.get("Location", ""))
        return InvalidCall(f"{error}: redirects are not followed; set api_url to {target!r}")
    if status == 408 or status in FULL or status >= 500:
        failed = Full if status in FULL else FailedAttempt
        return failed("server", error, retryable=True, delay=retry_after(response.headers.get("Retry-After")))
    if status < 300:
        return FailedAttempt("response", f"{error}: expected HTTP 200")
    return FailedAttempt(kind_of_refusal(words), error)


def words_of(content: bytes) -> str:
    """The server's own message: that of an OpenAI or FastAPI error, else the beginning of the body."""
    text = content.decode(errors="replace")
    try:
        answer: Any = json.loads(text)
        answer = answer.get("error", answer)
        return str(answer.get("message") or answer.get("detail") or text)[:500]
    except (ValueError, AttributeError, RecursionError):
        return text[:500]
