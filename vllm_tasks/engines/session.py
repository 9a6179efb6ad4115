"""The processes around one vLLM, which share a session: how they speak, where they meet, how they end.

What our programs (`host`, `supervisor`, `server`) and those who start them have in common. The programs are
run by their paths and run this file by its own, so it needs nothing but the standard library.
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
"""Seconds between two looks at whether the parent still lives."""
SOCKETS = "VLLM_RPC_BASE_PATH"
"""vLLM's name of the folder where its processes meet. It leaves its sockets there, one or two a start."""
OWN = "vllm-"
"""How a folder for the sockets of one engine begins."""
SOCKET_OF_VLLM = "/vllm-12345678/01234567-89ab-cdef-0123-456789abcdef"
"""What comes after the temporary folder in the path of a socket of vLLM's."""
LONGEST = 107
"""Bytes that the path of a socket may have: https://man7.org/linux/man-pages/man7/unix.7.html"""

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18
"""System call, request and feature by which a process on x86-64 asks Linux for AMX's registers:
https://docs.kernel.org/arch/x86/xstate.html"""

Frame = dict[str, Any]


def permit_amx() -> None:
    """Ask for AMX, which vLLM 0.32 uses for attention in bfloat16 without having asked.

    Its worker then dies of SIGILL, unless another library has asked in the same process before. Without
    AMX, or on another machine, the system call fails and nothing else happens.
    """
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA)


def packed(frame: Frame | str) -> bytes:
    """A frame as it goes over the socket; one that is JSON already as it is."""
    data = (frame if isinstance(frame, str) else json.dumps(frame)).encode()
    return struct.pack("!I", len(data)) + data


async def read_frame(reader: asyncio.StreamReader) -> Frame:
    (size,) = struct.unpack("!I", await reader.readexactly(4))
    frame: Frame = json.loads(await reader.readexactly(size))
    return frame


def signal_words(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} (often the kernel, out of memory)" if number == signal.SIGKILL else name


def watch(parent: int, grace: float = 0.0) -> None:
    """Begin to watch over the parent; `grace` seconds after it is gone, end the session by force.

    vLLM's own processes outlive a killed parent. The thread also works while the engine is still loading,
    when an event loop is blocked.
    """

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECKED_EVERY)
        time.sleep(grace)
        end(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def end(code: int) -> Never:
    """Kill what is left of this process's session, remove its sockets, then exit."""
    kill(os.getsid(0))
    remove_sockets(os.environ.get(SOCKETS, ""))
    os._exit(code)


def new_sockets() -> str:
    """A folder for the sockets of one engine: what goes as `SOCKETS` into its environment."""
    return tempfile.mkdtemp(prefix=OWN, dir=short(os.environ.get(SOCKETS), SOCKET_OF_VLLM))


def short(folder: str | None, rest: str) -> str:
    """A `folder`, or the temporary one; /tmp where a socket at `rest` below it would have too long a path."""
    folder = folder or tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) + len(rest) <= LONGEST else "/tmp"  # noqa: S108


def remove_sockets(folder: str) -> None:
    """Remove a folder of `new_sockets`: by who made it, and by the engine, whose parent may be killed."""
    if Path(folder).name.startswith(OWN):
        shutil.rmtree(folder, ignore_errors=True)


def kill(session: int) -> None:
    """Kill every process of a session but the caller.

    Spared is multiprocessing's resource tracker: it ends by itself when the others are gone,
    after it has removed their shared memory.
    """
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            if os.getsid(pid) != session or pid == os.getpid():
                continue
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, FileNotFoundError):
            continue  # it ended meanwhile
