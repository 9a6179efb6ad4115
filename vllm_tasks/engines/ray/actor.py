"""The actor that holds a host (see `vllm_tasks.engines.local.process`) on a machine of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import random
from collections.abc import Mapping
from typing import Any

from vllm_tasks.engines.local.process import HostProcess
from vllm_tasks.engines.session import Frame
from vllm_tasks.errors import EngineFailed, InvalidCall

OURS = {
    "concurrency_groups": "frames are sent and received at the same time",
    "get_if_exists": "an engine has one owner",
    "lifetime": "an engine ends with its flow",
    "max_concurrency": "frames are sent and received at the same time",
    "max_restarts": "engines are restarted with their unfinished rows",
    "max_task_retries": "rows are sent again after a restart",
    "name": "an engine has one owner",
    "namespace": "an engine has one owner",
}
"""Options of an actor that the caller must not set, each with the reason."""
PLACED_BY_CALLER = {"label_selector", "placement_group", "scheduling_strategy"}
AMOUNTS = {"num_gpus": "GPU", "num_cpus": "CPU", "memory": "memory"}
"""Options of an actor that request an amount, with Ray's names of the resources."""


class HostActor:
    """Runs a host process and relays its frames, many at a time."""

    def __init__(self) -> None:
        import ray

        # vLLM's Ray executor runs in a process of the host, and would start a Ray of its own.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        # Ray keeps the output of this process, which is where users look for vLLM's log.
        logging.basicConfig(level=logging.INFO)
        logging.getLogger("vllm_tasks.vllm").setLevel(logging.DEBUG)
        self._frames: list[Frame] = []
        self._some = asyncio.Event()
        self._starting: asyncio.Task[tuple[HostProcess, Frame]] | None = None

    async def location(self) -> str:
        """The machine and process of the actor."""
        return f"{platform.node()}, pid {os.getpid()}"

    async def start(self, arguments: Frame, timeout: float, python: str) -> Frame:  # noqa: ASYNC109
        """Start the engine with `python` within `timeout` seconds.

        Returns `{"ready": facts}` or `{"failed": reason}`.
        """
        self._starting = asyncio.create_task(HostProcess.launch(arguments, timeout, python))
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
        """Wait for frames of the host, and return all that have arrived since the last call."""
        await self._some.wait()
        self._some.clear()
        frames, self._frames = self._frames, []
        return frames

    async def end(self) -> None:
        """End the host orderly, or immediately if it is still starting."""
        if self._starting is None:
            return
        self._starting.cancel()
        await asyncio.wait({self._starting})
        if not self._starting.cancelled() and not self._starting.exception():
            host, _ = self._starting.result()
            await host.end()

    async def _take_frames(self) -> None:
        """Collect frames until the host has ended. The last frame has the reason."""
        while True:
            frame = await self._host.read()
            if not frame or "dead" in frame:
                await self._host.end()
                frame = {"dead": self._host.why(str(frame.get("dead", "")))}
            self._frames.append(frame)
            self._some.set()
            if "dead" in frame:
                return


def make_actor(options: Mapping[str, Any], worker_gpus: int = 0) -> tuple[Any, Any]:
    """Create a `HostActor` with these options. Returns it and its placement group (None for up to one GPU).

    With `worker_gpus`, vLLM's Ray executor makes a placement group of as many GPUs for its own workers.
    Raises `InvalidCall` for options that Ray does not know or that the caller must not set.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    for name in sorted(options.keys() & OURS.keys()):
        raise InvalidCall(f"ray_config has {name!r}, which cannot be set here: {OURS[name]}")
    if worker_gpus and not PLACED_BY_CALLER & options.keys():
        options = {**options, "scheduling_strategy": beside_gpus()}
    group = None
    try:
        actor = ray.remote(**{"max_restarts": 0, **options})(HostActor)
        if (options.get("num_gpus") or 0) <= 1 or PLACED_BY_CALLER & options.keys():
            return actor.remote(), None
        bundle = bundle_of(options)
        group = ray.util.placement_group([bundle], strategy="STRICT_PACK")
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        # Without num_cpus Ray would request a CPU that the bundle does not have.
        return actor.options(scheduling_strategy=strategy, num_cpus=bundle.get("CPU", 0)).remote(), group
    except (TypeError, ValueError) as error:
        if group is not None:
            ray.util.remove_placement_group(group)  # else it keeps its GPUs as long as this process lives
        raise InvalidCall(f"ray_config: {error}") from error


def beside_gpus() -> Any:
    """A machine with GPUs, of which the actor has none: vLLM looks for a driver where its engine runs.

    Ray prefers machines without GPUs for such an actor.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    return NodeAffinitySchedulingStrategy(random.choice(nodes), soft=True) if nodes else "DEFAULT"


def bundle_of(options: Mapping[str, Any]) -> dict[str, float]:
    """The resources of an actor with these options as one bundle, which is always on one machine."""
    bundle = amounts_of(options)
    if kind := options.get("accelerator_type"):
        bundle[f"accelerator_type:{kind}"] = 0.001  # as Ray itself requests an accelerator type
    return bundle


def amounts_of(options: Mapping[str, Any]) -> dict[str, float]:
    """The amount of each resource, by Ray's name, that an actor with these options needs."""
    requested = {ray_name: options.get(name) or 0 for name, ray_name in AMOUNTS.items()}
    return {name: amount for name, amount in (requested | (options.get("resources") or {})).items() if amount}
