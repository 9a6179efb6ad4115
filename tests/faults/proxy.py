"""A proxy in front of a server that damages responses as networks and gateways do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Self

DRIP = 0.01
"""Seconds between two bytes."""
LATER = 0.005
"""Seconds until the second copy of an answer."""
FAULTS = ("reset", "black hole", "slow drip", "half a body", "duplicate answer")


class Proxy:
    """Forwards everything, but treats some of the responses by `faults`.

    `to`: a port of 127.0.0.1, or the path of a socket.
    """

    def __init__(self, to: int | str, chance: random.Random, share: float, *faults: str) -> None:
        self.share = share
        self.faults = faults
        self.done: list[str] = []
        """The faults there were, in order."""
        self._to = to
        self._chance = chance
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._connections: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(20)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        own = asyncio.current_task()
        assert own is not None
        self._connections.add(own)
        try:
            await self._relay(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(own)
            writer.close()

    async def _relay(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await (
            asyncio.open_unix_connection(self._to)
            if isinstance(self._to, str)
            else asyncio.open_connection("127.0.0.1", self._to)
        )
        asking = asyncio.create_task(passed(client, to_server))
        try:
            while answer := await server.read(2**20):
                deed = self._deed()
                if not await deed(answer, to_client):
                    return
        finally:
            asking.cancel()
            await asyncio.wait({asking})
            to_server.close()

    def _deed(self) -> Callable[[bytes, asyncio.StreamWriter], Awaitable[bool]]:
        """The treatment of the next response."""
        if self._chance.random() >= self.share:
            return whole
        fault = self._chance.choice(self.faults)
        self.done.append(fault)
        return DEEDS[fault]


async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Forward everything to the end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(2**20):
            writer.write(data)
            await writer.drain()
        writer.close()


async def whole(answer: bytes, writer: asyncio.StreamWriter) -> bool:
    """Forward the response unchanged; returns whether the connection stays open."""
    writer.write(answer)
    await writer.drain()
    return True


async def reset(_: bytes, writer: asyncio.StreamWriter) -> bool:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    return False


async def black_hole(_: bytes, writer: asyncio.StreamWriter) -> bool:
    """Send nothing more until the client closes the connection."""
    while not writer.transport.is_closing():  # noqa: ASYNC110 - nothing tells
        await asyncio.sleep(0.02)
    return False


async def slow_drip(answer: bytes, writer: asyncio.StreamWriter) -> bool:
    for i in range(len(answer)):
        if writer.transport.is_closing():
            return False
        writer.write(answer[i : i + 1])
        await asyncio.sleep(DRIP)
    return True


async def half_a_body(answer: bytes, writer: asyncio.StreamWriter) -> bool:
    """Send the head and a part of the body, and end in order."""
    writer.write(answer[: -max(1, len(answer.partition(b"\r\n\r\n")[2]) // 2)])
    await writer.drain()
    return False


async def duplicate(answer: bytes, writer: asyncio.StreamWriter) -> bool:
    """Send the response twice; the copy may come when the next request is in flight."""
    writer.write(answer)
    await asyncio.sleep(LATER)
    writer.write(answer)
    await writer.drain()
    return True


DEEDS = {
    "reset": reset,
    "black hole": black_hole,
    "slow drip": slow_drip,
    "half a body": half_a_body,
    "duplicate answer": duplicate,
}
