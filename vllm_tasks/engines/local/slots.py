"""Slots of a global concurrency limit of Prefect, held for the life of an engine.

Prefect's own `concurrency` keeps trying in another thread after it was cancelled, and waits up to 30 s
between two attempts. Here, an engine that is closed while it waits holds no slots.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound, PrefectException

from vllm_tasks.errors import EngineFailed, InvalidCall

if TYPE_CHECKING:
    from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse

logger = logging.getLogger(__name__)

LEASE = 60.0
"""Seconds until the slots of a holder that has died are free again; the least that Prefect accepts."""
RENEW_EVERY = 20.0
ATTEMPT_EVERY = 2.0
LOG_EVERY = 60.0

_held: dict[str, int] = {}
"""Slots that the engines of this process hold or wait for, by limit."""


class HeldHere(InvalidCall):
    """Engines of this same process hold what an engine needs, so it would wait for ever."""


class Slots:
    """Takes `count` slots of the limit `name` and keeps them until they are released."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.count = count
        self._lease: UUID | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def take(self) -> None:
        """Wait for the slots and hold them.

        Raises `InvalidCall` if there is no such limit, or waiting cannot help; `EngineFailed` if Prefect's
        server cannot be reached.
        """
        await self._check()
        _held[self.name] = _held.get(self.name, 0) + self.count
        try:
            await self._wait()
        except BaseException as error:
            _held[self.name] -= self.count
            if isinstance(error, httpx.HTTPError):
                raise EngineFailed(
                    f"Prefect could not be reached for slots of the limit {self.name!r} "
                    f"(VLLM_TASKS_GPU_SLOTS): {error}",
                    temporary=True,
                ) from error
            raise
        self._renewing = asyncio.create_task(self._renew())

    async def release(self) -> None:
        """Release the slots. If Prefect cannot be reached, they are free again when the lease expires."""
        if self._renewing is None:
            return
        self._renewing.cancel()
        self._renewing = None
        _held[self.name] -= self.count
        lease, self._lease = self._lease, None
        if lease is not None:
            await _give_back(self.name, lease)

    async def _check(self) -> None:
        limit = await self._limit()
        mine = _held.get(self.name, 0)
        if not limit.active or self.count <= limit.limit - mine:
            return
        needs = (
            f"the engine needs {self.count} slots of the limit {self.name!r} (VLLM_TASKS_GPU_SLOTS), which "
            f"has {limit.limit}"
        )
        if self.count <= limit.limit:
            raise HeldHere(
                f"{needs}, and engines of this same process hold {mine}: close one first (use `with model:`)"
            )
        raise InvalidCall(
            f"{needs}; raise the limit with `make pools ARGS='--gpus N'`, or set num_gpus=0 in the model's "
            "compute_kwargs for an engine on CPUs"
        )

    async def _limit(self) -> GlobalConcurrencyLimitResponse:
        try:
            async with get_client() as client:
                return await client.read_global_concurrency_limit_by_name(self.name)
        except ObjectNotFound as error:
            raise InvalidCall(
                f"Prefect has no global concurrency limit {self.name!r} (VLLM_TASKS_GPU_SLOTS); create it "
                "with `make pools` (python -m vllm_tasks.pools)"
            ) from error
        except httpx.HTTPError as error:
            raise EngineFailed(
                f"Prefect could not be reached for the limit {self.name!r} (VLLM_TASKS_GPU_SLOTS): {error}",
                temporary=True,
            ) from error

    async def _wait(self) -> None:
        attempts = 0
        while not await self._attempt():
            if attempts * ATTEMPT_EVERY % LOG_EVERY == 0:
                logger.info("waiting for %d free GPU slots of the limit %r", self.count, self.name)
            attempts += 1
            await asyncio.sleep(ATTEMPT_EVERY)

    async def _attempt(self) -> bool:
        """Take the slots if they are free. Returns whether they were."""
        taking = asyncio.create_task(self._increment())
        try:
            self._lease = await asyncio.shield(taking)
        except asyncio.CancelledError:
            # The server may have granted the slots already: unreleased, they would stay taken for the lease.
            with suppress(httpx.HTTPError):
                if lease := await taking:
                    await _give_back(self.name, lease)
            raise
        return self._lease is not None

    async def _increment(self) -> UUID | None:
        async with get_client() as client:
            try:
                response = await client.increment_concurrency_slots_with_lease(
                    [self.name], self.count, "concurrency", LEASE
                )
            except httpx.HTTPStatusError as error:
                if error.response.status_code == HTTPStatus.LOCKED:
                    return None
                raise
        return UUID(response.json()["lease_id"])

    async def _renew(self) -> None:
        """Renew the lease. If it cannot be renewed, the engine keeps running without it."""
        while True:
            await asyncio.sleep(RENEW_EVERY)
            try:
                if self._lease is None:
                    await self._attempt()
                    continue
                async with get_client() as client:
                    await client.renew_concurrency_lease(self._lease, LEASE)
            except (httpx.HTTPError, PrefectException) as error:
                if _has_expired(error):
                    self._lease = None  # and is taken again once slots are free
                logger.warning(
                    "the slots of the limit %r could not be renewed, and another engine may take them: %s",
                    self.name, error,
                )  # fmt: skip


def _has_expired(error: Exception) -> bool:
    """Whether Prefect reports that the lease does not exist. Other failures may pass before it expires."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == HTTPStatus.GONE


async def _give_back(name: str, lease: UUID) -> None:
    try:
        try:
            async with get_client() as client:
                await client.release_concurrency_slots_with_lease(lease)
        except RuntimeError:  # at exit no thread can start to look up a host
            with get_client(sync_client=True) as blocking:
                blocking.release_concurrency_slots_with_lease(lease)
    except httpx.HTTPError as error:
        logger.warning("slots of the limit %r stay taken for %g s: %s", name, LEASE, error)


os.register_at_fork(after_in_child=lambda: _held.clear())  # a forked child has no engines yet
