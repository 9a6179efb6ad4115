"""The Ray that this process belongs to: joined with the first engine that needs it, left with the last."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Mapping

from vllm_tasks.engines.session import short
from vllm_tasks.errors import InvalidCall, ServerUnavailable

logger = logging.getLogger(__name__)

SOCKET_OF_RAY = "/ray/session_2026-01-01_00-00-00_123456_1234567/sockets/plasma_store.1"
"""What comes after the temporary folder in the path of a socket of Ray's."""
KNOCK_TIMEOUT = 10.0
"""Seconds for a connection to the head of a cluster."""

_engines = 0
_stay = ""
"""The membership that `join` began; empty where this process was in a cluster already."""
_is_local = False
"""Whether it is in a Ray that `join` started for it alone."""
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
        joining = asyncio.create_task(asyncio.to_thread(_join, address))
        try:
            await asyncio.shield(joining)
        except asyncio.CancelledError:
            await asyncio.wait({joining})  # nothing interrupts Ray's start, which no other one may meet
            if joining.exception() is None:
                await _leave_unused()
            raise
        _engines += 1


async def leave() -> None:
    """Undo a `join`; with the last, leave a cluster that `join` joined, or end the Ray that it started."""
    global _engines
    async with _turn:
        _engines -= 1
        await _leave_unused()


async def _leave_unused() -> None:
    global _stay, _is_local
    if _engines or not _stay:
        return
    began, _stay, _is_local = _stay, "", False
    if membership() == began:
        import ray

        # Ends a Ray that we started; one that we joined goes on without us.
        await asyncio.to_thread(ray.shutdown)


def membership() -> str:
    """What tells one stay in a Ray cluster from another; empty while this process belongs to none."""
    import ray

    return ray.get_runtime_context().get_job_id() if ray.is_initialized() else ""


def check_room(amounts: Mapping[str, float], replicas: int) -> None:
    """Refuse what a Ray of this process alone will never have; a cluster may have it later."""
    if not _is_local:
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


def _join(address: str | None) -> None:
    global _stay, _is_local
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
    folder = os.path.join(short(os.environ.get("RAY_TMPDIR"), SOCKET_OF_RAY), "ray")
    try:
        if "://" not in address and ":" in address:
            _knock(address)
        # Ray's warnings here are about signal handlers, which are Prefect's in a flow, and about its token.
        ray.init(
            address=address,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder if address == "local" else None,
        )
    except ValueError as error:
        raise InvalidCall(f"ray_address={address!r}: {error}") from error
    except (OSError, RuntimeError, ray.exceptions.RayError) as error:
        raise ServerUnavailable(
            f"no Ray cluster could be joined at {address!r}: {error}; is it running, is its version of Ray "
            f"{ray.__version__} as here, and does it want a token (RAY_AUTH_MODE=token)?"
        ) from error
    _stay, _is_local = membership(), address == "local"


def _knock(address: str) -> None:
    """See that somebody listens: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_TIMEOUT).close()


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
    global _engines, _stay, _is_local, _is_of_the_parent, _turn
    ray = sys.modules.get("ray")
    _is_of_the_parent = _is_of_the_parent or (ray is not None and ray.is_initialized())
    _engines, _stay, _is_local, _turn = 0, "", False, asyncio.Lock()


os.register_at_fork(after_in_child=_begin_anew)
