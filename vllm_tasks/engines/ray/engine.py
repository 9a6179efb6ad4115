"""Engines as actors on a Ray cluster, of this machine or elsewhere."""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from vllm_tasks.engines import Done, loop
from vllm_tasks.engines.local.engine import LocalConfig, LocalEngine
from vllm_tasks.engines.local.process import CLOSE_GRACE, REASON, within
from vllm_tasks.engines.ray import actor, cluster
from vllm_tasks.engines.ray.replicas import Replicas
from vllm_tasks.engines.session import Frame
from vllm_tasks.errors import EngineFailed
from vllm_tasks.rows import Request

logger = logging.getLogger(__name__)

T = TypeVar("T")

END_GRACE = 5.0
"""Seconds more than the host itself takes to end in order; then its actor is killed."""
LOOK_EVERY = 5.0
"""Seconds between two looks at whether this process is still in the cluster: leaving ends no wait."""
LONGEST_REASON = 1000
"""Characters of Ray's words that are passed on."""


@dataclass(frozen=True)
class RayConfig:
    """vLLM's engine arguments and the options of Ray's actors, as JSON; equal ones share their engines."""

    engine_args: str = field(repr=False)  # its hf_token is a secret
    options: str = field(repr=False)  # its environment may hold secrets
    address: str | None
    replicas: int
    start_timeout: float = field(compare=False)
    timeout: float = field(default=600.0, compare=False)


class RayEngine:
    """An `Engine` of `replicas` actors; each is restarted when it dies, with its unfinished rows."""

    def __init__(self, config: RayConfig) -> None:
        self.config = config
        self._options: dict[str, Any] = json.loads(config.options)
        local = LocalConfig(config.engine_args, config.start_timeout, timeout=config.timeout)
        launch = partial(RayHost.launch, self._options)
        self._replicas = Replicas([LocalEngine(local, launch) for _ in range(config.replicas)])
        self._has_joined = False
        self._leaving: asyncio.Task[None] | None = None
        self.window = self._replicas.window

    @property
    def has_failed(self) -> bool:
        return self._replicas.has_failed

    async def start(self) -> None:
        await cluster.join(self.config.address)
        self._has_joined = True
        # Ray leaves its cluster at exit, too; what is registered after Ray comes before it.
        atexit.register(self._close_at_exit)
        try:
            cluster.check_room(actor.amounts_of(self._options), self.config.replicas)
            await self._replicas.start()
        except BaseException:
            await self.close()
            raise

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        try:
            await self._replicas.generate(requests, done)
        except EngineFailed:
            if self.has_failed:  # and will not be asked again
                await self.close()
            raise

    async def has_chat_template(self) -> bool:
        return await self._replicas.has_chat_template()

    async def close(self) -> None:
        if self._has_joined:
            self._has_joined = False
            atexit.unregister(self._close_at_exit)
            self._leaving = asyncio.create_task(self._leave())
        if self._leaving is not None:  # several rows that fail close, and all but one of them are cancelled
            await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        await self._replicas.close()
        await cluster.leave()

    def _close_at_exit(self) -> None:
        self._has_joined = False  # Ray itself leaves its cluster now
        loop.run(self._replicas.close())


class RayHost:
    """A `Host` (of `engines.local.engine`) in an actor. Frames travel many at a time, both ways."""

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        self.model = model
        self._actor, self._group = actor.make_actor(options)
        self._membership = cluster.membership()
        self._is_placed = False
        self._came: deque[Frame] = deque()
        self._going: list[Frame] = []
        self._sender: asyncio.Task[None] | None = None
        self._lost = ""

    @classmethod
    async def launch(
        cls,
        options: Mapping[str, Any],
        arguments: Frame,
        timeout: float,  # noqa: ASYNC109
    ) -> tuple[RayHost, Frame]:
        """An actor with these options whose engine is ready, and the facts of the engine.

        It may wait `timeout` seconds for its place in the cluster, and as long again to start. Raises
        `EngineFailed` or `InvalidCall` with Ray's or vLLM's reason; nothing is left behind then.
        """
        if not cluster.membership():
            raise EngineFailed(
                "this process has left its Ray cluster, and the engine with it", temporary=True
            )
        started = time.monotonic()
        host = cls(str(arguments["model"]), options)
        try:
            facts = await host._started(options, arguments, timeout)
        except BaseException:
            await host.end(grace=END_GRACE)
            raise
        logger.info("vLLM is ready for %r after %.1f s", host.model, time.monotonic() - started)
        return host, facts

    async def _started(
        self,
        options: Mapping[str, Any],
        arguments: Frame,
        timeout: float,  # noqa: ASYNC109
    ) -> Frame:
        asked = actor.amounts_of(options) or "nothing but a place"
        place = await self._within(timeout, f"Ray, of which it asks {asked}", self._actor.place.remote())
        self._is_placed = True
        logger.info("starting vLLM for %r on Ray (%s)", self.model, place)
        # The host keeps to the timeout itself, and says then what vLLM was doing.
        told = await self._within(
            timeout + CLOSE_GRACE, f"vLLM ({place})", self._actor.start.remote(arguments, timeout)
        )
        if "failed" in told:
            raise EngineFailed(told["failed"])
        facts: Frame = told["ready"]
        return facts

    async def read(self) -> Frame:
        """The next frame; an empty one when the actor is gone."""
        from ray.exceptions import RayError

        while not self._came:
            try:
                self._came.extend(await self._taken())
            except RayError as error:
                self._lost = words_of(error)
                return {}
            if not self._came:
                self._lost = "this process has left its Ray cluster"
                return {}
        return self._came.popleft()

    def write(self, frame: Frame) -> None:
        """Send a frame, together with all that are written until those before have arrived."""
        self._going.append(frame)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())

    def why(self, reason: str) -> str:
        return reason or self._lost or "its actor was lost"

    async def end(self, grace: float = CLOSE_GRACE + END_GRACE) -> None:
        """End the engine in order, after `grace` seconds by force; the actor gives its place back."""
        import ray

        if self._sender is not None:
            self._sender.cancel()
        if not self._is_member():  # Ray has ended the actor when this process left
            return
        try:
            if self._is_placed:
                await asyncio.wait_for(self._actor.end.remote(), grace)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.debug("the actor of %r did not end in order: %s", self.model, error)
        finally:  # also when nobody has time to wait for its order
            ray.kill(self._actor)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)

    async def _taken(self) -> list[Frame]:
        """All that has come, at least one frame; none when this process has left the cluster."""
        if not self._is_member():
            return []
        coming: asyncio.Future[list[Frame]] = asyncio.ensure_future(self._actor.take.remote())
        try:
            while not (await asyncio.wait({coming}, timeout=LOOK_EVERY))[0]:
                if not self._is_member():
                    return []
            return coming.result()
        finally:
            coming.cancel()

    async def _send(self) -> None:
        from ray.exceptions import RayError

        while self._going and self._is_member():
            frames, self._going = self._going, []
            try:
                await self._actor.put.remote(frames)
            except RayError:
                return  # `read` says that it is gone

    def _is_member(self) -> bool:
        """Whether this process is still in the actor's cluster; a call from outside would start a new Ray."""
        return cluster.membership() == self._membership

    async def _within(self, seconds: float, what: str, awaited: Awaitable[T]) -> T:
        """What Ray gives, within `seconds`; says every few seconds what is waited for."""
        from ray.exceptions import RayError

        def say(waited: float) -> None:
            logger.info("%r has waited %.0f s for %s", self.model, waited, what)

        try:
            return await within(seconds, awaited, say)
        except TimeoutError:
            raise EngineFailed(
                f"{self.model!r} waited {seconds:.0f} s (VLLM_TASKS_ENGINE_START_TIMEOUT) for {what}; "
                "ask for less in ray_config, for fewer replicas, or wait until the cluster is free",
                temporary=True,
            ) from None
        except RayError as error:
            raise EngineFailed(f"Ray could not start {self.model!r}: {words_of(error)}") from error


def words_of(error: Exception) -> str:
    """The part of Ray's words that tells why: the error of a traceback, or the end of the actor's process."""
    text = str(error)
    if found := REASON.findall(text):
        return str(found[-1])[:LONGEST_REASON]
    telling = [line for line in text.splitlines() if "dead because" in line or "exit detail" in line]
    return " ".join(telling or text.splitlines())[:LONGEST_REASON]
