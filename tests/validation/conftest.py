"""Fixtures: a model whose answers a test decides, a model that answers a quiz, and stores."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.places import Place
from tests.servers.scripted_server import MODEL, ScriptedServer
from tests.validation.exam import Make, Pupil
from tests.validation.quiz import right_of, said
from vllm_tasks import Datalayer, VllmAPI


@pytest.fixture
def pupil(server: ScriptedServer) -> Pupil:
    server.script = pupil = Pupil()
    return pupil


@pytest.fixture
def here(tmp_path: Path) -> Place:
    """A single store, for tests in which the kind of table does not matter."""
    return Place(f"sqlite:///{tmp_path}/tables.db")


@pytest.fixture
def make(server: ScriptedServer) -> Iterator[Make]:
    """Makes models that ask the server, and closes them."""
    made = []

    def of(place: Place, **fields: Any) -> VllmAPI:
        if place.url.startswith("sqlite"):
            Path(place.url.removeprefix("sqlite:///")).touch()
        given = {"identifier": "m", "api_url": server.url, "model": MODEL, "db": place.db, "retries": 0}
        made.append(VllmAPI(**{**given, **fields}))
        return made[-1]

    yield of
    for model in made:
        model.close()


@pytest.fixture
def name() -> str:
    """A name that no other test of the session's server uses."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def lake(tmp_path: Path) -> Datalayer:
    return Datalayer(url=str(tmp_path / "lake"))


@pytest.fixture
def model(server: ScriptedServer, lake: Datalayer, name: str) -> Iterator[VllmAPI]:
    """Eight of ten answers are right."""
    server.script = said(right_of(8))
    with VllmAPI(identifier=name, api_url=server.url, db=lake, model="x", retries=0) as model:
        yield model
