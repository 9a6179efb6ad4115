"""A server in a child process that completes every request with the same text, at once or after a delay.

It implements just enough HTTP/1.1 for a client that keeps its connections. It uses a few per cent of the CPU
time of its client, which is what P6 measures.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import zlib
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection

ANSWER = {
    "id": "cmpl-0",
    "object": "text_completion",
    "created": 0,
    "model": "scripted",
    "choices": [{"index": 0, "text": "The answer is 42. " * 8, "finish_reason": "stop", "logprobs": None}],
    "usage": {"prompt_tokens": 60, "completion_tokens": 48, "total_tokens": 108},
}
"""A completion in the format of vLLM's server."""
REFUSED_EVERY, RESET_EVERY, FAILS_EVERY = 200, 499, {429: 293, 500: 401}
"""For `Unruly`: it refuses one prompt in 200, and breaks or fails one request in so many."""
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def response() -> bytes:
    body = json.dumps(ANSWER).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\ncontent-type: application/json\r\n\r\n"
    return head.encode() + body


RESPONSE = response()


class Scripted(asyncio.Protocol):
    """One connection: reads complete requests and completes each after `delay` seconds."""

    def __init__(self, delay: float) -> None:
        self.delay = delay

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n")) >= 0:
            length = LENGTH.search(self.received, 0, end)
            size = end + 4 + (int(length[1]) if length else 0)
            if len(self.received) < size:
                return
            request, self.received = self.received[:size], self.received[size:]
            self.answer(request)

    def answer(self, _request: bytes) -> None:
        if self.delay:
            asyncio.get_running_loop().call_later(self.delay, self.transport.write, RESPONSE)
        else:
            self.transport.write(RESPONSE)


class Unruly(Scripted):
    """Breaks some connections, returns 429 and 500 to some requests, and always 400 for certain prompts."""

    requests = 0

    def answer(self, request: bytes) -> None:
        Unruly.requests += 1
        if b"POST" in request[:4] and zlib.crc32(request.partition(b"\r\n\r\n")[2]) % REFUSED_EVERY == 0:
            self.transport.write(refusal(400))
        elif Unruly.requests % RESET_EVERY == 0:
            self.transport.abort()
        elif status := next((s for s, every in FAILS_EVERY.items() if Unruly.requests % every == 0), None):
            self.transport.write(refusal(status))
        else:
            super().answer(request)


def refusal(status: int, *headers: str) -> bytes:
    """An error response in the format of vLLM's server."""
    body = json.dumps({"error": {"message": "scripted", "type": "Scripted", "code": status}}).encode()
    head = [f"HTTP/1.1 {status} Scripted", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def serve(pipe: Connection, delay: float = 0.0, kind: type[Scripted] = Scripted) -> None:
    """Send the server's URL, then its CPU seconds so far for every message, until the pipe ends."""
    asyncio.run(until_end(pipe, partial(kind, delay)))


async def until_end(pipe: Connection, connection: Callable[[], Scripted]) -> None:
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def report() -> None:
        try:
            pipe.recv()
            pipe.send(time.process_time())
        except EOFError:
            loop.remove_reader(pipe.fileno())
            ended.set_result(None)

    server = await loop.create_server(connection, "127.0.0.1", 0)
    loop.add_reader(pipe.fileno(), report)
    pipe.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await ended
