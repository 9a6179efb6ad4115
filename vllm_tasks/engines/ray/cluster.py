"""The Ray cluster of this process: joined with the first engine that needs it, left with the last."""

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
"""The rest of the path of a socket of Ray, after the temporary folder."""
CONNECT_TIMEOUT = 10.0
"""Seconds to connect to the head of a cluster."""

_engines = 0
_membership = ""
"""The membership that `join` started; empty if this process was in a cluster before."""
_is_local = False
"""Whether `join` started a Ray for this process alone."""
_is_inherited = False
_turn = asyncio.Lock()


async def join(address: str | None) -> None:
    """Make this process a member of a Ray cluster; `leave` undoes it.

    If this process is in a cluster already, that one is used. Otherwise `address` or RAY_ADDRESS is joined,
    and without either a Ray for this process alone is started. (Ray itself would use one that another process
    has started on this machine, and which would end with that process.)
    Raises `InvalidCall` or `ServerUnavailable`.
    """
    global _engines
    async with _turn:
        joining = asyncio.create_task(asyncio.to_thread(_join, address))
        try:
            await asyncio.shield(joining)
        except asyncio.CancelledError:
            await asyncio.wait({joining})  # ray.init cannot be interrupted, nor may two run at once
            if joining.exception() is None:
                await _leave_unused()
            raise
        _engines += 1


async def leave() -> None:
    """Undo a `join`. The last one leaves a cluster that `join` joined, or ends the Ray that it started."""
    global _engines
    async with _turn:
        _engines -= 1
        await _leave_unused()


async def _leave_unused() -> None:
    global _membership, _is_local
    if _engines or not _membership:
        return
    joined, _membership, _is_local = _membership, "", False
    if membership() == joined:
        import ray

        # This ends a Ray that was started here. A cluster that was joined keeps running.
        await asyncio.to_thread(ray.shutdown)


def membership() -> str:
    """An id of the membership in a Ray cluster; empty while this process is in none."""
    import ray

    return ray.get_runtime_context().get_job_id() if ray.is_initialized() else ""


def check_capacity(amounts: Mapping[str, float], replicas: int) -> None:
    """Raise `InvalidCall` for resources that a local Ray will never have. A cluster may get them later."""
    if not _is_local:
        return
    import ray

    total = ray.cluster_resources()
    for name, amount in amounts.items():
        if amount * replicas > total.get(name, 0):
            raise InvalidCall(
                f"on_ray: {replicas} engine(s) need {amount:g} {name} each, and this machine has "
                f"{total.get(name, 0):g}; set ray_address=... to a cluster that has them, use fewer "
                "replicas, or set an engine's resources, as in ray_config={'num_gpus': 0} for CPUs"
            )


def _join(address: str | None) -> None:
    global _membership, _is_local
    try:
        import ray
    except ImportError as error:
        raise InvalidCall(
            f"on_ray=True needs Ray, which is not installed: pip install 'vllm-tasks[ray]' ({error})"
        ) from error
    if _is_inherited:
        raise InvalidCall("on_ray: Ray does not work in a forked process; start this process with spawn")
    if ray.is_initialized():
        _refuse_another(address)
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    dashboard = False if address == "local" else None
    folder = os.path.join(short(os.environ.get("RAY_TMPDIR"), SOCKET_OF_RAY), "ray")
    try:
        if "://" not in address and ":" in address:
            _check_reachable(address)
        # Ray would warn here about signal handlers, which are Prefect's in a flow, and about its token.
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
            f"no Ray cluster could be joined at {address!r}: {error}; check that it runs, that it has Ray "
            f"{ray.__version__} as here, and whether it needs a token (RAY_AUTH_MODE=token)"
        ) from error
    _membership, _is_local = membership(), address == "local"


def _check_reachable(address: str) -> None:
    """Raise `OSError` if nothing listens at `address`: Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()


def _refuse_another(address: str | None) -> None:
    """Raise `InvalidCall` for another cluster, since Ray itself would silently stay in the present one."""
    import ray

    if address is None or "://" in address or ":" not in address:
        return  # "auto" and "local" mean this cluster; the address of a Ray client server is another kind
    present = ray.get_runtime_context().gcs_address
    if _resolved(address) != _resolved(present):
        raise InvalidCall(
            f"ray_address={address!r}: this process is in the Ray cluster at {present!r} already, and can be "
            "in only one; close its engines (model.close()) or call ray.shutdown() first"
        )


def _resolved(address: str) -> tuple[str, str]:
    import ray

    host, _, port = address.rpartition(":")
    try:
        ip = socket.gethostbyname(host)
    except OSError:
        ip = host
    return (ray.util.get_node_ip_address() if ip.startswith("127.") else ip), port


def _reset_in_child() -> None:
    global _engines, _membership, _is_local, _is_inherited, _turn
    ray = sys.modules.get("ray")
    _is_inherited = _is_inherited or (ray is not None and ray.is_initialized())
    _engines, _membership, _is_local, _turn = 0, "", False, asyncio.Lock()


os.register_at_fork(after_in_child=_reset_in_child)
