"""Fixtures: a folder for servers, and a server that stands in for vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.eventually import eventually
from tests.serving.processes import STAND_IN, is_alive, pids_of
from vllm_tasks import VllmModel
from vllm_tasks.serving import shared_server


@pytest.fixture(autouse=True)
def servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of all servers of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vllm_tasks" / "servers"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., VllmModel]]:
    """Makes models whose server is the stand-in; no two of its processes ever lived at once."""
    monkeypatch.setattr(shared_server, "SERVER", STAND_IN)
    record = tmp_path / "record"

    def model(**kwargs: Any) -> VllmModel:
        return VllmModel(identifier="scripted", model_name="m", vllm_kwargs={"record": str(record), **kwargs})

    yield model
    assert "TWO" not in record.read_text()
    assert eventually(lambda: not any(map(is_alive, pids_of(record))))
