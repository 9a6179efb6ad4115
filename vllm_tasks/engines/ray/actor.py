"""The actor that holds a host (see `vllm_tasks.engines.local.process`) on some machine of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from collections.abc import Mapping
from typing import Any

from vllm_tasks.engines.local.process import HostProcess
from vllm_tasks.engines.session import Frame
from vllm_tasks.errors import EngineFailed, InvalidCall

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
AMOUNTS = {"num_gpus": "GPU", "num_cpus": "CPU", "memory": "memory"}
"""Options of an actor that ask for an amount, and Ray's names of the resources."""


class HostActor:
    """A host process whose frames are relayed, many at a time."""

    def __init__(self) -> None:
        # Where Ray keeps what this process prints, vLLM's own log is looked for.
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("vllm_tasks.vllm").setLevel(logging.DEBUG)
        self._frames: list[Frame] = []
        self._some = asyncio.Event()
        self._starting: asyncio.Task[tuple[HostProcess, Frame]] | None = None

    async def place(self) -> str:
        """Where the actor is."""
        return f"{platform.node()}, pid {os.getpid()}"

    async def start(self, arguments: Frame, timeout: float) -> Frame:  # noqa: ASYNC109
        """`{"ready": facts}` of the engine, or `{"failed": reason}`; `timeout` is in seconds."""
        self._starting = asyncio.create_task(HostProcess.launch(arguments, timeout))
        try:
            self._host, facts = await self._starting
        except EngineFailed as error:
            return {"failed": str(error)}
        self._relay = asyncio.create_task(self._take_frames())
        return {"ready": facts}

    async def put(self, frames: list[Frame]) -> None:
        """Pass frames on to the host."""
        for frame in frames:
            self._host.write(frame)

    async def take(self) -> list[Frame]:
        """The frames that have come from the host since the last time; waits while there is none."""
        await self._some.wait()
        self._some.clear()
        frames, self._frames = self._frames, []
        return frames

    async def end(self) -> None:
        """End the host in order; one that is still starting at once."""
        if self._starting is None:
            return
        self._starting.cancel()
        await asyncio.wait({self._starting})
        if not self._starting.cancelled() and not self._starting.exception():
            host, _ = self._starting.result()
            await host.end()

    async def _take_frames(self) -> None:
        """Collect frames until the host is gone; the last one says why."""
        while True:
            frame = await self._host.read()
            if not frame or "dead" in frame:
                await self._host.end()
                frame = {"dead": self._host.why(str(frame.get("dead", "")))}
            self._frames.append(frame)
            self._some.set()
            if "dead" in frame:
                return


def make_actor(options: Mapping[str, Any]) -> tuple[Any, Any]:
    """A `HostActor` with these options, and the placement group that it is in: with several GPUs, else None.

    Raises `InvalidCall` for options that Ray does not know, or that are not the caller's.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    for name in sorted(options.keys() & OURS.keys()):
        raise InvalidCall(f"ray_config has {name!r}, which is not to be set here: {OURS[name]}")
    try:
        actor = ray.remote(**{"max_restarts": 0, **options})(HostActor)
        if (options.get("num_gpus") or 0) <= 1 or PLACED_BY_CALLER & options.keys():
            return actor.remote(), None
        bundle = bundle_of(options)
        group = ray.util.placement_group([bundle], strategy="STRICT_PACK")
    except (TypeError, ValueError) as error:
        raise InvalidCall(f"ray_config: {error}") from error
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    # Without a number Ray would ask for a CPU that the bundle does not have.
    return actor.options(scheduling_strategy=strategy, num_cpus=bundle.get("CPU", 0)).remote(), group


def bundle_of(options: Mapping[str, Any]) -> dict[str, float]:
    """What an actor with these options takes, as one bundle: a bundle is on one machine."""
    bundle = amounts_of(options)
    if kind := options.get("accelerator_type"):
        bundle[f"accelerator_type:{kind}"] = 0.001  # as Ray itself asks for a kind
    return bundle


def amounts_of(options: Mapping[str, Any]) -> dict[str, float]:
    """By Ray's name of a resource, how much of it an actor with these options takes."""
    asked = {ray_name: options.get(name) or 0 for name, ray_name in AMOUNTS.items()}
    return {name: amount for name, amount in (asked | (options.get("resources") or {})).items() if amount}
