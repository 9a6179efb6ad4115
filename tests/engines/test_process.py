"""The child process of an engine, where the system does not end it at once."""

from __future__ import annotations

import asyncio
import socket
import subprocess

from vllm_tasks.engines import loop
from vllm_tasks.engines.local.process import HostProcess


class Stuck(subprocess.Popen[bytes]):
    """A process that the system cannot end yet, as while it waits inside the driver of a GPU."""

    def kill(self) -> None:
        """Have no effect yet."""

    def poll(self) -> int | None:
        return None

    def wait(self, timeout: float | None = None) -> int:
        assert timeout is not None, "the loop of all engines would wait for as long as the driver does"
        raise subprocess.TimeoutExpired(self.args, timeout)


def test_a_process_that_cannot_be_killed_holds_up_no_other_engine() -> None:
    """It is given up after a while, and the system ends it when it can."""

    async def end() -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair()
        with theirs:
            streams = await asyncio.open_connection(sock=ours)
            process = Stuck(["sleep", "60"], stdout=subprocess.PIPE, start_new_session=True)
            await HostProcess("m", process, *streams, sockets="").end(grace=0)
        return process

    process = loop.run(end())
    assert subprocess.Popen.wait(process) < 0, "its session was killed"
