"""A key and a password are searched for wherever this package, or Prefect for it, stores text.

Flows are run, and most of them fail. Then everything that they left is searched as bytes: the database of
Prefect (logs, artifacts, parameters, names, events, block documents), its results, the lake, the terminal.
"""

from __future__ import annotations

import base64
import gc
import json
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import psutil
import pytest
from prefect import flow, get_client
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_LOCAL_STORAGE_PATH,
)
from pydantic import SecretStr, ValidationError

from tests.conftest import IN_PREFECT
from tests.places import Place
from tests.servers.scripted_server import Raw, Reply, ScriptedServer, refused
from vllm_tasks import (
    Artifact,
    Datalayer,
    Dataset,
    Metric,
    Validation,
    VllmAPI,
    VllmModel,
    predict_batches,
    predict_in_db,
    validate,
)
from vllm_tasks.calls.sampling import known_names
from vllm_tasks.engines.local import process
from vllm_tasks.errors import VllmTasksError
from vllm_tasks.placement import payload, storage
from vllm_tasks.tables.arguments import datalayer_of

pytestmark = [
    *IN_PREFECT,
    # As its sockets: Prefect leaves the connections of its clients to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <function _SelectorTransport:pytest.PytestUnraisableExceptionWarning"
    ),
]

KEY = "sk-KEY/0123+456=789"
PASSWORD = "pass/w@rd#7'x"
MARK = f"mark-{uuid4()}"
"""What is surely left behind, so that the search is seen to find."""
LOGGED = f"logged-{uuid4()}"


def forms(secret: str) -> set[bytes]:
    """The forms of a secret: raw, in JSON, in a URL, in base64 (as in a header), and its plain parts."""
    parts = [
        part
        for part in secret.replace("/", "@").replace("#", "@").replace("'", "@").split("@")
        if len(part) > 3
    ]
    texts = {secret, json.dumps(secret)[1:-1], quote(secret, safe=""), quote(secret), *parts}
    return {text.encode() for text in texts} | {base64.b64encode(secret.encode())[:-4]}


SECRETS = {form for secret in (KEY, PASSWORD) for form in forms(secret)} - {b"pass"}


def found_in(content: bytes | str) -> list[bytes]:
    content = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    return [form for form in SECRETS if form in content]


def url_of(port: int, password: str = PASSWORD) -> str:
    return f"postgresql://someone:{quote(password, safe='')}@127.0.0.1:{port}/crm?sslmode=disable"


@contextmanager
def refusing_postgres() -> Iterator[int]:
    """The port of a server that requests a password, reads it and refuses it, as PostgreSQL does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(9999)
                    connection.sendall(b"R\0\0\0\x08\0\0\0\x03")
                    connection.recv(9999)
                    words = b"SFATAL\0VFATAL\0C28P01\0Mpassword authentication failed for user\0\0"
                    connection.sendall(b"E" + (4 + len(words)).to_bytes(4, "big") + words)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Path:
    """A folder for the files that the flows leave behind."""
    # From vLLM's source, now: CPython 3.11 parses nothing while it reports the garbage of Prefect.
    known_names("local")
    return tmp_path_factory.mktemp("left")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short timeouts, so that nobody waits long for a missing server."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.1")


@flow(persist_result=True, log_prints=True, flow_run_name="{name}")
def job(name: str, model: VllmAPI, db: Datalayer | None = None, select: str = "rows") -> Any:
    """Possible steps of a user's flow with a model that has a key and a datalayer that has a password."""
    get_run_logger().warning("%s %s %r %r", LOGGED, name, model, db)
    print(model, db)
    create_markdown_artifact(f"{MARK} {model} {db}", key="shown")
    table = predict_in_db.with_options(retries=0)(
        model, "text", select, db=db, predict_id="out", overwrite=True
    )
    answers = predict_batches.with_options(retries=0)(model, ["a", "b"])
    return str(table), answers


@flow(flow_run_name="{name}")
def validated(name: str, model: VllmAPI, db: Datalayer) -> str:
    """The snapshot of a data set is next to the outputs."""
    of = Validation(
        datasets=[Dataset(identifier="d", raw_data=[{"q": "a", "a": "b"}])],
        metrics=[Metric(identifier="exact_match")],
        key=("q", "a"),
    )
    return str(validate(model, of, db=db))


TROUBLE: dict[str, Any] = {
    "unauthorised": refused(401, f"wrong key {KEY}"),
    "echoed": Reply({"headers": {"Authorization": f"Bearer {KEY}"}}),
    "redirected": Reply(status=302, headers={"Location": f"http://127.0.0.1:1/?key={KEY}"}),
    "garbled": Raw(f"HTTP/1.1 200 {KEY}\r\nAuthorization: {KEY}\r\nContent-Length: 9\r\n\r\n{{".encode()),
}


def tell(work: Callable[[], Any]) -> str:
    """All text of the exception that `work` raises, causes included, or of its result."""
    try:
        given = work()
    except (VllmTasksError, ValidationError) as error:
        more = vars(error)
        return f"{error} {error!r} {more} " + "".join(traceback.format_exception(error))
    return f"{given} {given!r}"


@pytest.mark.usefixtures("quick")
def test_no_run_leaves_a_secret_behind(
    left: Path, server: ScriptedServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Runs that succeed and runs that fail leave no key and no password in any file."""
    caplog.set_level(logging.DEBUG)
    lake = Place(str(left / "lake"))
    lake.fill_texts("a", "b")
    Datalayer(url=SecretStr(url_of(1))).save("secret-db", overwrite=True)
    fields: dict[str, Any] = {"identifier": MARK, "api_url": server.url, "api_key": KEY, "retries": 0}
    fields["headers"] = {"X-Api-Key": KEY}
    VllmAPI(**fields, db=lake.db).save("secret-model", overwrite=True)
    saved = VllmAPI.load("secret-model")
    assert isinstance(saved, VllmAPI)
    said = [tell(lambda: job("good", saved, lake.db)), tell(lambda: validated("validated", saved, lake.db))]
    assert "2 rows succeeded" in said[0]
    sent = {(a.headers["Authorization"], a.headers["X-Api-Key"]) for a in server.requests}
    assert sent == {(f"Bearer {KEY}", KEY)}
    for name, deed in TROUBLE.items():
        server.script = lambda asked, deed=deed: deed if asked.path == "/v1/completions" else None  # type: ignore[misc]
        said.append(tell(lambda name=name: job(name, VllmAPI(**fields), lake.db)))  # type: ignore[misc]
    server.script = lambda _: None
    with refusing_postgres() as port:
        said.append(tell(lambda: job("wrong-password", saved, Datalayer(url=SecretStr(url_of(port))))))
        said.append(tell(lambda: job("no-database", saved, Datalayer.load("secret-db"))))  # type: ignore[arg-type]
    assert "password authentication failed" in said[-2]
    away = VllmAPI(**{**fields, "api_url": "http://127.0.0.1:1"}, model="m")
    said.append(tell(lambda: job("away", away, lake.db)))
    said.append(tell(lambda: job("no-table", saved, lake.db, select=f"SELECT * FROM {MARK}")))
    assert not found_in("".join(said))
    assert len([words for words in said if "Traceback" in words]) == 8
    saved.close()
    assert MARK in caplog.text
    assert not found_in(caplog.text + "".join(capfd.readouterr()))
    assert not left_in_prefect()
    gc.collect()  # Prefect's connections, here and not in another test
    assert not {file: found for file in lake_files(left) if (found := found_in(file.read_bytes()))}


def left_in_prefect() -> dict[str, list[bytes]]:
    """Files of Prefect that contain a secret; a known marker must be found in them first."""
    APILogWorker.drain_all()
    database = Path(str(PREFECT_API_DATABASE_CONNECTION_URL.value()).partition(":///")[2])
    deadline = time.monotonic() + 20
    while not all(mark in _contents(database) for mark in (MARK.encode(), LOGGED.encode())):
        assert time.monotonic() < deadline, "the marks are not in Prefect's database"
        time.sleep(0.2)
    storage = Path(PREFECT_LOCAL_STORAGE_PATH.value())
    files = [*database.parent.glob(f"{database.name}*"), *(p for p in storage.rglob("*") if p.is_file())]
    return {str(file): found for file in files if (found := found_in(file.read_bytes()))}


def _contents(database: Path) -> bytes:
    return b"".join(file.read_bytes() for file in database.parent.glob(f"{database.name}*"))


def lake_files(folder: Path) -> list[Path]:
    found = [file for file in folder.rglob("*") if file.is_file()]
    assert any("_delta_log" in file.parts for file in found)
    assert any("_dataset__d" in str(file) for file in found)
    return found


def test_what_travels_to_another_flow_run_has_no_secret(left: Path) -> None:
    """A key or a password is refused, unless it is in a saved block, which travels as a reference."""
    model = VllmAPI(identifier="m", api_key=KEY, api_url="http://x")
    others = [
        VllmAPI(identifier="m", headers={"X": KEY}, api_url="http://x"),
        VllmAPI(identifier="m", basic_auth=f"u:{KEY}", api_url="http://x"),
    ]
    gives = [partial(payload.model_parameter, each) for each in (model, *others)]
    for name in ("hf_token", "hf-token", "HF_TOKEN", "api-key"):
        local = VllmModel(identifier="m", model_name="m", vllm_kwargs={name: KEY})
        gives.append(partial(payload.model_parameter, local))
    for give in (*gives, lambda: payload.db_parameter(url_of(1))):
        words = tell(give)
        assert "readable in the parameters" in words
        assert not found_in(words)
    rows = storage.store({"prompts": ["p"], "sampling": {}})
    stored = Path(PREFECT_LOCAL_STORAGE_PATH.value()) / rows
    assert json.loads(stored.read_bytes()) == {"prompts": ["p"], "sampling": {}}
    assert not found_in(stored.read_bytes())
    stored.unlink()


URL = f"postgresql://u:{PASSWORD}@h/d"
WRONG: dict[str, Callable[[], Any]] = {
    "a URL for a datalayer": lambda: VllmAPI(identifier="m", db=URL),
    "a misspelt field of a datalayer": lambda: VllmAPI(identifier="m", db={"uri": URL}),
    "the same, alone": lambda: Datalayer(uri=URL),  # type: ignore[call-arg]
    "a list of URLs": lambda: Datalayer(url=[URL]),  # type: ignore[arg-type]
    "a password apart": lambda: Datalayer(url="postgresql://u@h/d", password=PASSWORD),  # type: ignore[call-arg, arg-type]
    "not a SQLAlchemy URL": lambda: Datalayer(url=SecretStr(f"postgresql://u:{PASSWORD}@h:x/d")).tables(),
    "the URL of a data set": lambda: Dataset(identifier="d", select="t", db=URL),
    "a data set without a source": lambda: Dataset(identifier="d", db=URL),
    "a data set in a model": lambda: VllmAPI(
        identifier="m",
        validation={"datasets": [{"identifier": "d", "db": URL}], "metrics": [], "key": ["q", "a"]},
    ),
    "a db of bytes": lambda: datalayer_of(URL.encode(), VllmAPI(identifier="m")),  # type: ignore[arg-type]
    "user and password for a server": lambda: VllmAPI(identifier="m", api_url=f"http://u:{PASSWORD}@h"),
    "the same without a scheme": lambda: VllmAPI(identifier="m", api_url=f"u:{PASSWORD}@h:80"),
    "the same among others": lambda: VllmAPI(identifier="m", api_url=["http://a", f"http://u:{PASSWORD}@h"]),
    "a key in a query": lambda: VllmAPI(identifier="m", api_url=f"http://h/v1?key={KEY}"),
    "a key in a list": lambda: VllmAPI(identifier="m", api_key=[KEY]),
    "a list of headers": lambda: VllmAPI(identifier="m", headers=[KEY]),
    "a key as the name of a header": lambda: VllmAPI(identifier="m", api_key=KEY, headers={"a b": KEY}),
    "a password twice": lambda: VllmAPI(identifier="m", basic_auth=f"u:{PASSWORD}", api_key=KEY),
    "a key elsewhere": lambda: VllmAPI(identifier="m", apikey=KEY),
    "a key of control characters": lambda: VllmAPI(
        identifier="m", api_url="http://x", api_key=KEY + "\n"
    ).predict("x"),
    "a password of an artifact": lambda: VllmAPI(
        identifier="m", artifacts={"a": {"uri": f"https://u:{PASSWORD}@h/x"}}
    ),
    "a misspelt artifact": lambda: VllmAPI(
        identifier="m", artifacts={"a": {"url": f"https://u:{PASSWORD}@h/x"}}
    ),
    "a signed artifact that is not there": lambda: VllmAPI(
        identifier="m",
        api_url="http://x",
        artifacts={"a": Artifact(uri=f"http://127.0.0.1:1/x?sig={quote(KEY)}")},
        prompt="{artifacts.a} {input}",
    ).predict("x"),
    "engine arguments that are no dict": lambda: VllmModel(identifier="m", vllm_kwargs=["hf_token", KEY]),  # type: ignore[arg-type]
    "options of Ray that are no dict": lambda: VllmModel(identifier="m", ray_config=[KEY]),  # type: ignore[arg-type]
    "an environment that is no dict": lambda: VllmModel(identifier="m", compute_kwargs={"env": [KEY]}),
    "a lake that is not there": lambda: Datalayer(
        url=SecretStr(f"http://u:{PASSWORD}@127.0.0.1:1/x")
    ).outputs("m"),
    "a lake with a query": lambda: Datalayer(url=SecretStr(f"http://127.0.0.1:1/x?sig={KEY}")).outputs("m"),
    "a token of DuckDB": lambda: Datalayer(url=SecretStr(f"duckdb:///m.db?motherduck_token={KEY}")).tables(),
    "a model that is right": lambda: VllmAPI(identifier="m", api_key=KEY, db={"url": URL}),
    "an engine's token": lambda: VllmModel(identifier="m", model_name="m", vllm_kwargs={"hf_token": KEY}),
}


@pytest.mark.parametrize("what", WRONG)
def test_no_error_of_a_call_shows_a_secret(what: str) -> None:
    """For any misplaced secret, the error, its causes and the repr do not contain it."""
    words = tell(WRONG[what])
    assert not found_in(words), words
    assert "m" in words


def test_no_child_process_has_the_key_of_a_model(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An engine's process has neither a server's key nor a token in its command line or environment."""
    monkeypatch.setattr(process, "HOST", Path(__file__).parent / "servers/scripted_host.py")
    keyed = VllmAPI(identifier="k", api_url=server.url, model="m", api_key=KEY)
    arguments = {"log": str(tmp_path / "log"), "hf_token": KEY}
    with (
        keyed,
        VllmModel(
            identifier="m", model_name="m", vllm_kwargs=arguments, compute_kwargs={"num_gpus": 0}
        ) as model,
    ):
        keyed.predict("x")
        model.predict("x")
        children = psutil.Process(os.getpid()).children(recursive=True)
        seen = [(" ".join(child.cmdline()), child.environ()) for child in children]
    assert any("scripted_host.py" in command for command, _ in seen)
    assert not found_in(str(seen))


def test_a_saved_key_is_read_by_nobody_without_asking_for_it(left: Path) -> None:
    """The UI and the API do not return it with a block, its fields' schema or its references."""
    VllmAPI(identifier="m", api_key=KEY, headers={"X": KEY}, db={"url": URL}).save(
        "shown-model", overwrite=True
    )
    with get_client(sync_client=True) as client:
        shown = client.read_block_document_by_name("shown-model", "vllm-api", include_secrets=False)
        listed = client.read_block_documents(include_secrets=False)
    assert not found_in(shown.model_dump_json())
    assert not found_in("".join(each.model_dump_json() for each in listed))
    assert not found_in(repr(VllmAPI.load("shown-model")))
