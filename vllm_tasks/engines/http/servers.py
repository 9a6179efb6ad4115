"""The queue for all rows of an engine: a row gets the first server with a free slot, and waits while there
is none."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum

from vllm_tasks.engines.http.capacity import Capacity
from vllm_tasks.engines.http.control import Control, Served
from vllm_tasks.engines.http.failures import Full, Unreachable
from vllm_tasks.engines.http.urls import Endpoint
from vllm_tasks.errors import InvalidCall, ServerUnavailable
from vllm_tasks.rows import Request

logger = logging.getLogger(__name__)

LEAST_SEARCH = 1.0
"""The shortest search for a server in seconds, however short the grace period is."""
LEFT_ALONE = 1.0
"""Seconds without rows for a server that refused a connection, while others are there."""
PROBE_EVERY = 1.0
"""Seconds between two health checks of a server that may be down."""


class Template(Enum):
    """What is known of the chat template of the model that all servers serve."""

    UNASKED = "no server was asked"
    THERE = "a server reports one"
    ABSENT = "a server reports that there is none"
    UNREPORTED = "servers do not report it, and it is taken to be there"
    REFUSED = "it was taken to be there, and a row was refused for want of it"


@dataclass(eq=False)
class Server:
    """One server: its endpoint and what is known about it now."""

    endpoint: Endpoint
    capacity: Capacity
    model: str | None
    """The name for requests; None: not known yet."""
    is_identified: bool
    """Whether the model is known, or was looked up since the server was last lost."""
    owes: Request | None = None
    """A request that completed once and then failed when repeated: it must complete before any other."""
    avoid_until: float = 0.0
    well_until: float = 0.0
    proven: float = 0.0
    """When the last successful proof was sent: a request that had completed before, and completed again."""
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_there(self) -> bool:
        """Whether it may get rows, as far as is known."""
        return self.avoid_until <= time.monotonic()

    @property
    def is_trusted(self) -> bool:
        """Whether it may get rows without a check."""
        return self.is_identified and self.owes is None

    @property
    def has_free_slot(self) -> bool:
        """Whether a row may be sent now. While one row checks the server, no others are."""
        may_probe = self.is_trusted or not self.probing.locked()
        return self.is_there and may_probe and self.capacity.has_free_slot()


class Servers:
    """The servers of one engine, each with up to `most` slots.

    `model` is the name to use for all of them; None: each server is asked for its own. `prove` repeats a
    request that has completed before.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        model: str | None,
        control: Control,
        grace_period: float,
        most: int,
        prove: Callable[[Server, Request], Awaitable[None]],
    ) -> None:
        self._is_sure = model == "" or (model is not None and len(endpoints) == 1)
        self.all = [Server(e, Capacity(most), model, self._is_sure) for e in endpoints]
        self.model = model
        self.control = control
        self.grace_period = grace_period
        self.template = Template.UNASKED
        self.slots = most * len(endpoints)
        self.completed = 0
        self._prove = prove
        self._served: Served | None = None  # what all serve, from the first that reported it
        self._are_compared = len(endpoints) == 1
        self._is_structure_checked = False
        self._last_heartbeat = 0.0
        self._full_since: float | None = None
        self._last_error = ""  # the last error of a server that is down
        self._turn = asyncio.Lock()  # a queue: the first waiting row holds it
        self._given_up = 0.0  # when a search ended without a server
        self.news = asyncio.Event()
        """Set whenever a slot is released, or a server is lost or trusted again."""

    # ------------------------------------------------------------------ slots

    async def take_slot(self) -> Server:
        """Take a slot at a server, in order of arrival; `release` gives it back.

        If no server is there, the first waiting row searches for one for the grace period. If it finds none,
        `ServerUnavailable` is raised for this row and all rows that were waiting behind it.
        """
        came = time.monotonic()
        async with self._turn:
            if came < self._given_up:
                raise self.unavailable(self._last_error)
            while (server := self._free()) is None:
                await self._change()
            server.capacity.take_slot()
            return server

    def release(self, server: Server) -> None:
        """Give a slot back."""
        server.capacity.open -= 1
        self.news.set()

    def _free(self) -> Server | None:
        """The server with the fewest of our rows among those with a free slot."""
        free = [server for server in self.all if server.has_free_slot]
        return min(free, key=lambda server: server.capacity.open, default=None)

    async def _change(self) -> None:
        """Wait until a slot is released, a server may take more rows, or a server is found."""
        if not self.is_any_there:
            await self._find_any()
            return
        now = time.monotonic()
        dues = [due - now for s in self.all for due in (s.avoid_until, s.capacity.grows_at) if due > now]
        self.news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(min(dues, default=None)):
                await self.news.wait()

    # ------------------------------------------------------------------ servers that are down

    def lose(self, server: Server, why: str) -> None:
        """Send a server no rows for a while. It may come back with another model."""
        if server.is_there:  # else it is lost already
            server.avoid_until = time.monotonic() + LEFT_ALONE
            server.is_identified = self._is_sure
            self._last_error = why
            self.news.set()

    async def _find_any(self) -> None:
        """Return when any server can take rows. Raises `ServerUnavailable` after the grace period."""
        started = time.monotonic()
        urls = ", ".join(str(s.endpoint) for s in self.all)
        logger.warning("no server responds at %s; waiting up to %g s", urls, self.grace_period)
        searches = [*(self._watch(server) for server in self.all), self._slot_released()]
        watches = [asyncio.create_task(search) for search in searches]
        try:
            seconds = max(self.grace_period, LEAST_SEARCH)
            found, _ = await asyncio.wait(watches, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for watch in watches:
                watch.cancel()
        if not found:
            self._given_up = time.monotonic()
            raise self.unavailable(self._last_error)
        for watch in found:
            watch.result()
        logger.info("a server responds after %.1f s", time.monotonic() - started)

    async def _watch(self, server: Server) -> None:
        """Return when the server can take rows. Without /health, any response shows that it can."""
        while True:
            try:
                await self.control.check_health(server.endpoint)
                async with server.probing:
                    await self._trust(server)
            except (Unreachable, Full) as error:
                self._last_error = str(error)
                await asyncio.sleep(PROBE_EVERY)
            else:
                server.avoid_until = 0.0
                return

    async def _slot_released(self) -> None:
        """Return when a slot is released at a server that may be tried again, healthy or not."""
        while self._free() is None:
            self.news.clear()
            await self.news.wait()

    def unavailable(self, last: str) -> ServerUnavailable:
        """The error that ends a call after the grace period; `last` is the last error of a server."""
        return self._ended("no server responded", last, "start it, correct api_url")

    def overloaded(self, last: str) -> ServerUnavailable:
        """The error that ends a call whose rows have all been refused for load for the grace period."""
        return self._ended(
            "all rows were refused for load", last, "free the server, look at your quota there"
        )

    def _ended(self, what: str, last: str, way_out: str) -> ServerUnavailable:
        urls = ", ".join(str(s.endpoint) for s in self.all)
        return ServerUnavailable(
            f"{what} at {urls} for {self.grace_period:g} s (last: {last}); {way_out}, or wait longer with "
            "VLLM_TASKS_GRACE_PERIOD (seconds)"
        )

    def complete(self, server: Server, sent: float) -> None:
        """Record that a server has completed a row sent at `sent`, and so has capacity again."""
        self.completed += 1
        self.heartbeat()
        self._full_since = None
        server.capacity.complete(sent)

    def heartbeat(self) -> None:
        """Record that a server has completed a row or is working on one."""
        self._last_heartbeat = time.monotonic()

    @property
    def is_any_there(self) -> bool:
        """Whether any server may get rows, as far as is known."""
        return any(server.is_there for server in self.all)

    def is_grace_period_over(self, began: float) -> bool:
        """Whether all rows have been refused for load, and none completed or worked on, for the grace period
        and since `began`."""
        now = time.monotonic()
        if self._full_since is None or any(server.capacity.open for server in self.all):
            self._full_since = now
        return now - max(self._full_since, began) > self.grace_period

    def is_heartbeat_overdue(self, began: float) -> bool:
        """Whether no row has completed or been worked on for the grace period, nor since `began`."""
        return time.monotonic() - max(self._last_heartbeat, began) > self.grace_period

    # ------------------------------------------------------------------ servers that may be down

    async def check(self, server: Server) -> None:
        """Raise `Unreachable` if a server behind a gateway that reported an error is not healthy.

        At most one health check a second is sent, however many rows call this.
        """
        async with server.checking:
            _check_is_there(server)
            if server.well_until <= time.monotonic():
                await self.control.check_health(server.endpoint)
                server.well_until = time.monotonic() + PROBE_EVERY

    async def prove(self, server: Server, completed: Request) -> None:
        """Repeat a request that completed before. If it completes again, the failed rows are to blame.

        Raises `Unreachable`, `Full` or `InvalidCall` otherwise. One proof serves all rows that failed before
        it was sent.
        """
        failed = time.monotonic()
        async with self._probing(server):
            if server.proven <= failed:
                sent = time.monotonic()
                try:
                    await self._prove(server, completed)
                except Unreachable:
                    server.owes = completed
                    raise
                server.proven = sent

    async def trust(self, server: Server) -> None:
        """Check before a row is sent that the server has the same model as the others and completes rows.

        Raises the errors of `identify` and `prove`.
        """
        if not server.is_trusted:
            async with self._probing(server):
                await self._trust(server)

    async def _trust(self, server: Server) -> None:
        await self._identify(server)
        if server.owes is not None:
            await self._prove(server, server.owes)
            server.owes = None

    @asynccontextmanager
    async def _probing(self, server: Server) -> AsyncIterator[None]:
        """Hold the lock for checks of the server. Raises `Unreachable` if the last holder has lost it."""
        try:
            async with server.probing:
                _check_is_there(server)
                yield
        finally:
            self.news.set()

    # ------------------------------------------------------------------ what is served

    async def compare(self) -> None:
        """Raise `InvalidCall`, before the first row, if the servers that are up serve different models."""
        if not self._are_compared:
            await asyncio.gather(*(self._try_to_identify(server) for server in self.all if server.is_there))
            self._are_compared = True

    async def check_structure(self) -> None:
        """Raise `InvalidCall`, before the first row with them, if a server ignores `structured_outputs`."""
        if not self._is_structure_checked:
            await asyncio.gather(*(self.control.check_structure(server.endpoint) for server in self.all))
            self._is_structure_checked = True

    async def identify(self, server: Server) -> None:
        """Look up which model the server serves, unless that is known.

        Raises `InvalidCall` if it does not report its model, or serves several or another one than others;
        `Unreachable` if it cannot respond now.
        """
        if not server.is_identified:
            async with self._probing(server):
                await self._identify(server)

    async def _identify(self, server: Server) -> None:
        if not server.is_identified:
            if (served := await self.control.served(server.endpoint, self.model)) is not None:
                self._agree(served)
                server.model = self.model or served.model
            server.is_identified = True

    async def _try_to_identify(self, server: Server) -> bool:
        """Whether it is known which model the server serves; one that cannot respond now is lost."""
        try:
            await self.identify(server)
        except Unreachable as error:
            self.lose(server, str(error))
        return server.is_identified

    def _agree(self, served: Served) -> None:
        """Raise `InvalidCall` unless all servers report the same model. If the call names the model, only the
        name is compared, otherwise also the root."""
        first = self._served = self._served or served
        roots = {first.root, served.root} - {None} if self.model is None else ()
        if served.model == first.model and len(roots) <= 1:
            return
        self.forget_model()
        order = [server.endpoint for server in self.all]
        one, other = sorted((first, served), key=lambda each: order.index(each.endpoint))
        now = " now" if one.endpoint == other.endpoint else ""
        raise InvalidCall(
            f"{one.endpoint} serves {one}, and {other.endpoint} {other}{now}: all rows of a call must go to "
            "one model; correct api_url, or pass model='...' with a name that every server has"
        )

    def forget_model(self) -> None:
        """Have the models looked up again, because a server rejects or no longer reports the known one."""
        self._served, self.template = None, Template.UNASKED
        self._are_compared = len(self.all) == 1
        for server in self.all:
            server.model, server.is_identified = self.model, self._is_sure

    async def facts(self) -> dict[str, str]:
        """Facts that a server reports: its `model` name for requests and, where known, `root` (the model's
        own name or folder) and vLLM's `version`."""
        while True:
            server = await self.first_identified()
            assert server.model is not None
            facts = await self.control.facts(server.endpoint, server.model)
            if facts or server.is_there:  # else rows have lost it meanwhile
                return {"model": server.model, **facts}

    async def check_served(self, max_tokens: int | None) -> None:
        """See `Control.check_served`; asks one server."""
        server = await self.first_identified()
        assert server.model is not None
        with suppress(Unreachable):  # it was there a moment ago: rows would wait for it
            await self.control.check_served(server.endpoint, server.model, max_tokens)

    async def first_identified(self) -> Server:
        """A server that is there and whose model is known. It is waited for like a slot, for a row."""
        while True:
            await self.compare()
            server = next((server for server in self.all if server.is_there), None)
            if server is None:
                self.release(server := await self.take_slot())
            if await self._try_to_identify(server):
                return server


def _check_is_there(server: Server) -> None:
    """Raise `Unreachable` if the previous holder of the lock has lost the server."""
    if not server.is_there:
        raise Unreachable(f"{server.endpoint} does not respond")
