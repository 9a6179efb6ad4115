"""The processes around one vLLM, which share a session: their frames, their sockets and how they end.

This is the code that our programs (`host`, `supervisor`, `server`) share with the processes that start them.
The programs are run by path and load this file by path, so it may import the standard library only.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import platform
import shutil
import signal
import struct
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Never

PARENT_CHECKED_EVERY = 0.5
"""Seconds between two checks that the parent still runs."""
SOCKETS = "VLLM_RPC_BASE_PATH"
"""vLLM's variable for the folder of its sockets. Each start leaves one or two of them there."""
OWN = "vllm-"
"""Prefix of the name of a folder for the sockets of one engine."""
SOCKET_OF_VLLM = "/vllm-12345678/01234567-89ab-cdef-0123-456789abcdef"
"""The rest of the path of a socket of vLLM, after the temporary folder."""
LONGEST = 107
"""Bytes allowed in the path of a socket: https://man7.org/linux/man-pages/man7/unix.7.html"""

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18
"""System call, request and feature with which a process on x86-64 requests the AMX registers from Linux:
https://docs.kernel.org/arch/x86/xstate.html"""

Frame = dict[str, Any]


def permit_amx() -> None:
    """Request permission for AMX, which vLLM 0.32 uses for attention in bfloat16 without requesting it.

    Without it vLLM's worker dies of SIGILL, unless another library has requested it in the same process. On
    a machine without AMX the system call fails and has no effect.
    """
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA)


def packed(frame: Frame | str) -> bytes:
    """The bytes of a frame for the socket. A string is taken as JSON already."""
    data = (frame if isinstance(frame, str) else json.dumps(frame)).encode()
    return struct.pack("!I", len(data)) + data


async def read_frame(reader: asyncio.StreamReader) -> Frame:
    (size,) = struct.unpack("!I", await reader.readexactly(4))
    frame: Frame = json.loads(await reader.readexactly(size))
    return frame


def signal_words(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} (often the kernel, out of memory)" if number == signal.SIGKILL else name


def reason_of(error: BaseException) -> str:
    """The outermost error with a message. vLLM wraps some causes in errors without one."""
    while not str(error) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def watch(parent: int, grace: float = 0.0) -> None:
    """Watch the parent from a thread; kill the session `grace` seconds after the parent has ended.

    vLLM's own processes outlive a killed parent. A thread works even while the engine is still loading and
    blocks the event loop. A recycled pid does no harm, because `getppid` changes when the parent ends.
    """

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECKED_EVERY)
        time.sleep(grace)
        end(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def end(code: int) -> Never:
    """Kill the rest of this process's session, remove its sockets and exit without Python's clean-up."""
    kill(os.getsid(0))
    remove_sockets(os.environ.get(SOCKETS, ""))
    os._exit(code)


def new_sockets() -> str:
    """Make a folder for the sockets of one engine, to be passed to it in the variable `SOCKETS`."""
    return tempfile.mkdtemp(prefix=OWN, dir=short(os.environ.get(SOCKETS), SOCKET_OF_VLLM))


def short(folder: str | None, rest: str) -> str:
    """`folder` or the temporary one, or /tmp if the path of a socket at `rest` below it would be too long."""
    folder = folder or tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) + len(rest) <= LONGEST else "/tmp"  # noqa: S108


def remove_sockets(folder: str) -> None:
    """Remove a folder of `new_sockets`. Its maker does so, and the engine too, as its maker may be killed."""
    if Path(folder).name.startswith(OWN):
        shutil.rmtree(folder, ignore_errors=True)


def kill(session: int) -> None:
    """Send SIGKILL to every process of a session except the caller.

    multiprocessing's resource tracker is spared: it removes the shared memory of the others once they have
    ended, then ends by itself. Killing it would leak that memory.
    """
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if os.getsid(pid) != session or pid == os.getpid():
                continue
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, FileNotFoundError):
            continue  # the process has ended since the listing
