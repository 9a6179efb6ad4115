"""`init` writes a folder whose deployments a worker runs, and nothing in it starts by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

from tests.cli.conftest import Command
from tests.servers.scripted_server import ScriptedServer, answer_to
from tests.site import Site
from vllm_tasks import Datalayer, Validation
from vllm_tasks._cli import project

PROMPT = "Name the topic of this ticket in one word.\n"
TEXTS = {
    "1": "The printer on the second floor prints nothing.",
    "2": "I cannot log in since this morning.",
    "3": "Please send the invoice of October again.",
}


def test_a_folder_is_written_once(command: Command, tmp_path: Path) -> None:
    """It is created; a second time its files are named, and stay as they are."""
    folder = tmp_path / "new" / "jobs"
    code, printed = command("init", str(folder))
    assert (code, f"wrote {folder / 'prefect.yaml'}" in printed) == (0, True), printed
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == set(project.FILES)
    (folder / "tickets.py").write_text("mine\n")
    (folder / "README.md").unlink()
    code, printed = command("init", str(folder))
    assert (code, "has prefect.yaml, tickets.py, data/tickets.csv already" in printed) == (2, True), printed
    assert (folder / "tickets.py").read_text() == "mine\n"
    assert not (folder / "README.md").exists()


def test_the_current_folder_is_the_default(command: Command, tmp_path: Path) -> None:
    """Other files in it do not matter."""
    assert command("init")[0] == 0
    assert (tmp_path / "prefect.yaml").is_file()


def test_a_file_is_no_folder(command: Command, tmp_path: Path) -> None:
    """The error names it."""
    (tmp_path / "taken").touch()
    code, printed = command("init", "taken")
    assert (code, "taken cannot be written" in printed) == (2, True), printed


@pytest.mark.parametrize("name", ["tickets.py", "data", "README.md"])
def test_nothing_is_written_behind_a_link(command: Command, tmp_path: Path, name: str) -> None:
    """Neither into a folder elsewhere, nor where a link leads to nothing yet; no other file is written."""
    folder, elsewhere = tmp_path / "jobs", tmp_path / "elsewhere"
    folder.mkdir()
    if name == "data":
        elsewhere.mkdir()
    (folder / name).symlink_to(elsewhere)
    code, printed = command("init", str(folder))
    assert (code, name in printed) == (2, True), printed
    assert [p.name for p in folder.iterdir()] == [name]
    assert not elsewhere.exists() or not [*elsewhere.iterdir()]


def test_nothing_starts_by_itself() -> None:
    """There are no triggers, and no active schedules; each start has the parameters of its flow."""
    found = yaml.safe_load((project.TEMPLATE / "prefect.yaml").read_text())
    assert "pull" not in found
    for deployment in found["deployments"]:
        assert "triggers" not in deployment
        assert [schedule["active"] for schedule in deployment["schedules"]] == [False]
        if ":" in deployment["entrypoint"]:
            continue
        assert deployment["pull"] == [{"prefect.deployments.steps.set_working_directory": {"directory": "."}}]
        schema = load_flow_from_entrypoint(deployment["entrypoint"]).parameters
        given = deployment["schedules"][0]["parameters"]
        assert set(schema.required) <= given.keys() <= schema.properties.keys()
        if "validation" in given:
            Validation(**given["validation"])


@pytest.fixture(scope="module")
def folder(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `init` has written, with its deployments on the server."""
    folder = tmp_path_factory.mktemp("stranger") / "jobs"
    site.command("-m", "vllm_tasks", "init", str(folder))
    site.command("-m", "prefect", "--no-prompt", "deploy", "--all", cwd=folder)
    return folder


@pytest.mark.long
def test_its_flow_runs_on_a_worker(site: Site, folder: Path, server: ScriptedServer) -> None:
    """The worker was started in another folder."""
    run = site.start("tickets/mine", api_url=server.url)
    assert run["state_name"] == "Completed", run["state"]["message"]
    outputs = Datalayer(url=str(folder / "data")).outputs("topics").to_pylist()
    assert {row["id"]: row["output"] for row in outputs} == {
        key: answer_to(PROMPT + text) for key, text in TEXTS.items()
    }


@pytest.mark.long
def test_flows_of_the_package_run_on_a_worker(site: Site, folder: Path, server: ScriptedServer) -> None:
    """From the installed package, whatever the folder."""
    db = {"$ref": {"block_document_id": site.save("vllm-datalayer", "of-init", url=str(folder / "data"))}}
    model = site.save("vllm-api", "of-init", identifier="of-init", api_url=server.url, db=db)
    given: dict[str, Any] = {
        "model": {"$ref": {"block_document_id": model}},
        "X": "text",
        "select": "tickets",
    }
    run = site.start("batch-predict/tickets", **given)
    assert run["state_name"] == "Completed", run["state"]["message"]
    assert Datalayer(url=str(folder / "data")).outputs("of-init").num_rows == len(TEXTS)


@pytest.mark.long
def test_its_schedules_start_nothing(site: Site, folder: Path) -> None:
    """Neither here nor on another server: they are inactive, and no automation names its deployments."""
    for name in ("tickets/mine", "batch-predict/tickets", "validate-model/tickets"):
        deployment = site.deployment(name)
        assert [schedule["active"] for schedule in deployment["schedules"]] == [False]
        assert deployment["id"] not in json.dumps(site.post("/automations/filter", {}))


@pytest.mark.long
def test_its_flow_runs_as_a_script(site: Site, folder: Path, server: ScriptedServer, tmp_path: Path) -> None:
    """As its README says first: `python tickets.py`."""
    source = (folder / "tickets.py").read_text()
    (tmp_path / "tickets.py").write_text(source.replace("http://127.0.0.1:8000", server.url))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tickets.csv").write_bytes((folder / "data" / "tickets.csv").read_bytes())
    site.command("tickets.py", cwd=tmp_path)
    assert Datalayer(url=str(tmp_path / "data")).outputs("topics").num_rows == len(TEXTS)
