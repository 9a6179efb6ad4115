"""Fixtures for tasks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import VllmAPI


@pytest.fixture
def model(server: ScriptedServer) -> Iterator[VllmAPI]:
    with VllmAPI(identifier="org/model", api_url=server.url) as model:
        yield model
