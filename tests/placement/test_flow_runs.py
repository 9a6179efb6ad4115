"""Both sides of a step that runs elsewhere, without a worker: effects of a busy or absent Prefect."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from tests.conftest import IN_PREFECT
from tests.lettered import lettered
from tests.servers.pool_workers import pool
from tests.servers.scripted_server import NO_TEMPLATE, ScriptedServer, refused
from vllm_tasks import Artifact, Classes, Datalayer, InvalidCall, VllmAPI, VllmModel
from vllm_tasks.placement import grace, payload, runs, storage
from vllm_tasks.placement.heartbeat import KIND, Heartbeat, read_heartbeats
from vllm_tasks.placement.part import Part
from vllm_tasks.placement.requests import _as_data
from vllm_tasks.placement.runs import START_TIMEOUT, Runs
from vllm_tasks.placement.target import MADE_FOR, Target, target_of
from vllm_tasks.pools.step import rows, step
from vllm_tasks.rows import Request, Result, RowError

pytestmark = [
    *IN_PREFECT,
    # Outside of a flow, Prefect leaves the client that makes a run to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <function _SelectorTransport:pytest.PytestUnraisableExceptionWarning"
    ),
]
POOL = "without-workers"
LONGER = 2.5
"""Seconds: more than Prefect's client takes to give up a server that it has not met yet."""


@pytest.fixture(scope="module")
def target(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with pool(POOL, tmp_path_factory.mktemp("nobody") / "log"):
        found = target_of(there(POOL))
        assert found is not None
        yield found


@pytest.fixture
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def there(pool: str) -> VllmAPI:
    return VllmAPI(identifier="m", api_url="http://127.0.0.1:9", compute_kwargs={"work_pool": pool})


class Absent:
    """Prefect's server, at an address that does not respond until it `comes`."""

    def __enter__(self) -> Absent:
        port = urlsplit(PREFECT_API_URL.value() or "").port
        assert port is not None
        self._server = ("127.0.0.1", port)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/api"
        self._settings = temporary_settings({PREFECT_API_URL: url})
        self._settings.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._settings.__exit__(*error)
        self._serving.join()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def comes(self, after: float) -> None:
        """Start the server after so many seconds."""
        self._serving = threading.Timer(after, self._serve)
        self._serving.start()

    def _serve(self) -> None:
        self._socket.listen()
        threading.Thread(target=self._accept).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                server = socket.create_connection(self._server)
                for one, other in (client, server), (server, client):
                    threading.Thread(target=pass_on, args=(one, other)).start()


def pass_on(one: socket.socket, other: socket.socket) -> None:
    """Forward everything, to the end."""
    with one, suppress(OSError):
        while data := one.recv(2**16):
            other.sendall(data)
        other.shutdown(socket.SHUT_RDWR)


# ---------------------------------------------------------------------- Prefect's server


def test_more_runs_are_seen_than_prefect_tells_of_at_once(client: SyncPrefectClient, target: Target) -> None:
    """Prefect returns 200 objects per request and refuses more."""
    parts = [Part(f"part {i}", {}, run=uuid4()) for i in range(210)]
    last = parts[-1]
    last.run = client.create_flow_run(step, parameters={"call": "{}"}).id
    client.create_artifact(ArtifactCreate(type=KIND, data={"outcome": "told"}, flow_run_id=last.run))
    Runs(target, parts, repeatable=False, on_progress=lambda _: None)._poll()
    assert last.outcome == "told"
    assert {str(part.state and part.state.message) for part in parts[:-1]} == {"It was deleted."}


def test_a_server_that_is_away_is_waited_for(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is created and reports its outcome, even if Prefect is away or too busy at first."""
    monkeypatch.setattr(grace, "ATTEMPT_EVERY", 0.1)
    answers = [httpx.Response(code, request=httpx.Request("GET", "http://prefect")) for code in (500, 200)]
    grace.within_grace_period(lambda: answers.pop(0).raise_for_status())
    with pytest.raises(httpx.HTTPStatusError):
        grace.within_grace_period(
            lambda: httpx.Response(404, request=httpx.Request("GET", "/")).raise_for_status()
        )
    part = Part("waited for", {"call": "{}"})
    looking = Runs(target, [part], repeatable=True, on_progress=lambda _: None)
    with Absent() as server:
        server.comes(LONGER)
        looking._start(part)
    assert part.run is not None
    with Heartbeat(part.run, 3600) as heartbeat, Absent() as server:
        server.comes(LONGER)
        heartbeat.settle("done")
    looking._poll()
    assert part.outcome == "done"


def test_a_run_that_was_asked_for_twice_is_one(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The response to a creation may be lost, and Prefect's client repeats the request."""
    made: list[UUID] = []
    ask = runs.run_deployment

    def twice(**how: Any) -> Any:
        made.extend(ask(**how).id for _ in range(2))
        return ask(**how)

    monkeypatch.setattr(runs, "run_deployment", twice)
    part = Part("twice", {"call": "{}"})
    Runs(target, [part], repeatable=True, on_progress=lambda _: None)._start(part)
    assert made == [part.run] * 2


def test_a_heartbeat_that_was_made_twice_is_one(client: SyncPrefectClient, target: Target) -> None:
    """The artifact with the newest heartbeat counts, in any order of Prefect's list."""
    run = client.create_flow_run(step, parameters={"call": "{}"}).id
    for beat in (*[0] * 4, 7, *[0] * 4):
        client.create_artifact(ArtifactCreate(type=KIND, data={"beat": beat}, flow_run_id=run))
    assert read_heartbeats(client, [run]) == {run: {"beat": 7}}


class Interrupted(BaseException):
    pass


def test_an_interrupt_waits_for_the_run_that_is_being_made() -> None:
    """Otherwise nobody would know of the run and cancel it."""
    made: list[str] = []

    def make() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        time.sleep(0.5)
        made.append("a run")

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interrupted):
            grace.in_thread(make, START_TIMEOUT)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert made == ["a run"]


# ---------------------------------------------------------------------- where to


def test_a_subflow_is_where_its_flow_is(
    client: SyncPrefectClient, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subflow has no pool of its own, but runs in the process that a worker of the pool has started."""
    model = there(POOL)

    @flow
    def sub() -> Target | None:
        return target_of(model)

    @flow
    def main() -> Target | None:
        return sub()

    assert main() == target
    deployed = client.create_flow_run_from_deployment(target.deployment, parameters={"call": "{}"})
    monkeypatch.setenv(MADE_FOR, str(deployed.id))
    assert main() is None
    monkeypatch.setenv(MADE_FOR, str(uuid4()))  # a run of another server
    assert main() == target


@pytest.mark.usefixtures("target")
def test_a_place_that_is_not_there_is_told_with_the_nearest() -> None:
    """A misspelt pool, and a deployment that can be none."""
    with pytest.raises(InvalidCall, match=f"nor the work pool; did you mean '{POOL}'"):
        target_of(there(POOL[:-1]))
    with pytest.raises(ValueError, match="deployment='x', which is not of the form 'FLOW/DEPLOYMENT'"):
        VllmAPI(identifier="m", compute_kwargs={"deployment": "x"})


# ---------------------------------------------------------------------- what travels


@pytest.mark.usefixtures("prefect_server")
def test_a_saved_model_is_found_though_prefect_is_away_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grace, "ATTEMPT_EVERY", 0.1)
    name = f"model-{uuid4().hex[:6]}"
    there(POOL).save(name)
    try:
        loaded = VllmAPI.load(name)
        with Absent() as server:
            server.comes(LONGER)
            assert payload.model_parameter(loaded).keys() == {"$ref"}
    finally:
        VllmAPI.delete(name)


@pytest.mark.usefixtures("prefect_server")
def test_texts_travel_without_what_only_chats_take(server: ScriptedServer) -> None:
    """That a chat is answered without thinking is asked for where it is known that a text becomes a chat."""
    server.tokenizes, server.script = refused(400, NO_TEMPLATE), lettered(lambda _: (0.75, 0.25))
    model = VllmAPI(identifier="m", api_url=server.url, datatype=Classes(["a", "b"]), retries=0)

    def on_the_pool(requests: Sequence[Request | RowError]) -> list[Result]:
        sent = storage.store(_as_data([r for r in requests if isinstance(r, Request)], call.sampling))
        found: Any = payload.results_of(storage.load(rows({"rows": sent}, model, None)))
        return found

    with model:
        call = replace(model.prepare(model.predict_batches), answerer=on_the_pool)
        (found,) = call.predict_batches(["x"])
    assert found["label"] == "a"
    assert "chat_template_kwargs" not in server.posts[0].body


def test_rows_on_their_way_can_be_removed() -> None:
    """The step removes the rows that it has sent and received; missing files are no failure."""
    path = storage.store({"prompts": ["p"]})
    file = Path(PREFECT_LOCAL_STORAGE_PATH.value(), path)
    assert file.exists()
    storage.discard(path)
    assert not file.exists()
    storage.discard(path)
    with pytest.raises(InvalidCall, match="is not in the result storage"):
        storage.load(path)


def test_only_files_of_rows_are_read_and_removed(tmp_path: Path) -> None:
    """A path from another flow run may lead anywhere."""
    other = tmp_path / "other.json"
    other.write_text("{}")
    for path in str(other), f"vllm-tasks/../{other.name}", f"vllm-tasks/../../{uuid4()}.json":
        storage.discard(path)
        with pytest.raises(InvalidCall, match="is not a file of rows"):
            storage.load(path)
    assert other.exists()


@pytest.mark.parametrize("url", ["data", "sqlite:///data/tables.db"])
def test_a_saved_folder_that_a_worker_would_not_find_is_refused(url: str, prefect_server: None) -> None:
    """A relative path is another folder on the worker; without a block it travels as a full path."""
    name = f"folder-{uuid4().hex[:6]}"
    Datalayer(url=url).save(name)  # type: ignore[arg-type]
    try:
        with pytest.raises(InvalidCall, match=r"save it with the full path, such as '/.*data"):
            payload.db_parameter(Datalayer.load(name))
    finally:
        Datalayer.delete(name)
    sent = payload.db_parameter(url)
    assert sent is not None
    assert Path.cwd().joinpath("data").as_posix() in sent["url"]


@pytest.mark.parametrize(
    "model",
    [
        VllmModel(
            identifier="m",
            model_name="x",
            on_ray=True,
            ray_config={"num_gpus": 0, "runtime_env": {"env_vars": {"HF_TOKEN": "hidden"}}},
        ),
        VllmAPI(identifier="m", artifacts={"a": Artifact(uri="https://h/a?signature=hidden")}),
    ],
)
def test_values_that_may_be_secrets_do_not_travel(model: VllmAPI | VllmModel) -> None:
    """The environment of Ray's actors, and addresses with a key: they would stand in readable parameters."""
    with pytest.raises(InvalidCall, match="would be readable") as caught:
        payload.model_parameter(model)
    assert "hidden" not in str(caught.value)
