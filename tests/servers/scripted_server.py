"""A real HTTP server on loopback that follows a test's script.

It speaks vLLM's protocols and answers every prompt with `answer_to(prompt)`. A test's *script*
is called first, for every request, and a result other than None is the response. The attribute `tokenizes`,
not the script, decides whether the model has a chat template.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import inspect
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

from tests.eventually import LONG_ENOUGH
from tests.servers.ports import free_port

HUGE = 2**30
NO_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat "
    "template if the tokenizer does not define one."
)
"""How vLLM refuses chat for a model without a chat template."""
MODEL = "scripted-model"
CONTROL = ("/health", "/v1/models", "/version", "/tokenize")
"""Paths of a server's control calls."""


@dataclass(frozen=True)
class Asked:
    """One request as it came."""

    path: str
    headers: Mapping[str, str]
    body: Any
    at: float
    query: str = ""

    @property
    def name(self) -> str | None:
        """The client's name for this request."""
        return next((value for key, value in self.headers.items() if key.lower() == "x-request-id"), None)

    @property
    def prompt(self) -> str:
        """The text of the prompt, of the document, or of the last message; empty for a control call."""
        if self.body is None:
            return ""
        found = [self.body[name] for name in ("prompt", "input", "text_2") if name in self.body]
        content = found[0] if found else self.body["messages"][-1]["content"]
        if isinstance(content, list):
            return "".join(part.get("text", "") for part in content if isinstance(part, dict))
        return content


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; `body` is sent as JSON unless it is bytes."""

    body: Any = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """Bytes on the bare connection, with `pause` seconds after each; then its end, by a reset if `reset`."""

    data: bytes = b""
    pause: float = 0.0
    reset: bool = False


Deed = Reply | Raw | None
Script = Callable[[Asked], Deed | Awaitable[Deed]]


def answer_to(prompt: str) -> str:
    """The answer of every scripted server."""
    return f" {prompt}!"


def vector_of(text: str, length: int = 4) -> list[float]:
    """The vector of a text from every scripted server; its numbers have exactly 32 bits."""
    return [byte / 256 for byte in hashlib.sha256(text.encode()).digest()[:length]]


CLASSES = ["bug", "feature", "question"]


def pooled(asked: Asked) -> dict[str, Any]:
    """The numbers that a scripted server returns for a task other than to generate."""
    vector = vector_of(asked.prompt, asked.body.get("dimensions") or 4)
    if asked.path == "/v1/embeddings":
        return {"embedding": base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()}
    if asked.path == "/score":
        return {"score": len(asked.body["text_1"]) / 8 + len(asked.body["text_2"])}
    if asked.body.get("use_activation") is False:
        return {"label": "LABEL_0", "probs": [vector[0] * 9 - 4], "num_classes": 1}
    best = vector[0] < 0.5
    return {"label": CLASSES[best], "probs": [0.25, 0.625, 0.125] if best else [0.625, 0.25, 0.125]}


def usual(asked: Asked) -> Reply:
    """The usual response of vLLM, in the protocol of the path, with the request's own name."""
    if asked.path == "/health":
        return Reply()
    if asked.path == "/v1/models":
        return Reply(
            {"object": "list", "data": [{"id": MODEL, "owned_by": "vllm", "root": "/models/scripted"}]}
        )
    if asked.path == "/version":
        return Reply({"version": "0.32.0"})
    if asked.path in ("/v1/embeddings", "/score", "/classify"):
        return Reply(
            {
                "id": f"embd-{asked.name}",
                "model": asked.body["model"],
                "data": [{"index": 0, **pooled(asked)}],
                "usage": {"prompt_tokens": 3, "total_tokens": 3, "completion_tokens": 0},
            }
        )
    texts = [answer_to(asked.prompt)] * (asked.body.get("n") or 1)
    if asked.path == "/generate":
        return Reply({"text": [asked.prompt + t for t in texts]})
    return Reply(
        {
            "id": f"cmpl-{asked.name}",
            "model": asked.body["model"],
            "choices": [
                {"index": i, "finish_reason": "stop"}
                | ({"text": t} if asked.path == "/v1/completions" else {"message": {"content": t}})
                for i, t in enumerate(texts)
            ],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5},
        }
    )


def refused(status: int, words: str, **headers: str) -> Reply:
    """An error in the format of vLLM's OpenAI server."""
    error = {"message": words, "type": "BadRequestError", "code": status}
    return Reply({"error": error}, status, {k.replace("_", "-"): v for k, v in headers.items()})


async def hang(_: Asked) -> None:
    """A script that never answers."""
    await asyncio.sleep(3600)


async def hang_rows(asked: Asked) -> None:
    """A script that never answers a row; control calls have their usual answers."""
    if asked.body is not None:
        await hang(asked)


def _break_connections(server: web.Server[Any] | None) -> None:
    for connection in server.connections if server else ():
        if connection.transport is not None:
            connection.transport.abort()


class ScriptedServer:
    """Serves from a thread with a loop of its own; `stop()` and `start()` keep the port."""

    def __init__(self, script: Script = lambda _: None, tls: ssl.SSLContext | None = None) -> None:
        self.script = script
        self.tls = tls
        self.tokenizes: Reply | None = refused(400, NO_TEMPLATE)
        """What /tokenize answers; None: the script decides."""
        self.requests: list[Asked] = []
        self.peak = self.open = self.dropped = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scripted-server", daemon=True)
        self._thread.start()
        self._runner: web.AppRunner | None = None
        self.port = free_port()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def posts(self) -> list[Asked]:
        """The requests for answers, without the control calls."""
        return [r for r in self.requests if r.path not in CONTROL]

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._runner.server.connections) if self._runner and self._runner.server else 0

    def start(self) -> None:
        self._do(self._start())

    def stop(self) -> None:
        """Close the port and break every connection."""
        self._do(self._stop())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def wait_until(self, condition: Callable[[], object], seconds: float = LONG_ENOUGH) -> None:
        """Fails the test when `condition` does not come true."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s"
            time.sleep(0.01)

    def _do(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=LONG_ENOUGH)

    async def _start(self) -> None:
        app = web.Application(client_max_size=HUGE)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True, ssl_context=self.tls)
        await site.start()

    async def _stop(self) -> None:
        server = self._runner.server if self._runner is not None else None
        if self._runner is not None:
            _break_connections(server)
            await self._runner.cleanup()
            self._runner = None
        # A connection that was just being accepted has a socket, which nobody else closes.
        late = asyncio.all_tasks() - {asyncio.current_task()}
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        _break_connections(server)  # those that were accepted while the others were closed
        await asyncio.sleep(0)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        content = await request.read()
        body = json.loads(content) if content else None
        asked = Asked(
            request.path, dict(request.headers), body, time.monotonic(), request.rel_url.raw_query_string
        )
        self.requests.append(asked)
        if request.path in CONTROL:
            return await self._act(request, asked)
        self.open += 1
        self.peak = max(self.peak, self.open)
        try:
            return await self._act(request, asked)
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        finally:
            self.open -= 1

    async def _act(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        deed: Any = self.tokenizes if asked.path.endswith("/tokenize") else None
        deed = deed or self.script(asked)
        if inspect.isawaitable(deed):
            deed = await deed
        if isinstance(deed, Raw):
            return await _speak_raw(request, deed)
        reply = deed or usual(asked)
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        return web.Response(body=content, status=reply.status, headers=dict(reply.headers))


async def _speak_raw(request: web.Request, raw: Raw) -> web.StreamResponse:
    transport = request.transport
    assert transport is not None
    pieces = [raw.data[i : i + 1] for i in range(len(raw.data))] if raw.pause else [raw.data]
    for piece in pieces:
        transport.write(piece)
        await asyncio.sleep(raw.pause)
    if raw.reset:
        with contextlib.suppress(OSError):
            request.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        transport.abort()
    else:
        transport.close()
    return web.Response()  # goes nowhere: the connection is closed
