"""`validate --set`: a reference set without a job file, on a server and in an engine of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.conftest import TINY_ARGS
from tests.servers.scripted_server import MODEL, Asked, Reply, ScriptedServer


def test_a_number_of_a_server_and_its_history(
    command: Command, server: ScriptedServer, tmp_path: Path
) -> None:
    """Rows without an answer are misses, however many; the history has the name that the server gives."""
    code, printed = command("validate", "--set", "extraction", "--url", server.url, "--rows", "4", "--json")
    report = json.loads(printed.splitlines()[-1])
    (found,) = report["datasets"]
    assert (code, report["model"], found["rows"], found["failed"]) == (0, MODEL, 4, 4)
    assert [value["metric"] for value in found["values"]] == ["json_fields", "json_valid"]
    assert (tmp_path / "validations" / "_metric_values").is_dir()
    code, printed = command("validate", "--set", "retrieval", "--url", server.url, "--db", "data")
    assert (code, f"{MODEL}: retrieval: recall_at_k 0." in printed) == (0, True)
    assert (tmp_path / "data" / "_metric_values").is_dir()
    assert server.posts[0].body["response_format"]["type"] == "json_schema"


def test_a_model_of_a_server_with_several(command: Command, server: ScriptedServer) -> None:
    """It is named by --model; signs that no table's name may have become dashes."""

    def two(asked: Asked) -> Reply | None:
        names = [{"id": name, "owned_by": "vllm"} for name in ("org/a:8b", "org/b")]
        return Reply({"object": "list", "data": names}) if asked.path == "/v1/models" else None

    server.script = two
    words = "validate", "--set", "arithmetic", "--url", server.url, "--rows", "2"
    code, printed = command(*words)
    assert (code, "org/a:8b" in printed) == (2, True)
    code, printed = command(*words, "--model", "org/a:8b")
    assert (code, "org-a-8b: arithmetic: numeric_match" in printed) == (0, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "there is nothing to validate"),
        (("--set", "extraction"), "--set extraction needs a model: --model"),
        (("--set", "list", "--model", "m"), '"arithmetic", "classification"'),
        (("job.yaml", "--set", "extraction", "--model", "m"), "give one of them"),
        (("job.yaml", "--rows", "3"), "--rows goes with --set"),
        (("--set", "extraction", "--model", "m", "--rows", "0"), "--rows"),
        (("--set", "extraction", "--model", "m", "--vllm-kwargs", "{x"), "is not JSON"),
        (("--set", "extraction", "--model", "m", "--vllm-kwargs", "[1]"), "is not a JSON object"),
        (("--set", "extraction", "--url", "http://h", "--vllm-kwargs", "{}"), "not for --url"),
        (("--set", "extraction", "--url", "localhost:8000"), "needs a scheme and a host"),
        (("--set", "extraction", "--url", "http://h", "--db", " "), "the url is empty"),
    ],
)
def test_a_call_that_is_not_clear_is_refused(command: Command, words: tuple[str, ...], said: str) -> None:
    """The message names what is missing or too much."""
    code, printed = command("validate", *words)
    assert code == 2
    assert said in " ".join(printed.replace("│", " ").split())


@pytest.mark.parametrize(
    ("rows", "said"), [("241", "has 240 rows"), ("5", "is not a document of the data set")]
)
def test_samples_that_do_not_exist_are_refused(
    command: Command, server: ScriptedServer, rows: str, said: str
) -> None:
    """There are 240 rows, and those of `retrieval` belong together."""
    code, printed = command("validate", "--set", "retrieval", "--url", server.url, "--rows", rows)
    assert (code, said in printed) == (2, True)
    assert not server.posts


@pytest.mark.engine
def test_a_folder_of_weights_gets_a_number(command: Command, tiny_model: Path) -> None:
    """An engine is started for it with the arguments that are given."""
    engine = json.dumps(TINY_ARGS)
    words = "--model", str(tiny_model), "--rows", "6", "--vllm-kwargs", engine, "--json"
    code, printed = command("validate", "--set", "classification", *words)
    report = json.loads(printed.splitlines()[-1])
    (found,) = report["datasets"]
    values = {value["metric"]: value["value"] for value in found["values"]}
    assert (code, report["model"], found["failed"]) == (0, tiny_model.name, 0)
    assert 0 < values["brier"] < 1
    assert values["log_loss"] > 0
