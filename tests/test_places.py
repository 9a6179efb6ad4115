"""Attacks on `VLLM_TASKS_PLACES`: artifacts, tables, links and logs that lead out of the allowed places."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from tests.servers.scripted_server import Reply, ScriptedServer, refused
from vllm_tasks import Datalayer, InvalidCall, VllmAPI
from vllm_tasks.calls.answers import Artifact
from vllm_tasks.calls.prompts import load_artifact


@pytest.fixture
def allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that files may be in, beside one bucket; a secret is next to it."""
    folder = tmp_path / "allowed"
    folder.mkdir()
    (folder / "rules.txt").write_text("be brief")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "secret.txt").write_text("SECRET")
    (tmp_path / "allowed-not").mkdir()
    monkeypatch.setenv("VLLM_TASKS_PLACES", f'["{folder}", "s3://bucket/ours", "https://host/files/"]')
    return folder


def fill_in(uri: str, server: ScriptedServer) -> str:
    """The prompt that is sent with an artifact in it."""
    with VllmAPI(
        identifier="m",
        api_url=server.url,
        model="m",
        artifacts={"a": Artifact(uri=uri)},
        prompt="{artifacts.a} {input}",
    ) as model:
        model.predict("x")
    return server.posts[-1].prompt


@pytest.mark.parametrize("form", ["{}/rules.txt", "file://{}/rules.txt", "local://{}/../allowed/rules.txt"])
def test_an_artifact_in_an_allowed_place_is_read(allowed: Path, server: ScriptedServer, form: str) -> None:
    """Paths and file URIs count by where they lead."""
    assert fill_in(form.format(allowed), server) == "be brief x"


OUTSIDE = [
    "{0}/secret.txt",
    "file://{0}/secret.txt",
    "file:{0}/secret.txt",
    "local://{0}/secret.txt",
    "FILE://{0}/secret.txt",
    "{0}/allowed/../secret.txt",
    "{0}/allowed/link.txt",
    "{0}/allowed-not/x.txt",
    "simplecache::file://{0}/secret.txt",
    "{0}/allowed/a.zip::file://{0}/secret.txt",
    "zip://x::{0}/allowed/a.zip",
    "s3://bucket/ours/a::file://{0}/secret.txt",
    "s3://bucket/ours/../theirs/x",
    "s3://bucket/oursnot/x",
    "s3://other/ours/x",
    "https://host/files/%2e%2e/x",
    "https://host/files/..\\x",
    "https://host/files@evil/x",
    "https://host.evil/files/x",
    "http://host/files/x",
    "memory://x",
    "data:text/plain,x",
    "~/.ssh/id_rsa",
    "etc/passwd",
    "/etc/passwd",
]


@pytest.mark.parametrize("uri", OUTSIDE)
def test_an_artifact_outside_is_refused_before_it_is_opened(
    allowed: Path, server: ScriptedServer, uri: str
) -> None:
    """Any name, link, chain of filesystems or look-alike is refused with the setting; nothing is sent."""
    with pytest.raises(InvalidCall, match="VLLM_TASKS_PLACES"):
        fill_in(uri.format(allowed.parent), server)
    assert server.requests == []


@pytest.mark.parametrize("url", ["{}", "file://{}", "{}/allowed-not", "sqlite:///{}/x.db", "memory://lake"])
def test_tables_outside_are_refused(allowed: Path, url: str) -> None:
    """Otherwise a lake or an SQLite file could read files that are forbidden to an artifact."""
    with pytest.raises(InvalidCall, match="VLLM_TASKS_PLACES"):
        Datalayer(url=url.format(allowed.parent)).tables()
    Datalayer(url=str(allowed)).tables().close()
    Datalayer(url=f"sqlite:///{allowed}/x.db").tables().close()


def test_an_artifact_that_was_read_before_is_refused_too(
    allowed: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached file is refused, too, when the permission ends."""
    fill_in(f"{allowed}/rules.txt", server)
    monkeypatch.setenv("VLLM_TASKS_PLACES", '["/nowhere"]')
    with pytest.raises(InvalidCall, match="VLLM_TASKS_PLACES"):
        fill_in(f"{allowed}/rules.txt", server)


def read(lake: Path, select: str) -> list[Any]:
    tables = Datalayer(url=str(lake)).tables()
    try:
        return [row for page in tables.read(select) for row in page]
    finally:
        tables.close()


@pytest.mark.parametrize(
    "select",
    [
        "link.csv",
        "*.csv",
        "{a,../other}/x.csv",
        "..%2fsecret.csv",
        "..\\secret.csv",
        "SELECT 1 AS id, content AS text FROM read_text('{lake}/link.csv')",
        "SELECT * FROM read_csv('{lake}/*/../../secret.csv', all_varchar = true)",
        "SELECT * FROM query_table('{lake}/../secret.csv')",
        "SELECT * FROM glob('{lake}/../*')",
        "SELECT * FROM sniff_csv('{lake}/../secret.csv')",
        "SELECT getenv('HOME') AS text",
    ],
)
def test_links_and_functions_lead_out_of_no_place(
    tmp_path: Path, select: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link (followed within VLLM_TASKS_PLACES), a glob or a function cannot read a file outside."""
    lake = tmp_path / "lake"
    lake.mkdir()
    monkeypatch.setenv("VLLM_TASKS_PLACES", json.dumps([str(lake)]))
    (tmp_path / "secret.csv").write_text("id,text\n1,SECRET\n")
    (lake / "link.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(InvalidCall) as refused:
        read(lake, select.replace("{lake}", str(lake)))
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("way", ["../../secret.parquet", "..%2F..%2Fsecret.parquet"])
def test_the_log_of_a_delta_table_leads_out_of_no_lake(tmp_path: Path, way: str) -> None:
    """A table of unknown origin may name any file in its log."""
    lake = tmp_path / "lake"
    pq.write_table(pa.table({"id": [1], "text": ["SECRET"]}), tmp_path / "secret.parquet")
    write_deltalake(str(lake / "t"), pa.table({"id": [2], "text": ["own"]}))
    (log,) = (lake / "t" / "_delta_log").glob("*.json")
    own = next(json.loads(line)["add"] for line in log.read_text().splitlines() if '"add"' in line)
    assert read(lake, "t") == [{"id": 2, "text": "own"}]
    log.write_text(log.read_text().replace(own["path"], way))
    with pytest.raises(InvalidCall, match="not in it"):
        read(lake, "t")


SIGNED = "/x?sig=SECRET"


def test_an_artifact_that_a_server_refuses_shows_no_signature(server: ScriptedServer) -> None:
    """The error of the client for the web has the complete address."""
    replies = [Reply(b"be brief"), refused(403, "no")]
    server.script = lambda _: replies.pop(0)
    with pytest.raises(InvalidCall, match=r"x\?\.\.\.' cannot be read as str: 403") as told:
        load_artifact(server.url + SIGNED, "str")
    assert "SECRET" not in "".join(traceback.format_exception(told.value))
