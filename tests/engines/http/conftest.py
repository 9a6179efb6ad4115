"""Fixtures for rows over HTTP: short waits, models and a second server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.http.deeds import Make
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import VllmAPI
from vllm_tasks.engines.http import attempts, capacity, servers


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits; the order of events stays the same."""
    monkeypatch.setattr(attempts, "BACKOFF_BASE", 0.02)
    monkeypatch.setattr(capacity, "HOLD", 0.1)
    monkeypatch.setattr(servers, "PROBE_EVERY", 0.05)
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "20")


@pytest.fixture
def other() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def api(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes a `VllmAPI` of the server, with one retry, and closes it after the test."""
    made: list[VllmAPI] = []

    def make(api_url: str | list[str] = "", **fields: Any) -> VllmAPI:
        fields = {"model": "m", "retries": 1, "timeout": 60, **fields}
        made.append(VllmAPI(identifier="a", api_url=api_url or server.url + "/v1/completions", **fields))
        return made[-1]

    yield make
    for model in made:
        model.close()
