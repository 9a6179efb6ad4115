"""A host on some machine of a Ray cluster: the actor that holds it, and our way to the actor."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
from collections import deque
from collections.abc import Awaitable
from typing import Any, TypeVar

from vllm_tasks.engines import cluster
from vllm_tasks.engines.host import Frame
from vllm_tasks.engines.process import CLOSE_GRACE, REASON, SAY_EVERY, HostProcess
from vllm_tasks.errors import EngineFailed, InvalidCall

logger = logging.getLogger(__name__)

T = TypeVar("T")

OURS = {
    "concurrency_groups": "frames come and go at the same time",
    "get_if_exists": "an engine has one owner",
    "lifetime": "an engine ends with its flow",
    "max_concurrency": "frames come and go at the same time",
    "max_restarts": "engines are restarted with their unfinished rows",
    "max_task_retries": "rows are handed over again after a restart",
    "name": "an engine has one owner",
    "namespace": "an engine has one owner",
}
"""Options of an actor that are not the caller's, and why."""
PLACED_BY_CALLER = {"label_selector", "placement_group", "scheduling_strategy"}
END_GRACE = 5.0
"""Seconds more than the host itself takes to end in order; then its actor is killed."""
LONGEST_REASON = 1000
"""Characters of Ray's words that are passed on."""


class Replica:
    """The actor: a host process (see `vllm_tasks.engines.process`) whose frames it relays in batches."""

    def __init__(self) -> None:
        # Where Ray keeps what this process prints, vLLM's own log is looked for.
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("vllm_tasks.vllm").setLevel(logging.DEBUG)
        self._frames: list[Frame] = []
        self._some = asyncio.Event()
        self._host: HostProcess | None = None

    async def place(self) -> str:
        """Where the actor is."""
        return f"{platform.node()}, pid {os.getpid()}"

    async def start(self, arguments: Frame, timeout: float) -> Frame:  # noqa: ASYNC109
        """`{"ready": facts}` of the engine, or `{"failed": reason}`; `timeout` is in seconds."""
        try:
            self._host, facts = await HostProcess.launch(arguments, timeout)
        except EngineFailed as error:
            return {"failed": str(error)}
        self._relay = asyncio.create_task(self._take_frames(self._host))
        return {"ready": facts}

    async def put(self, frames: list[Frame]) -> None:
        """Pass frames on to the host."""
        assert self._host is not None
        for frame in frames:
            self._host.write(frame)

    async def take(self) -> list[Frame]:
        """The frames that have come from the host since the last time; waits while there is none."""
        await self._some.wait()
        self._some.clear()
        frames, self._frames = self._frames, []
        return frames

    async def end(self) -> None:
        """End the host in order."""
        if self._host is not None:
            await self._host.end()

    async def _take_frames(self, host: HostProcess) -> None:
        """Collect frames until the host is gone; the last one says why."""
        while True:
            frame = await host.read()
            if "row" not in frame:
                await host.end()
                frame = {"dead": host.why(str(frame.get("dead", "")))}
            self._frames.append(frame)
            self._some.set()
            if "dead" in frame:
                return


class RayHost:
    """A `Host` (see `vllm_tasks.engines.local`) in an actor. Frames travel many at a time, both ways."""

    def __init__(self, model: str, actor: Any, group: Any) -> None:
        self.model = model
        self._actor = actor
        self._group = group
        self._membership = cluster.membership()
        self._came: deque[Frame] = deque()
        self._going: list[Frame] = []
        self._sender: asyncio.Task[None] | None = None
        self._lost = ""

    @classmethod
    async def launch(
        cls,
        options: dict[str, Any],
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
        model, started = str(arguments["model"]), time.monotonic()
        host = cls(model, *make_actor(options))
        try:
            waits = f"a place on Ray with {cluster.amounts_of(options)}"
            place = await host._within(timeout, waits, host._actor.place.remote())
            logger.info("starting vLLM for %r on Ray (%s)", model, place)
            # The host keeps to the timeout itself, and says what vLLM was doing.
            told = await host._within(
                timeout + CLOSE_GRACE, "vLLM", host._actor.start.remote(arguments, timeout)
            )
            if "failed" in told:
                raise EngineFailed(told["failed"])
        except BaseException:
            await host.end(grace=0)
            raise
        logger.info("vLLM is ready for %r (%s) after %.1f s", model, place, time.monotonic() - started)
        facts: Frame = told["ready"]
        return host, facts

    async def read(self) -> Frame:
        """The next frame; an empty one when the actor is gone."""
        from ray.exceptions import RayError

        while not self._came:
            if not self._is_member():
                return {}
            try:
                self._came.extend(await self._actor.take.remote())
            except RayError as error:
                self._lost = words_of(error)
                return {}
        return self._came.popleft()

    def write(self, frame: Frame) -> None:
        """Send a frame, with all that are written until the ones before have arrived."""
        self._going.append(frame)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())

    def why(self, reason: str) -> str:
        return reason or self._lost or "its actor was lost"

    async def end(self, grace: float = CLOSE_GRACE + END_GRACE) -> None:
        """End the engine in order, after `grace` seconds by force; the actor and its place are given back."""
        import ray

        if self._sender is not None:
            self._sender.cancel()
        if not self._is_member():  # Ray has ended it when this process left
            return
        if grace:
            try:
                await asyncio.wait_for(self._actor.end.remote(), grace)
            except (ray.exceptions.RayError, TimeoutError):
                logger.debug("the actor of %r did not end in order", self.model)
        ray.kill(self._actor)
        if self._group is not None:
            ray.util.remove_placement_group(self._group)

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

    async def _within(self, seconds: float, what: str, coming: Awaitable[T]) -> T:
        """What Ray gives, within `seconds`; says every few seconds what is waited for."""
        from ray.exceptions import RayError

        task, started = asyncio.ensure_future(coming), time.monotonic()
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=SAY_EVERY)
                waited = time.monotonic() - started
                if not task.done() and waited > seconds:
                    raise EngineFailed(
                        f"{self.model!r} waited {waited:.0f} s for {what} in vain "
                        "(VLLM_TASKS_ENGINE_START_TIMEOUT); ask for less in ray_config or replicas, or wait "
                        "until the cluster is free",
                        temporary=True,
                    )
                if not task.done():
                    logger.info("%r still waits for %s after %.0f s", self.model, what, waited)
            return task.result()
        except RayError as error:
            raise EngineFailed(f"Ray could not start {self.model!r}: {words_of(error)}") from error
        finally:
            task.cancel()


def make_actor(options: dict[str, Any]) -> tuple[Any, Any]:
    """An actor with these options, and the placement group that keeps its GPUs together, if it needs one.

    Raises `InvalidCall` for options that Ray does not know, or that are not the caller's.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    for name in sorted(options.keys() & OURS.keys()):
        raise InvalidCall(f"ray_config has {name!r}, which is not to be set here: {OURS[name]}")
    try:
        actor = ray.remote(**{"max_restarts": 0, **options})(Replica)
        if (options.get("num_gpus") or 0) <= 1 or PLACED_BY_CALLER & options.keys():
            return actor.remote(), None
        bundle = bundle_of(options)
        group = ray.util.placement_group([bundle], strategy="STRICT_PACK")
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        return actor.options(scheduling_strategy=strategy, num_cpus=bundle.get("CPU", 0)).remote(), group
    except (TypeError, ValueError) as error:
        raise InvalidCall(f"ray_config: {error}") from error


def bundle_of(options: dict[str, Any]) -> dict[str, float]:
    """What an actor with these options takes, as one bundle, which is on one machine."""
    bundle = cluster.amounts_of(options)
    if kind := options.get("accelerator_type"):
        bundle[f"accelerator_type:{kind}"] = 0.001  # as Ray asks for a kind
    return bundle


def words_of(error: Exception) -> str:
    """The part of Ray's words that tells why: the error of a traceback, or the end of the actor's process."""
    text = str(error)
    if found := REASON.findall(text):
        return str(found[-1])[:LONGEST_REASON]
    telling = [line for line in text.splitlines() if "dead because" in line or "exit detail" in line]
    return " ".join(telling or text.split("\n"))[:LONGEST_REASON]
