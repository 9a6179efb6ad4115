"""Engines in actors on a Ray cluster, local or elsewhere."""

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
"""Seconds beyond the host's own grace period, after which its actor is killed."""
CHECK_EVERY = 5.0
"""Seconds between two checks that this process is still in the cluster, since leaving it ends no wait."""
LONGEST_REASON = 1000
"""Characters of Ray's message that are kept."""


@dataclass(frozen=True)
class RayConfig:
    """vLLM's engine arguments and the options of Ray's actors, as JSON. Equal ones share their engines."""

    engine_args: str = field(repr=False)  # its hf_token is a secret
    options: str = field(repr=False)  # its environment may hold secrets
    address: str | None
    replicas: int
    start_timeout: float = field(compare=False)
    python: str = ""
    timeout: float = field(default=600.0, compare=False)
    worker_gpus: int = 0
    """GPUs that vLLM's own Ray executor requests, one for each of its workers, on any machines."""


class RayEngine:
    """An `Engine` of `replicas` actors. Each is restarted with its unfinished rows when it dies."""

    def __init__(self, config: RayConfig) -> None:
        self.config = config
        self.model: str = json.loads(config.engine_args)["model"]
        self._options: dict[str, Any] = json.loads(config.options)
        local = LocalConfig(config.engine_args, config.start_timeout, timeout=config.timeout)
        launch = partial(RayHost.launch, self._options, config.python, worker_gpus=config.worker_gpus)
        self._replicas = Replicas([LocalEngine(local, launch) for _ in range(config.replicas)])
        self._has_joined = False
        self._leaving: asyncio.Task[None] | None = None
        self.window = self._replicas.window

    @property
    def has_failed(self) -> bool:
        return self._replicas.has_failed

    @property
    def is_outdated(self) -> bool:
        """See `LocalEngine`; the files are those that this machine sees."""
        return self._replicas.is_outdated

    async def start(self) -> None:
        await cluster.join(self.config.address)
        self._has_joined = True
        # Ray leaves its cluster at exit too. Handlers that are registered after Ray's run before it.
        atexit.register(self._close_at_exit)
        try:
            amounts = actor.amounts_of(self._options)
            if self.config.worker_gpus:
                amounts["GPU"] = self.config.worker_gpus
            cluster.check_capacity(amounts, self.config.replicas)
            await self._replicas.start()
        except BaseException:
            await self.close()
            raise

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        try:
            await self._replicas.generate(requests, done)
        except EngineFailed:
            if self.has_failed:  # and will get no more rows
                await self.close()
            raise

    async def has_chat_template(self) -> bool:
        return await self._replicas.has_chat_template()

    async def close(self) -> None:
        if self._has_joined:
            self._has_joined = False
            atexit.unregister(self._close_at_exit)
            self._leaving = asyncio.create_task(self._leave())
        if self._leaving is not None:  # several failing chunks close, and all but one are cancelled
            await asyncio.shield(self._leaving)

    async def _leave(self) -> None:
        await self._replicas.close()
        await cluster.leave()

    def _close_at_exit(self) -> None:
        self._has_joined = False  # because Ray itself leaves its cluster at exit
        loop.run(self._replicas.close())


class RayHost:
    """A `Host` (of `engines.local.engine`) in an actor. Both ways, many frames travel at a time."""

    def __init__(self, model: str, options: Mapping[str, Any], worker_gpus: int) -> None:
        self.model = model
        self._actor, self._group = actor.make_actor(options, worker_gpus)
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
        python: str,
        arguments: Frame,
        timeout: float,  # noqa: ASYNC109
        worker_gpus: int = 0,
    ) -> tuple[RayHost, Frame]:
        """Start an actor with these options. Returns it when its engine is ready, with the engine's facts.

        `python` is the interpreter on the actor's machine that has vLLM; empty: the actor's own.
        `worker_gpus` is the number of GPUs that vLLM's own Ray executor requests.

        It may wait `timeout` seconds for resources of the cluster, and as long again to start. Raises
        `EngineFailed` or `InvalidCall` with Ray's or vLLM's reason; no actor remains then.
        """
        if not cluster.membership():
            raise EngineFailed(
                "this process has left its Ray cluster, and the engine with it", temporary=True
            )
        started = time.monotonic()
        host = cls(str(arguments["model"]), options, worker_gpus)
        try:
            facts = await host._started(options, python, arguments, timeout)
        except BaseException:
            await host.end(grace=END_GRACE)
            raise
        logger.info("vLLM is ready for %r after %.1f s", host.model, time.monotonic() - started)
        return host, facts

    async def _started(
        self,
        options: Mapping[str, Any],
        python: str,
        arguments: Frame,
        timeout: float,  # noqa: ASYNC109
    ) -> Frame:
        needs = actor.amounts_of(options) or "no resources"
        location = await self._within(timeout, f"Ray (it needs {needs})", self._actor.location.remote())
        self._is_placed = True
        logger.info("starting vLLM for %r on Ray (%s)", self.model, location)
        # The host applies the timeout itself, and then reports what vLLM was doing.
        outcome = await self._within(
            timeout + CLOSE_GRACE, f"vLLM ({location})", self._actor.start.remote(arguments, timeout, python)
        )
        if "failed" in outcome:
            raise EngineFailed(outcome["failed"])
        facts: Frame = outcome["ready"]
        return facts

    async def read(self) -> Frame:
        """Wait for the next frame; it is empty if the actor has ended."""
        from ray.exceptions import RayError

        while not self._came:
            try:
                self._came.extend(await self._taken())
            except RayError as error:
                self._lost = self._lost or words_of(error)
                return {}
            if not self._came:
                self._lost = "this process has left its Ray cluster"
                return {}
        return self._came.popleft()

    def write(self, frame: Frame) -> None:
        """Send a frame. Frames written while earlier ones travel are sent together."""
        self._going.append(frame)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())

    def why(self, reason: str) -> str:
        return reason or self._lost or "its actor was lost"

    async def end(self, grace: float = CLOSE_GRACE + END_GRACE) -> None:
        """End the engine orderly, after `grace` seconds by force, and release the actor's resources."""
        import ray

        if self._sender is not None:
            self._sender.cancel()
        if not self._is_member():  # Ray ended the actor when this process left
            return
        try:
            if self._is_placed:
                await asyncio.wait_for(self._actor.end.remote(), grace)
        except (ray.exceptions.RayError, TimeoutError) as error:
            logger.debug("the actor of %r did not end orderly: %s", self.model, error)
        finally:  # also when cancelled
            ray.kill(self._actor)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)

    async def _taken(self) -> list[Frame]:
        """Wait for frames and return all that have arrived; none if this process has left the cluster."""
        if not self._is_member():
            return []
        coming: asyncio.Future[list[Frame]] = asyncio.ensure_future(self._actor.take.remote())
        try:
            while not (await asyncio.wait({coming}, timeout=CHECK_EVERY))[0]:
                if not self._is_member():
                    return []
            return coming.result()
        finally:
            coming.cancel()

    async def _send(self) -> None:
        import ray
        from ray.exceptions import RayError

        while self._going and self._is_member():
            frames, self._going = self._going, []
            try:
                await self._actor.put.remote(frames)
            except RayError as error:
                self._lost = words_of(error)
                if self._is_member():
                    ray.kill(self._actor)  # else, if it lives, these rows wait until it seems to hang
                return  # `read` reports that the actor has ended

    def _is_member(self) -> bool:
        """Whether this process is still in the actor's cluster. A call from outside would start a new Ray."""
        return cluster.membership() == self._membership

    async def _within(self, seconds: float, what: str, awaited: Awaitable[T]) -> T:
        """Wait for a result of Ray up to `seconds`. Logs every few seconds `what` it waits for."""
        from ray.exceptions import RayError

        def report(waited: float) -> None:
            logger.info("%r has waited %.0f s for %s", self.model, waited, what)

        try:
            return await within(seconds, awaited, report)
        except TimeoutError:
            raise EngineFailed(
                f"{self.model!r} waited {seconds:.0f} s (VLLM_TASKS_ENGINE_START_TIMEOUT) for {what}; "
                "request less in ray_config, use fewer replicas, or wait until the cluster is free",
                temporary=True,
            ) from None
        except RayError as error:
            raise EngineFailed(f"Ray could not start {self.model!r}: {words_of(error)}") from error


def words_of(error: Exception) -> str:
    """The reason in Ray's message: the error of a traceback, or how the actor's process ended."""
    text = str(error)
    if found := REASON.findall(text):
        return str(found[-1])[:LONGEST_REASON]
    reasons = [line for line in text.splitlines() if "dead because" in line or "exit detail" in line]
    return " ".join(reasons or text.splitlines())[:LONGEST_REASON]
