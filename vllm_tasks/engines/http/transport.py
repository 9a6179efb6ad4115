"""One request for rows over HTTP, and what its response means: the connections, limits and failures."""

from __future__ import annotations

import io
import json
import math
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from vllm_tasks.engines import wire
from vllm_tasks.engines.http.attempts import retry_after
from vllm_tasks.engines.http.connections import NAME, Connector, Names
from vllm_tasks.engines.http.control import json_in, of_proxy, untrusted
from vllm_tasks.engines.http.credentials import Credentials
from vllm_tasks.engines.http.failures import (
    FULL,
    MENDED_BY,
    Denied,
    FailedAttempt,
    Full,
    Unreachable,
    kind_of_refusal,
    may_pass,
)
from vllm_tasks.engines.http.files import OUT_OF_FILES, TOO_MANY_FILES
from vllm_tasks.engines.http.streaming import EVENTS, Ended, Pieces
from vllm_tasks.engines.http.urls import Endpoint

CONNECT_TIMEOUT = 10.0
"""Seconds to open a connection."""
KEEPALIVE = 4.0
"""Seconds that an idle connection is kept. vLLM's server closes its end after 5."""
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


class Transport:
    """Sends requests over pooled connections, in which each request has a name."""

    def __init__(self, config: HttpConfig, tls: ssl.SSLContext, names: Names) -> None:
        self._config = config
        self._tls = tls
        self._names = names
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Make the pool of connections."""
        connect = min(CONNECT_TIMEOUT, self._config.timeout / 2)  # else the row would time out first
        total = None if math.isinf(self._config.timeout) else self._config.timeout  # for aiohttp
        self._session = aiohttp.ClientSession(
            connector=Connector(self._names, limit=0, keepalive_timeout=KEEPALIVE, ssl=self._tls),
            timeout=aiohttp.ClientTimeout(total=total, sock_connect=connect),
            headers={**self._config.credentials.headers(), "Content-Type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def post(
        self, endpoint: Endpoint, path: str, body: bytes, name: str
    ) -> tuple[aiohttp.ClientResponse, int, bytes]:
        """The response, its status (of an error within the stream, if there is one) and its body.

        Raises `Unreachable` without a connection, `InvalidCall` without a trusted one, or `FailedAttempt`.
        """
        assert self._session is not None, "open() comes first"
        data = io.BytesIO(body) if len(body) >= STREAMED else body
        url = endpoint.shown(path)
        try:
            async with self._session.post(
                endpoint.url_of(path), data=data, headers={NAME: name}, allow_redirects=False,
                **endpoint.through,
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
            waited = f"no response from {url} within timeout={self._config.timeout:g} s"
            raise FailedAttempt("timeout", waited, retryable=True) from error
        except (aiohttp.ClientPayloadError, aiohttp.ClientConnectionError) as error:
            reason = self._config.credentials.hidden_in(f"{error!r}")
            raise FailedAttempt(
                "connection", f"the connection to {url} broke: {reason}", retryable=True
            ) from error
        except aiohttp.ClientError as error:
            # Its repr would show the headers of our request, with the key.
            reason = self._config.credentials.hidden_in(f"{type(error).__name__}: {error}")
            raise FailedAttempt("response", f"not an HTTP response: {reason}") from error

    def unreadable(self, error: Exception, what: str, content: bytes) -> FailedAttempt:
        """The failure for `content`, described by `what`, that does not follow the protocol."""
        redacted = self._config.credentials.hidden_in(content)
        # The error may show a part of the secret.
        why = error if redacted == content else "it repeats api_key or a header"
        return FailedAttempt("response", f"{why}; {what} began with {redacted[:100]!r}")

    async def _read(self, response: aiohttp.ClientResponse, url: str) -> tuple[int, bytes]:
        if response.status != 200 or response.content_type != EVENTS:
            content = b"".join([part async for part in self._parts(response)])
            # Nearly no other response has these bytes: a quote within a text is \" there.
            is_error = response.status == 200 and b'"error"' in content
            return wire.status_of(json_in(content)) if is_error else response.status, content
        pieces = Pieces()
        try:
            async for part in self._parts(response):
                pieces.take(part)
            return pieces.status, json.dumps(pieces.complete()).encode()
        except Ended as error:
            last = self._config.credentials.hidden_in(pieces.last)[:100]
            more = f"; its last piece began with {last!r}" if last else ""
            raise FailedAttempt("connection", f"{url}: {error}{more}", retryable=True) from error
        except (ValueError, RecursionError) as error:
            what = f"a piece in the stream from {url}"
            raise self.unreadable(error, what, pieces.last) from error

    async def _parts(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Yield the body in parts. Raises `FailedAttempt` if it is larger than the limit."""
        limit, size = self._config.max_response_bytes, 0
        async for part in response.content.iter_any():
            size += len(part)
            if size > limit:
                raise FailedAttempt(
                    "response",
                    f"the response is larger than {limit} bytes (VLLM_TASKS_MAX_RESPONSE_BYTES)",
                )
            yield part


def refusal(
    status: int, response: aiohttp.ClientResponse, url: str, content: bytes, credentials: Credentials
) -> FailedAttempt:
    """The failure for a status other than 200."""
    words = words_of(credentials.hidden_in(content))
    error = f"HTTP {status} from {url}: {words!r}"
    if status in MENDED_BY:
        return Denied(status, error, MENDED_BY[status])
    if 300 <= status < 400:
        target = credentials.hidden_in(response.headers.get("Location", ""))
        to, way_out = (f" to {target!r}", "set api_url to that") if target else ("", "check api_url")
        return Denied(status, f"{error}: redirects{to} are not followed", way_out)
    if may_pass(status):
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
