"""One queue for the rows of an engine: a row gets the first server that has a place, and waits for one
when none is there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from vllm_tasks.engines.http.capacity import Capacity
from vllm_tasks.engines.http.control import Control, Served
from vllm_tasks.engines.http.failures import Full, Unreachable
from vllm_tasks.errors import InvalidCall, ServerUnavailable
from vllm_tasks.rows import Request

logger = logging.getLogger(__name__)

LEAST_SEARCH = 1.0
"""Seconds that servers have to answer a search, however short the grace period is."""
LEFT_ALONE = 1.0
"""Seconds that a server which refused a connection gets no rows while others are there."""
PROBE_EVERY = 1.0
"""Seconds between two health checks of a server that is in doubt."""


@dataclass(eq=False)
class Server:
    """One server: its base URL and what this process knows of it now."""

    url: str
    capacity: Capacity
    model: str | None
    """To be named in requests; None: it has to be asked."""
    is_asked: bool
    """Whether it need not be asked what it serves, or has been since it was away."""
    owes: Request | None = None
    """One that it had answered and failed when it was asked again: it must be answered before any other."""
    avoid_until: float = 0.0
    well_until: float = 0.0
    proven: float = 0.0
    """When a request was sent that had been answered before, and was again."""
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    checking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_there(self) -> bool:
        """Whether it may get rows, as far as we know."""
        return self.avoid_until <= time.monotonic()

    @property
    def is_trusted(self) -> bool:
        """Whether it need not be asked anything before a row."""
        return self.is_asked and self.owes is None

    @property
    def has_place(self) -> bool:
        """Whether a row may go there now; while one finds out whether it is to be trusted, no others."""
        may_ask = self.is_trusted or not self.asking.locked()
        return self.is_there and may_ask and self.capacity.has_place()


class Servers:
    """The servers of one engine, each with room for `most` rows.

    `model` is the name to use for all; None: each server is asked for its own. `prove` asks a server again
    for what was answered before.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None,
        control: Control,
        grace_period: float,
        most: int,
        prove: Callable[[Server, Request], Awaitable[None]],
    ) -> None:
        self._is_sure = model == "" or (model is not None and len(urls) == 1)
        self.all = [Server(url, Capacity(most), model, self._is_sure) for url in urls]
        self.model = model
        self.control = control
        self.grace_period = grace_period
        self.has_chat_template: bool | None = None  # of the model that all serve; None: not asked yet
        self.places = most * len(urls)
        self.answers = 0
        self._prove = prove
        self._served: Served | None = None  # what all serve, from the first that told it
        self._are_compared = len(urls) == 1
        self._heard = 0.0
        self._full_since: float | None = None
        self._ailment = ""  # what was heard last of a server that is not there
        self._turn = asyncio.Lock()  # a queue: of the rows that wait, the first one has it
        self._given_up = 0.0  # when a search ended without a server
        self.news = asyncio.Event()
        """Set whenever a place is given back, or a server lost or trusted again."""

    # ------------------------------------------------------------------ places

    async def place(self) -> Server:
        """A place at a server, first come, first served; `leave` gives it back.

        The first row that waits looks for a server when none is there, for the grace period. Raises
        `ServerUnavailable` when it finds none, to it and to all that were waiting behind it.
        """
        came = time.monotonic()
        async with self._turn:
            if came < self._given_up:
                raise self.unavailable(self._ailment)
            while (server := self._free()) is None:
                await self._change()
            server.capacity.open += 1
            return server

    def leave(self, server: Server) -> None:
        """Give a place back."""
        server.capacity.open -= 1
        self.news.set()

    def _free(self) -> Server | None:
        """Of the servers with a place that with the fewest rows of ours."""
        free = [server for server in self.all if server.has_place]
        return min(free, key=lambda server: server.capacity.open, default=None)

    async def _change(self) -> None:
        """Wait until a place is given back, a server may take more, or one is found."""
        if not self.is_any_there:
            await self._find_any()
            return
        now = time.monotonic()
        dues = [due - now for s in self.all for due in (s.avoid_until, s.capacity.grows_at) if due > now]
        self.news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(min(dues, default=None)):
                await self.news.wait()

    # ------------------------------------------------------------------ servers that are away

    def lose(self, server: Server, why: str) -> None:
        """Leave a server alone for a while; it may come back with another model."""
        if server.is_there:  # else others have lost it already
            server.avoid_until = time.monotonic() + LEFT_ALONE
            server.is_asked = self._is_sure
            self._ailment = why
            self.news.set()

    async def _find_any(self) -> None:
        """Return when some server is able to answer."""
        started = time.monotonic()
        urls = ", ".join(s.url for s in self.all)
        logger.warning("no server answers at %s; waiting up to %g s", urls, self.grace_period)
        looks = [*(self._watch(server) for server in self.all), self._comes_free()]
        watches = [asyncio.create_task(look) for look in looks]
        try:
            seconds = max(self.grace_period, LEAST_SEARCH)
            found, _ = await asyncio.wait(watches, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for watch in watches:
                watch.cancel()
        if not found:
            self._given_up = time.monotonic()
            raise self.unavailable(self._ailment)
        for watch in found:
            watch.result()
        logger.info("a server answers after %.1f s", time.monotonic() - started)

    async def _watch(self, server: Server) -> None:
        """Return when the server is able to answer; one without /health is when it answers."""
        while True:
            try:
                await self.control.check_health(server.url)
                async with server.asking:
                    await self._trust(server)
            except (Unreachable, Full) as error:
                self._ailment = str(error)
                await asyncio.sleep(PROBE_EVERY)
            else:
                server.avoid_until = 0.0
                return

    async def _comes_free(self) -> None:
        """Return when a row leaves a server that may be tried again, whatever it says of its health."""
        while self._free() is None:
            self.news.clear()
            await self.news.wait()

    def unavailable(self, last: str) -> ServerUnavailable:
        """What ends a call after the grace period; `last` is what was heard last."""
        urls = ", ".join(s.url for s in self.all)
        return ServerUnavailable(
            f"no server answered at {urls} for {self.grace_period:g} s (last: {last}); start it, "
            "correct api_url, or wait longer with VLLM_TASKS_GRACE_PERIOD (seconds)"
        )

    def answer(self, server: Server, sent: float) -> None:
        """A server has dealt with a row that was sent at `sent`, and so has room again."""
        self.answers += 1
        self.hear()
        self._full_since = None
        server.capacity.answer(sent)

    def hear(self) -> None:
        """A server has answered a row, or works on one."""
        self._heard = time.monotonic()

    @property
    def is_any_there(self) -> bool:
        """Whether rows may go anywhere, as far as we know."""
        return any(server.is_there for server in self.all)

    def is_grace_period_over(self, began: float) -> bool:
        """Whether for the grace period, and since `began`, no row has been answered or worked on, but all
        were refused for load."""
        now = time.monotonic()
        if self._full_since is None or any(server.capacity.open for server in self.all):
            self._full_since = now
        return now - max(self._full_since, began) > self.grace_period

    def is_silent_since(self, began: float) -> bool:
        """Whether no row has been answered or worked on for the grace period, nor since `began`."""
        return time.monotonic() - max(self._heard, began) > self.grace_period

    # ------------------------------------------------------------------ servers in doubt

    async def check(self, server: Server) -> None:
        """Raise `Unreachable` when a server that a gateway gives no answer from is not healthy.

        One health check a second at most, however many rows ask.
        """
        async with server.checking:
            _stays(server)
            if server.well_until <= time.monotonic():
                await self.control.check_health(server.url)
                server.well_until = time.monotonic() + PROBE_EVERY

    async def prove(self, server: Server, answered: Request) -> None:
        """Return where the server answers again what was answered before: failures are the rows' own.

        Raises `Unreachable`, `Full` or `InvalidCall` where it does not. One proof serves all rows that failed
        before it was sent.
        """
        failed = time.monotonic()
        async with self._alone(server):
            if server.proven <= failed:
                sent = time.monotonic()
                try:
                    await self._prove(server, answered)
                except Unreachable:
                    server.owes = answered
                    raise
                server.proven = sent

    async def trust(self, server: Server) -> None:
        """Before a row is sent: see that the server serves what the others do, and fails not everything.

        Raises as `know` and `prove`.
        """
        if not server.is_trusted:
            async with self._alone(server):
                await self._trust(server)

    async def _trust(self, server: Server) -> None:
        await self._know(server)
        if server.owes is not None:
            await self._prove(server, server.owes)
            server.owes = None

    @asynccontextmanager
    async def _alone(self, server: Server) -> AsyncIterator[None]:
        """Put the server to the test as the only one; raises `Unreachable` where others have lost it."""
        try:
            async with server.asking:
                _stays(server)
                yield
        finally:
            self.news.set()

    # ------------------------------------------------------------------ what is served

    async def compare(self) -> None:
        """Before the first row: raise `InvalidCall` where those that are there serve different models."""
        if not self._are_compared:
            await asyncio.gather(*(self._is_known(server) for server in self.all if server.is_there))
            self._are_compared = True

    async def know(self, server: Server) -> None:
        """Ask what the server serves, unless that is known.

        Raises `InvalidCall` when it refuses to tell its model, or serves several or another one than others;
        `Unreachable` when it cannot tell now.
        """
        if not server.is_asked:
            async with self._alone(server):
                await self._know(server)

    async def _know(self, server: Server) -> None:
        if not server.is_asked:
            if (served := await self.control.served(server.url, self.model)) is not None:
                self._agree(served)
                server.model = self.model or served.model
            server.is_asked = True

    async def _is_known(self, server: Server) -> bool:
        """Whether it is known what the server serves; one that cannot tell now is lost."""
        try:
            await self.know(server)
        except Unreachable as error:
            self.lose(server, str(error))
        return server.is_asked

    def _agree(self, served: Served) -> None:
        """Raise `InvalidCall` unless all that were asked serve the same; of a model that is named, its name
        counts, else its root too."""
        first = self._served = self._served or served
        roots = {first.root, served.root} - {None} if self.model is None else ()
        if served.model == first.model and len(roots) <= 1:
            return
        self.forget_model()
        order = [server.url for server in self.all]
        one, other = sorted((first, served), key=lambda each: order.index(each.url))
        now = " now" if one.url == other.url else ""
        raise InvalidCall(
            f"{one.url} serves {one}, and {other.url} {other}{now}: all rows of a call are answered by one "
            "model; correct api_url, or pass model='...' with a name that every server has"
        )

    def forget_model(self) -> None:
        """Ask anew what is served: a server does not know the model that was told, or tells another one."""
        self._served = self.has_chat_template = None
        self._are_compared = len(self.all) == 1
        for server in self.all:
            server.model, server.is_asked = self.model, self._is_sure

    async def facts(self) -> dict[str, str]:
        """What a server tells: `model` as it is to be asked for; `root` (the model's own name or folder)
        and `version` (vLLM's) where it tells them."""
        while True:
            await self.compare()
            server = next((server for server in self.all if server.is_there), None)
            if server is None:
                self.leave(server := await self.place())
            if await self._is_known(server):
                model = server.model
                assert model is not None
                told = await self.control.facts(server.url, model)
                if told or server.is_there:  # else rows have found out meanwhile that it is away
                    return {"model": model, **told}


def _stays(server: Server) -> None:
    """Raise `Unreachable` where the row before us at a lock has found out that it is away."""
    if not server.is_there:
        raise Unreachable(f"{server.url} does not answer")
