"""A server for P6 that answers every completion at once with the same words, in a child.

It speaks just enough HTTP/1.1 for a client that keeps its connections, and costs a few per cent of
what its client does: the client is what P6 measures.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from multiprocessing.connection import Connection

ANSWER = {
    "id": "cmpl-0",
    "object": "text_completion",
    "created": 0,
    "model": "scripted",
    "choices": [{"index": 0, "text": "The answer is 42. " * 8, "finish_reason": "stop", "logprobs": None}],
    "usage": {"prompt_tokens": 60, "completion_tokens": 48, "total_tokens": 108},
}
"""An answer as vLLM's server gives it."""
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def response() -> bytes:
    body = json.dumps(ANSWER).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\ncontent-type: application/json\r\n\r\n"
    return head.encode() + body


RESPONSE = response()


class Scripted(asyncio.Protocol):
    """One connection: counts whole requests and answers each."""

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
            self.received = self.received[size:]
            self.transport.write(RESPONSE)


def serve(pipe: Connection) -> None:
    """Send the server's URL, then its CPU seconds so far for every message, until the pipe ends."""
    asyncio.run(until_end(pipe))


async def until_end(pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def asked() -> None:
        try:
            pipe.recv()
            pipe.send(time.process_time())
        except EOFError:
            loop.remove_reader(pipe.fileno())
            ended.set_result(None)

    server = await loop.create_server(Scripted, "127.0.0.1", 0)
    loop.add_reader(pipe.fileno(), asked)
    pipe.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await ended
