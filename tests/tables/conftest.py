"""Fixtures: a model over each kind of store, and the prompts that it sent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.places import Place
from tests.servers.scripted_server import ScriptedServer
from tests.tables.runs import Sent
from vllm_tasks import VllmAPI


@pytest.fixture
def model(server: ScriptedServer, place: Place) -> Iterator[VllmAPI]:
    with VllmAPI(identifier="m", api_url=server.url, db=place.db, retries=0) as model:
        yield model


@pytest.fixture
def sent(server: ScriptedServer) -> Sent:
    return Sent(server)
