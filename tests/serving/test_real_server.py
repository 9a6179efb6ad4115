"""`serve(model)` with the real vLLM, which ends with the last of its users."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import psutil
import pytest
import requests

from tests.conftest import TINY_ARGS
from tests.eventually import eventually
from tests.serving.processes import User, answers, is_alive, port_of, told
from vllm_tasks import VllmModel, serve
from vllm_tasks.errors import EngineFailed


@pytest.fixture
def tiny(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> VllmModel:
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "240")
    sampling = {"temperature": 0, "max_tokens": 8}
    return VllmModel(
        identifier="tiny", model_name=str(tiny_model), vllm_kwargs=TINY_ARGS, predict_kwargs=sampling
    )


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.usefixtures("all_processes_of_vllm")
def test_the_life_of_a_server(tiny: VllmModel, servers: Path) -> None:
    """Two processes share one server, which outlives the first and its own death, not the second."""
    rows = [f"row {i}" for i in range(20)]
    with User(tiny) as first, User(tiny) as second:
        url, key = first.hear()
        assert second.hear() == [url, key]
        assert len(first.ask(rows)) == len(second.ask(rows)) == 20
        check_secret(servers, url, key)

        first.kill()
        assert len(second.ask(rows)) == 20

        family = processes_of(servers)
        os.kill(told(servers)["pids"]["server"], signal.SIGKILL)
        assert len(second.ask(rows)) == 20
        assert told(servers)["key"] == key
        assert [p.pid for p in family if is_alive(p.pid)] == [told(servers)["pids"]["supervisor"]]

        family, shared = processes_of(servers), shared_memory_of(servers)
        assert shared
        port = port_of(servers)
        second.leave()
        assert eventually(lambda: not any(is_alive(p.pid) for p in family))
        assert not answers(port)
        assert not any(os.path.exists(file) for file in shared)
        assert not list(servers.glob("*/server.json"))


def check_secret(servers: Path, url: str, key: str) -> None:
    """Nobody is served without the key, and nobody else can read it."""
    (folder,) = servers.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in folder.iterdir())
    assert not any(key in word for p in processes_of(servers) for word in p.cmdline())
    body = {"model": told(servers)["url"], "prompt": "a"}
    assert requests.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 401


def processes_of(servers: Path) -> list[psutil.Process]:
    supervisor = psutil.Process(told(servers)["pids"]["supervisor"])
    return [supervisor, *supervisor.children(recursive=True)]


def shared_memory_of(servers: Path) -> set[str]:
    maps = {m.path for p in processes_of(servers) for m in p.memory_maps()}
    return {path for path in maps if path.startswith("/dev/shm/") and os.path.exists(path)}


@pytest.mark.engine
@pytest.mark.long
def test_a_real_start_that_fails_gives_the_reason_of_vllm(tiny: VllmModel, servers: Path) -> None:
    """vLLM's message about a wrong argument reaches the caller, and no process is left."""
    wrong = tiny.model_copy(update={"vllm_kwargs": {**TINY_ARGS, "max_model_len": 4096}})
    with pytest.raises(EngineFailed, match=r"max_model_len \(4096\)") as caught, serve(wrong):
        pass
    assert not caught.value.temporary
    (folder,) = servers.iterdir()
    assert "max_model_len" in (folder / "log").read_text()
    assert eventually(lambda: not started_here())


def started_here() -> list[psutil.Process]:
    """All processes that this test started, found by a variable in their environment."""
    cache = os.environ["XDG_CACHE_HOME"]
    found = psutil.process_iter(["environ"])
    return [p for p in found if (p.info["environ"] or {}).get("XDG_CACHE_HOME") == cache]
