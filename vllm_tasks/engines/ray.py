"""Engines as actors on a Ray cluster, of this machine or elsewhere."""

from __future__ import annotations

import atexit
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm_tasks import loop
from vllm_tasks.engines import Done, cluster
from vllm_tasks.engines.actor import RayHost
from vllm_tasks.engines.local import LocalConfig, LocalEngine
from vllm_tasks.engines.replicas import Replicas
from vllm_tasks.rows import Request


@dataclass(frozen=True)
class RayConfig:
    """vLLM's engine arguments and the options of Ray's actors, as JSON; equal ones share their engines."""

    engine_args: str
    options: str = field(repr=False)  # its environment may hold secrets
    address: str | None
    replicas: int
    start_timeout: float = field(compare=False)


class RayEngine:
    """An `Engine` of `replicas` actors; each is restarted when it dies, with its unfinished rows."""

    def __init__(self, config: RayConfig) -> None:
        self.config = config
        self._options: dict[str, Any] = json.loads(config.options)
        local = LocalConfig(config.engine_args, config.start_timeout)
        launch = partial(RayHost.launch, self._options)
        self._replicas = Replicas([LocalEngine(local, launch) for _ in range(config.replicas)])
        self._has_joined = False
        self.window = self._replicas.window

    async def start(self) -> None:
        await cluster.join(self.config.address)
        self._has_joined = True
        # Ray leaves the cluster at exit, too; what is registered after Ray comes before it.
        atexit.register(self._close_at_exit)
        try:
            cluster.check_room(cluster.amounts_of(self._options), self.config.replicas)
            await self._replicas.start()
        except BaseException:
            await self.close()
            raise

    async def generate(self, requests: Sequence[Request], done: Done) -> None:
        await self._replicas.generate(requests, done)

    async def close(self) -> None:
        if self._has_joined:
            self._has_joined = False
            atexit.unregister(self._close_at_exit)
            await self._replicas.close()
            await cluster.leave()

    def _close_at_exit(self) -> None:
        loop.run(self._replicas.close())  # Ray itself leaves its cluster now
