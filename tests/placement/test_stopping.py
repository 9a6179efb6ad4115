"""Waits that end with the flow that waits for them: a lost commit, an absent server, a busy GPU."""

from __future__ import annotations

import fcntl
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Never

import httpx
import pyarrow
import pytest
from prefect import flow, task

from tests.conftest import IN_PREFECT
from tests.eventually import eventually
from tests.servers.ports import free_port
from vllm_tasks import VllmAPI
from vllm_tasks._prefect import commits
from vllm_tasks._prefect.commits import InPrefect
from vllm_tasks.engines.local.gpus import free_devices
from vllm_tasks.errors import TablesUnavailable
from vllm_tasks.placement import grace
from vllm_tasks.serving import shared_server
from vllm_tasks.serving.shared_server import SharedServer

pytestmark = IN_PREFECT


def stopped_while(work: Callable[[], Any], until: Callable[[], object]) -> None:
    """Submit `work` in a flow that fails when `until` is true, and return when the flow has ended."""

    @task
    def waits() -> None:
        work()

    @flow
    def job() -> None:
        waits.submit()
        assert eventually(until)
        raise RuntimeError("the flow ends")

    with pytest.raises(RuntimeError, match="the flow ends"):
        job()


def test_a_lost_commit_is_not_tried_again_after_its_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit has been tried twice and would be tried again much later."""
    monkeypatch.setattr(commits, "RETRY_DELAYS", (0.0, *[3600.0] * len(commits.RETRY_DELAYS)))
    attempts: list[int] = []

    def lost() -> Never:
        attempts.append(len(attempts))
        raise TablesUnavailable("the disk is full")

    stopped_while(lambda: InPrefect("m", "p").commit("a group", lost), lambda: len(attempts) == 2)
    assert len(attempts) == 2


def test_an_absent_prefect_server_is_not_waited_for_after_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither between two attempts, nor within one to which the server does not respond."""
    monkeypatch.setattr(grace, "ATTEMPT_EVERY", 3600.0)
    attempts: list[str] = []
    hangs = threading.Event()

    def refused() -> Never:
        attempts.append("refused")
        raise httpx.ConnectError("refused")

    def silent() -> None:
        attempts.append("silent")
        hangs.wait()
        attempts.append("responded")

    stopped_while(lambda: grace.within_grace_period(refused), lambda: attempts)
    stopped_while(lambda: grace.within_grace_period(silent), lambda: len(attempts) == 2)
    assert attempts == ["refused", "silent"]
    hangs.set()


def test_an_absent_model_server_is_not_waited_for_after_the_flow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Not even by a run that has only asked it for the name of its model."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "3600")
    model = VllmAPI(identifier="m", api_url=f"http://127.0.0.1:{free_port()}", chat=False)
    rows = pyarrow.table({"id": [1], "text": ["a"]})
    stopped_while(
        lambda: model.predict_in_db("text", rows, db=tmp_path, predict_id="p"),
        lambda: "no server responds at" in caplog.text,
    )
    assert not [*tmp_path.iterdir()]


def test_busy_gpus_and_other_users_of_a_server_are_not_waited_for_after_the_flow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The first user waits for the GPU of a shared server, and the next ones for the first."""
    caplog.set_level("INFO")
    monkeypatch.setattr(shared_server, "free_devices", partial(free_devices, folder=tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("VLLM_TASKS_GPUS", "1")
    server = SharedServer("m", sys.executable, [], start_timeout=60.0, gpus=1)

    def use() -> Never:
        with server.used():
            pytest.fail("the server was started")

    with (tmp_path / "0").open("w") as gpu:
        fcntl.flock(gpu, fcntl.LOCK_EX)
        stopped_while(use, lambda: "waiting for 1 free GPUs" in caplog.text)
    with (server.folder / "start.lock").open() as start:
        fcntl.flock(start, fcntl.LOCK_EX)
        stopped_while(use, lambda: len(shared_server._held) == 2)
    assert not (server.folder / "server.json").exists()
