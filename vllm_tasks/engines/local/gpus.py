"""The resources that an engine of this machine holds while it runs: slots of a limit and exclusive devices.

A device is held by a lock on a file, which the engine's own process inherits. The kernel releases the lock
when the last process of the engine has ended, even by `kill -9`.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vllm_tasks.engines.local.slots import HeldHere, Slots
from vllm_tasks.errors import EngineFailed, InvalidCall
from vllm_tasks.settings import site_settings

logger = logging.getLogger(__name__)

FOLDER = Path("/tmp/vllm_tasks-gpus")  # noqa: S108 - not TMPDIR: one folder for all users of the machine
DRIVER = Path("/proc/driver/nvidia/gpus")
ATTEMPT_EVERY = 1.0
LOG_EVERY = 60.0

_held: set[int] = set()
"""Descriptors of the locks that this process holds."""


@dataclass(frozen=True)
class Devices:
    """GPUs that are held, named as in `CUDA_VISIBLE_DEVICES`, and the descriptors of their locks."""

    names: tuple[str, ...] = ()
    locks: tuple[int, ...] = ()

    @property
    def env(self) -> Mapping[str, str]:
        """The environment that shows the engine's process these devices only."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.names)} if self.names else {}

    def release(self) -> None:
        """Close this process's locks. Processes of the engine that still run keep holding the devices."""
        for lock in self.locks:
            _held.discard(lock)
            os.close(lock)


class Claim:
    """The resources that one engine takes before it starts and releases when it has ended."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus
        self.devices = Devices()
        self._slots: Slots | None = None

    async def take(self) -> None:
        """Wait until the slots and devices that the settings require are free, and hold them.

        Raises `InvalidCall` if they can never be free, `EngineFailed` if Prefect cannot be reached.
        """
        settings = site_settings()
        if not self.gpus:
            return
        if settings.gpu_slots:
            slots = Slots(settings.gpu_slots, self.gpus)
            await slots.take()
            self._slots = slots
        if settings.gpus:
            try:
                self.devices = await free_devices(max(settings.gpus, self.gpus))
            except BaseException:
                await self.release()
                raise

    async def release(self) -> None:
        """Release everything that is held."""
        devices, self.devices = self.devices, Devices()
        devices.release()
        if self._slots:
            slots, self._slots = self._slots, None
            await slots.release()


def visible_devices() -> list[str]:
    """The GPUs that a process started here may use, named as in `CUDA_VISIBLE_DEVICES`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return [] if names == ["-1"] else [name for name in names if name]
    if DRIVER.is_dir():
        return [str(index) for index in range(len(list(DRIVER.iterdir())))]
    with suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
        return [str(index) for index in range(listed.stdout.count("GPU "))]
    return []


async def free_devices(count: int, folder: Path = FOLDER) -> Devices:
    """Wait for `count` visible GPUs that no other engine of the machine holds, and hold them.

    Raises `InvalidCall` if the machine has too few, or this process itself holds the missing ones.
    """
    visible = visible_devices()
    _check_enough(visible, count)
    attempts = 0
    while (devices := _take_free(visible, count, folder)) is None:
        if attempts * ATTEMPT_EVERY % LOG_EVERY == 0:
            logger.info("waiting for %d free GPUs of %s on this machine", count, ",".join(visible))
        attempts += 1
        await asyncio.sleep(ATTEMPT_EVERY)
        _check_enough(visible, count)  # another engine of this process may have taken some meanwhile
    return devices


def _check_enough(visible: Sequence[str], count: int) -> None:
    needs = f"the engine needs {count} GPUs (VLLM_TASKS_GPUS), and this process sees {len(visible)}"
    if count > len(visible):
        raise InvalidCall(
            f"{needs}; use another machine, or set num_gpus=0 in the model's compute_kwargs for an engine on "
            "CPUs"
        )
    if count > len(visible) - len(_held):
        raise HeldHere(
            f"{needs}, of which engines of this same process hold {len(_held)}: close one first "
            "(use `with model:`)"
        )


def _take_free(visible: Sequence[str], count: int, folder: Path) -> Devices | None:
    """Hold the first `count` free devices or none, so that two engines never wait for each other."""
    taken: dict[str, int] = {}
    try:
        for name in visible:
            if len(taken) < count and (lock := _lock(name, folder)) is not None:
                taken[name] = lock
    except OSError as error:
        for lock in taken.values():
            os.close(lock)
        raise EngineFailed(f"no GPU can be held in {folder}: {error}", temporary=True) from error
    devices = Devices(tuple(taken), tuple(taken.values()))
    _held.update(devices.locks)
    if len(taken) == count:
        return devices
    devices.release()
    return None


def _lock(name: str, folder: Path) -> int | None:
    """Lock a device. Returns the descriptor of the lock, or None if another process holds it."""
    lock = _open(folder / name.replace("/", "_"), folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _open(path: Path, folder: Path) -> int:
    """Open the lock file of a device, which any user of the machine may have created.

    In a folder with the sticky bit, Linux refuses O_CREAT on another user's file, hence two steps.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(FileExistsError):
        folder.mkdir(mode=0o777)
    # Danger: the folder may be another user's link to one of ours, which must not be opened to all.
    inside = os.open(folder, flags | os.O_DIRECTORY)
    try:
        # Also if it exists: Docker creates it for a mount, closed to others. Another owner has opened it.
        with suppress(PermissionError):
            os.fchmod(inside, 0o1777)
        with suppress(FileNotFoundError):
            return os.open(path.name, flags, dir_fd=inside)
        with suppress(FileExistsError):
            made = os.open(path.name, flags | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=inside)
            os.fchmod(made, 0o644)  # despite the umask
            return made
        return os.open(path.name, flags, dir_fd=inside)
    finally:
        os.close(inside)


def _leave_to_parent() -> None:
    """Close the inherited locks: a forked child must not hold devices after this process has ended."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
