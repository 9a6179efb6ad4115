"""A scripted server of a known capacity, and what it does with requests beyond it, in a child.

`slots` requests are worked on at once, each for `service` seconds: it can answer `slots / service` a second.
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
    """What a server is able to do, and what it does with more.

    `beyond`: the status for requests beyond its slots, 0: they wait for one. `retry_after` comes with it:
    seconds or, as `date`, the HTTP date of two seconds later. After `outage_after` answers it is out for
    `outage` seconds: it says `outage_status` to all but health checks, 0: it breaks and refuses connections.
    Before that, it is `deaf` to all requests for some seconds. To request number `hangs` it never answers.
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
        """Answers a second, at most."""
        return self.slots / self.service


@dataclass
class Seen:
    """What a server saw: requests for answers, refusals, and when it answered (seconds, any origin).

    `back` is when the outage ended.
    """

    requests: int = 0
    refused: int = 0
    answered: list[float] = field(default_factory=list)
    back: float = 0.0


class Limited:
    """The server behind all connections."""

    def __init__(self, limits: Limits, seen: Seen) -> None:
        self.limits, self.seen = limits, seen
        self.working = 0
        self.queue: deque[LimitedConnection] = deque()
        self.connections: set[LimitedConnection] = set()
        self.is_out = self.is_deaf = False
        self.go_out: Callable[[], None] = lambda: None

    def take(self, connection: LimitedConnection) -> None:
        """Work on a request, or let it wait, or refuse it."""
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
        if (
            connection in self.connections and not self.is_deaf
        ):  # else its client has left, as after a timeout
            connection.transport.write(RESPONSE)
            self.seen.answered.append(time.monotonic())
        if self.limits.outage and not self.seen.back and len(self.seen.answered) >= self.limits.outage_after:
            self.seen.back = time.monotonic() + self.limits.deaf + self.limits.outage
            self.go_out()
        while self.queue:
            following = self.queue.popleft()
            if following in self.connections:
                self.seen.requests -= 1  # it has been counted
                self.take(following)
                return


class LimitedConnection(Scripted):
    """One connection: hands whole requests over, one at a time as clients send them."""

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
    """Send the server's URL, then what it has `Seen` for every message, until the pipe ends."""
    asyncio.run(until_end(pipe, limits))


async def until_end(pipe: Connection, limits: Limits) -> None:
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    seen = Seen()
    server = Limited(limits, seen)
    kept: set[asyncio.Task[None]] = set()

    def asked() -> None:
        try:
            pipe.recv()
            pipe.send(replace(seen, answered=list(seen.answered)))
        except EOFError:
            loop.remove_reader(pipe.fileno())
            ended.set_result(None)

    listening = await loop.create_server(partial(LimitedConnection, server), "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]

    async def be_out() -> None:
        nonlocal listening
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
    loop.add_reader(pipe.fileno(), asked)
    pipe.send(f"http://127.0.0.1:{port}")
    await ended
