"""The Ray that this process belongs to: joined with the first engine that needs it, left with the last."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from vllm_tasks.errors import InvalidCall, ServerUnavailable

logger = logging.getLogger(__name__)

AMOUNTS = {"num_gpus": "GPU", "num_cpus": "CPU", "memory": "memory"}
"""Options of an actor that ask for an amount, and Ray's names of the resources."""

_engines = 0
_joined_by_us = False
_started_by_us = False
_is_of_the_parent = False
_turn = asyncio.Lock()


async def join(address: str | None) -> None:
    """Make this process part of a Ray cluster; `leave` undoes it.

    A Ray that this process belongs to already is used. Else `address` is joined, or what RAY_ADDRESS says;
    with neither a Ray of this process alone is started. (Ray itself would look for one that some other
    process has started on this machine, and which would end with that process.)
    Raises `InvalidCall` or `ServerUnavailable`.
    """
    global _engines
    async with _turn:
        await asyncio.to_thread(_join, address)
        _engines += 1


async def leave() -> None:
    """Undo a `join`; with the last, leave a cluster that `join` joined, or end the Ray that it started."""
    global _engines, _joined_by_us
    async with _turn:
        _engines -= 1
        if not _engines and _joined_by_us:
            import ray

            _joined_by_us = False
            # Ends a Ray that we started; one that we joined goes on without us.
            await asyncio.to_thread(ray.shutdown)


def membership() -> str:
    """What tells one stay in a Ray cluster from another; empty while this process belongs to none."""
    import ray

    return ray.get_runtime_context().get_job_id() if ray.is_initialized() else ""


def check_room(amounts: Mapping[str, float], replicas: int) -> None:
    """Refuse what a Ray of this process alone will never have; a cluster may have it later."""
    if not _started_by_us or not _joined_by_us:
        return
    import ray

    total = ray.cluster_resources()
    for name, amount in amounts.items():
        if amount * replicas > total.get(name, 0):
            raise InvalidCall(
                f"on_ray: {replicas} engine(s) ask for {amount:g} {name} each, and this machine has "
                f"{total.get(name, 0):g}; give ray_address=... of a cluster that has them, ask for fewer "
                "replicas, or say what an engine gets, as in ray_config={'num_gpus': 0} for one on CPUs"
            )


def amounts_of(options: Mapping[str, Any]) -> dict[str, float]:
    """By Ray's name of a resource, how much of it an actor with these options takes."""
    asked = {ray_name: options.get(name) or 0 for name, ray_name in AMOUNTS.items()}
    return {name: amount for name, amount in (asked | options.get("resources", {})).items() if amount}


def _join(address: str | None) -> None:
    global _joined_by_us, _started_by_us
    try:
        import ray
    except ImportError as error:
        raise InvalidCall(
            f"on_ray=True needs Ray, which is not installed: pip install 'vllm-tasks[ray]' ({error})"
        ) from error
    if _is_of_the_parent:
        raise InvalidCall("on_ray: Ray does not survive the fork of a process; start this one with spawn")
    if ray.is_initialized():
        _refuse_another(address)
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    dashboard = False if address == "local" else None
    try:
        # Ray's warnings here are about signal handlers, which are Prefect's in a flow, and about its token.
        ray.init(
            address=address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR
        )
    except ValueError as error:
        raise InvalidCall(f"ray_address={address!r}: {error}") from error
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ServerUnavailable(
            f"no Ray cluster could be joined at {address!r}: {error}; is it running, is its version of Ray "
            f"{ray.__version__} as here, and does it want a token (RAY_AUTH_MODE=token)?"
        ) from error
    _joined_by_us, _started_by_us = True, address == "local"


def _refuse_another(address: str | None) -> None:
    """A process is in one cluster at a time; Ray itself would stay in the old one in silence."""
    import ray

    if address is None or "://" in address or ":" not in address:
        return  # "auto" and "local" are where we are; a client's server has an address of its own
    present = ray.get_runtime_context().gcs_address
    if _resolved(address) != _resolved(present):
        raise InvalidCall(
            f"ray_address={address!r}: this process is in the Ray cluster at {present!r} already, and can be "
            "in one only; close its engines (model.close()) or call ray.shutdown() first"
        )


def _resolved(address: str) -> tuple[str, str]:
    import ray

    host, _, port = address.rpartition(":")
    try:
        ip = socket.gethostbyname(host)
    except OSError:
        ip = host
    return (ray.util.get_node_ip_address() if ip.startswith("127.") else ip), port


def _begin_anew() -> None:
    global _engines, _joined_by_us, _is_of_the_parent, _turn
    ray = sys.modules.get("ray")
    _is_of_the_parent = _is_of_the_parent or (ray is not None and ray.is_initialized())
    _engines, _joined_by_us, _turn = 0, False, asyncio.Lock()


os.register_at_fork(after_in_child=_begin_anew)
