"""Shared fixtures: one real engine, one Prefect server, a clean environment."""

from __future__ import annotations

import functools
import gc
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before Prefect is imported: a home of the tests' own, a server that sends no telemetry, and events without
# delay. An actor of Ray's that imports this has its tests' home: killed, it would leave one.
HOME = None if "RAY_RAYLET_PID" in os.environ else tempfile.TemporaryDirectory(prefix="vllm-tasks-prefect-")
if HOME:
    os.environ["PREFECT_HOME"] = HOME.name
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL"] = "0.1"  # 5 s for people
# A server on SQLite (3.7.7) stands still for ever when an automation is saved while this service reads them:
# the commit blocks the event loop of the service, which holds the lock that the commit waits for.
os.environ["PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED"] = "false"
# On CPUs vLLM puts the model into a third process. Without it an engine starts in 17 s instead of 25 (here);
# one thread, because in this mode vLLM does not bind its threads to cores, and many then wait for each other.
VLLM_TOPOLOGY = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
os.environ.update(VLLM_TOPOLOGY)

import hypothesis
import pytest
from prefect.testing.utilities import prefect_test_harness

from tests import places
from tests import site as sites
from tests import tiny_model as tiny_model_file
from tests.eventually import LONG_ENOUGH
from tests.servers.databases import database, pg  # noqa: F401 - fixtures
from tests.servers.postgres import Postgres, binaries, running
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import VllmModel
from vllm_tasks.engines.local.python import interpreter, source_of_vllm

# Two processes on two cores: an example may wait for its turn.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")

ENGINE_PYTHON = "VLLM_TASKS_ENGINE_PYTHON"
"""The setting that chooses the vLLM of the tests: `make test-vllm` sets it."""
TINY_ARGS: dict[str, Any] = {
    "max_model_len": 1024,
    "enforce_eager": True,  # nothing to gain from compiling two layers
    "kv_cache_memory_bytes": 2**28,
    "max_num_seqs": 32,
}


IN_PREFECT = [
    pytest.mark.usefixtures("prefect_server", "prefects_garbage"),
    # Prefect leaves connections of its own to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
    ),
]
"""The marks of a test file that runs flows and tasks."""


SHARED = re.compile(r"\b(local_model|site|ui): ")
"""An argument of a test that is made once in a process, and takes long: an engine, or a site of Prefect."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a real vLLM, which take longest, come first; without vLLM their tests are skipped."""
    long = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: item.path not in long)
    if source_of_vllm(os.environ.get(ENGINE_PYTHON, "")) is None:
        for item in items:
            if item.get_closest_marker("engine"):
                item.add_marker(pytest.mark.skip(reason="needs the real vLLM"))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which may be missing
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, files that share an engine or a site run in one process, too."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    @functools.cache
    def group(file: str) -> str:
        found = SHARED.search((config.rootpath / file).read_text(encoding="utf-8"))
        return {"ui": "site"}.get(found[1], found[1]) if found else file

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group(super()._split_scope(nodeid))

    return Scheduling(config, log)


def pytest_unconfigure() -> None:
    """Remove Prefect's home."""
    if HOME:
        HOME.cleanup()


@pytest.fixture(autouse=True)
def _no_site_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("VLLM_TASKS_") and n != ENGINE_PYTHON]:
        monkeypatch.delenv(name)
    # Functions of this package stand for a site's own in blocks.
    monkeypatch.setenv("VLLM_TASKS_CALLABLE_PREFIXES", '["vllm_tasks", "flows"]')


@pytest.fixture
def all_processes_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that this test starts have all the processes that vLLM makes by default."""
    for name in VLLM_TOPOLOGY:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A real Prefect server with an empty database, for this test session."""
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def ui() -> Iterator[str]:
    """The URL of another real server, with a UI, which starts scheduled and triggered runs."""
    with sites.prefect_with_ui() as url:
        yield url


@pytest.fixture(scope="session")
def site(ui: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[sites.Site]:
    """The same server with the work pools and deployments of this repository, and a worker."""
    with sites.made(ui, tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
def prefects_garbage() -> Iterator[None]:
    """Collected at the end of a file where it is expected, and not in the tests of another one."""
    yield
    gc.collect()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A server that answers every prompt, until the test gives it a script."""
    with ScriptedServer() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny real model."""
    folder = tmp_path_factory.mktemp("tiny")
    python = interpreter(os.environ.get(ENGINE_PYTHON, ""))  # this process's may have no transformers
    subprocess.run([python, tiny_model_file.__file__, folder], check=True, timeout=LONG_ENOUGH)
    return folder


@pytest.fixture(scope="session")
def local_model(tiny_model: Path) -> Iterator[VllmModel]:
    """A model with a real engine that runs for the complete session."""
    model = VllmModel(
        identifier="tiny",
        model_name=str(tiny_model),
        vllm_kwargs=TINY_ARGS,
        predict_kwargs={"temperature": 0, "max_tokens": 8},
    )
    with model:
        yield model


@pytest.fixture(params=places.KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> places.Place:
    """An empty lake, SQLite file or PostgreSQL database."""
    if request.param == "postgres":
        return places.Place(request.getfixturevalue("postgres").new_database())
    return places.Place(
        str(tmp_path / "lake") if request.param == "lake" else f"sqlite:///{tmp_path}/tables.db"
    )


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL server for the complete session."""
    if binaries() is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    with running() as server:
        yield server
