"""A scripted server of known capacity in a child process, with a behaviour for requests beyond the capacity.

It works on `slots` requests at once, each for `service` seconds, so it completes `slots / service` a second.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection

from benchmarks.scripted import RESPONSE, Scripted, refusal

FINE = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


@dataclass(frozen=True)
class Limits:
    """A server's capacity, and its behaviour beyond the capacity.

    `beyond` is the status for requests beyond its slots; with 0 they wait for a slot. `retry_after` is sent
    with it: seconds or, as `date`, the HTTP date of two seconds later. After `outage_after` completed
    requests it is out for `outage` seconds: it returns `outage_status` to all but health checks; with 0 it
    breaks and refuses connections. Before the outage it ignores all requests for `deaf` seconds. It never
    completes request number `hangs`.
    """

    slots: int
    service: float
    beyond: int = 429
    retry_after: str = ""
    outage_after: int = 0
    outage: float = 0.0
    outage_status: int = 503
    deaf: float = 0.0
    hangs: int = 0

    @property
    def capacity(self) -> float:
        """Completed requests a second, at most."""
        return self.slots / self.service


@dataclass
class Seen:
    """A server's counts of requests and refusals, and its times of completed requests (seconds, any origin).

    `back` is the time at which the outage ended.
    """

    requests: int = 0
    refused: int = 0
    completed: list[float] = field(default_factory=list)
    back: float = 0.0


class Limited:
    """The server that all connections share."""

    def __init__(self, limits: Limits, seen: Seen) -> None:
        self.limits, self.seen = limits, seen
        self.working = 0
        self.queue: deque[LimitedConnection] = deque()
        self.connections: set[LimitedConnection] = set()
        self.is_out = self.is_deaf = False
        self.go_out: Callable[[], None] = lambda: None

    def take(self, connection: LimitedConnection) -> None:
        """Work on a request, queue it, or refuse it."""
        self.seen.requests += 1
        if self.is_deaf or self.seen.requests == self.limits.hangs:
            return
        if self.is_out:
            self.refuse(connection, self.limits.outage_status)
        elif self.working < self.limits.slots:
            self.working += 1
            asyncio.get_running_loop().call_later(self.limits.service, self.done, connection)
        elif self.limits.beyond:
            self.refuse(connection, self.limits.beyond)
        else:
            self.queue.append(connection)

    def refuse(self, connection: LimitedConnection, status: int) -> None:
        self.seen.refused += 1
        after = self.limits.retry_after
        if after == "date":
            after = email.utils.formatdate(time.time() + 2, usegmt=True)
        connection.transport.write(refusal(status, *([f"retry-after: {after}"] if after else [])))

    def done(self, connection: LimitedConnection) -> None:
        self.working -= 1
        # A client that has left, for example after a timeout, gets no response.
        if connection in self.connections and not self.is_deaf:
            connection.transport.write(RESPONSE)
            self.seen.completed.append(time.monotonic())
        if self.limits.outage and not self.seen.back and len(self.seen.completed) >= self.limits.outage_after:
            self.seen.back = time.monotonic() + self.limits.deaf + self.limits.outage
            self.go_out()
        while self.queue:
            following = self.queue.popleft()
            if following in self.connections:
                self.seen.requests -= 1  # it was counted before
                self.take(following)
                return


class LimitedConnection(Scripted):
    """One connection: passes complete requests on, one at a time as clients send them."""

    def __init__(self, server: Limited) -> None:
        super().__init__(0.0)
        self.server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.server.connections.add(self)

    def connection_lost(self, _: Exception | None) -> None:
        self.server.connections.discard(self)

    def answer(self, request: bytes) -> None:
        if request.startswith(b"GET"):
            self.transport.write(FINE)
        else:
            self.server.take(self)


def serve(pipe: Connection, limits: Limits) -> None:
    """Send the server's URL, then its `Seen` for every message, until the pipe ends."""
    asyncio.run(until_end(pipe, limits))


async def until_end(pipe: Connection, limits: Limits) -> None:
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    seen = Seen()
    server = Limited(limits, seen)
    kept: set[asyncio.Task[None]] = set()

    def report() -> None:
        try:
            pipe.recv()
            pipe.send(replace(seen, completed=list(seen.completed)))
        except EOFError:
            loop.remove_reader(pipe.fileno())
            ended.set_result(None)

    listening = await loop.create_server(partial(LimitedConnection, server), "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]

    async def be_out() -> None:
        nonlocal listening
        if limits.deaf:
            server.is_deaf = True
            await asyncio.sleep(limits.deaf)
        server.is_deaf, server.is_out = False, True
        if not limits.outage_status:
            listening.close()
            for connection in list(server.connections):
                connection.transport.abort()
        await asyncio.sleep(limits.outage)
        if not limits.outage_status:
            listening = await loop.create_server(partial(LimitedConnection, server), "127.0.0.1", port)
        server.is_out = False

    server.go_out = lambda: kept.add(loop.create_task(be_out()))
    loop.add_reader(pipe.fileno(), report)
    pipe.send(f"http://127.0.0.1:{port}")
    await ended
