"""Processes, files and users of shared servers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

import psutil

from vllm_tasks import VllmModel
from vllm_tasks.serving import shared_server

STAND_IN = Path(__file__).parents[1] / "servers/scripted_vllm.py"


def pids_of(record: Path) -> list[int]:
    return [int(pid) for pid in record.read_text().split()]


def told(servers: Path) -> dict[str, Any]:
    """The contents of the only server's `server.json`."""
    (folder,) = servers.iterdir()
    found: dict[str, Any] = json.loads((folder / "server.json").read_text())
    return found


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


USER = """
import json, sys
from pathlib import Path
from vllm_tasks import VllmModel, serve
from vllm_tasks.serving import shared_server
from vllm_tasks.engines.local.gpus import free_devices

shared_server.SERVER = Path(sys.argv[1])
with serve(VllmModel(**json.loads(sys.argv[2]))) as served:
    print(json.dumps([served.api_url, served.api_key.get_secret_value()]), flush=True)
    for line in sys.stdin:
        print(json.dumps(served.predict_batches(json.loads(line))), flush=True)
"""


class User:
    """A script that serves a model and predicts the texts that it is sent; killed after `LONGEST` seconds."""

    LONGEST = 900.0

    def __init__(self, model: VllmModel) -> None:
        fields = model.model_dump(include={"identifier", "model_name", "vllm_kwargs", "predict_kwargs"})
        self._process = subprocess.Popen(
            [sys.executable, "-c", USER, str(shared_server.SERVER), json.dumps(fields)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._timer = threading.Timer(self.LONGEST, self._process.kill)

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.communicate()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, rows: list[str]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(rows) + "\n")
        self._process.stdin.flush()
        return self.hear()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def leave(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait() == 0
        self._process.stdin = None  # for communicate()


def port_of(servers: Path) -> int:
    return int(told(servers)["url"].rpartition(":")[2])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
