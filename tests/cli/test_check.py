"""`check` finds what `run` would refuse, and sends no row."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.servers.scripted_server import Reply, ScriptedServer


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("X: text", "X: texte"), "did you mean 'text'"),
        (("X: text", "X: [text, label]"), "names 2 columns"),
        (("X: text", "X: text\nprimary_id: idd"), "did you mean 'id'"),
        (("X: text", "X: text\nprimary_id: label"), "does not identify the rows"),
        (("select: tickets", "select: tikcets"), "did you mean 'tickets'"),
        (("X: text", "X: text\nids: [[1, 2]]"), "ids must be values of 'id'"),
        (("X: text", "X: text\nretry_failed: true\noverwrite: true"), "choose one"),
        (("X: text", "X: text\nmax_failed: 2.5"), "max_failed=2.5"),
        (("X: text", "X: text\npredict_id: a/b"), "cannot name a table"),
        (("X: text", "X: text\nshards: 2"), "has shards=2"),
        (("X: text", "X: text\nsampling: {limit: 2}"), "an argument of predict_in_db"),
        (("X: text", "X: text\nsampling: {temprature: 0}"), "did you mean 'temperature'"),
        (("db: data/", "db: data/tickets.jsonl"), "is a file, not a folder"),
        (
            ("identifier: tagger,", "identifier: tagger, messages_as_json: true, signature: '*args',"),
            "messages",
        ),
    ],
)
def test_what_a_run_refuses_a_check_refuses(
    command: Command, job: Path, server: ScriptedServer, change: tuple[str, str], said: str
) -> None:
    """In the same words."""
    job.write_text(job.read_text().replace(*change))
    code, printed = command("check", str(job))
    assert (code, said in printed) == (2, True), printed
    assert command("run", str(job)) == (code, printed)
    assert not server.posts


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("partition_by: [nope]", "partition_by names ['nope']"),
        ("compression: rar", "compression='rar' is not one of"),
    ],
)
def test_outputs_that_cannot_be_made_are_refused(
    command: Command, job: Path, server: ScriptedServer, tmp_path: Path, field: str, said: str
) -> None:
    """In the same words, and without creating them."""
    fields = f"identifier: tagger, model_update_kwargs: {{{field}}},"
    job.write_text(job.read_text().replace("identifier: tagger,", fields))
    code, printed = command("check", str(job))
    assert (code, said in printed) == (2, True), printed
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["tickets.jsonl"]
    assert command("run", str(job)) == (code, printed)
    assert not server.posts


@pytest.mark.parametrize("db", ["data/", "sqlite:///tables.db"])
def test_outputs_of_another_shape_are_refused(command: Command, job: Path, tmp_path: Path, db: str) -> None:
    """In the same words, in a lake and in a database."""
    with sqlite3.connect(tmp_path / "tables.db") as tables:
        tables.execute("CREATE TABLE tickets (id INTEGER PRIMARY KEY, text TEXT)")
        tables.execute("INSERT INTO tickets VALUES (1, 't1')")
    job.write_text(job.read_text().replace("db: data/", f"db: {db}"))
    assert command("run", str(job))[0] == 0
    job.write_text(job.read_text().replace("identifier: tagger,", "identifier: tagger, datatype: int,"))
    code, printed = command("check", str(job))
    assert (code, "give another predict_id" in printed) == (2, True), printed
    assert command("run", str(job)) == (code, printed)


def test_a_folder_that_cannot_be_written_is_refused(
    command: Command, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a run has found out. Root may write everywhere, so the system's answer is replaced."""
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("data"))
    code, printed = command("check", str(job))
    assert code == 2
    assert "not allowed: permission denied for" in printed


def test_what_the_server_would_refuse_of_every_row_is_found(
    command: Command, job: Path, server: ScriptedServer
) -> None:
    """A model that it lacks, more tokens than its context has, and chat without a template."""
    card = {"id": "scripted-model", "owned_by": "vllm", "max_model_len": 64}
    listing = Reply({"object": "list", "data": [card]})
    server.script = lambda asked: listing if asked.path == "/v1/models" else None
    for fields, said in {
        "model: gpt-5,": "serves 'scripted-model', and the model 'gpt-5' does not exist there",
        "predict_kwargs: {max_tokens: 65},": "max_tokens=65 cannot be greater than max_model_len=64",
        "chat: true,": "the model has no chat template",
    }.items():
        text = job.read_text()
        job.write_text(text.replace("identifier: tagger,", f"identifier: tagger, {fields}"))
        code, printed = command("check", str(job))
        assert (code, said in printed) == (2, True), printed
        job.write_text(text)
    job.write_text(job.read_text().replace("tagger,", "tagger, predict_kwargs: {max_tokens: 64},"))
    assert command("check", str(job))[0] == 0
    assert not server.posts


@pytest.mark.engine
def test_engine_arguments_are_read_without_an_engine(command: Command, tmp_path: Path) -> None:
    """Of the vLLM that would run the model."""
    file = tmp_path / "local.yaml"
    model = "{identifier: m, model_name: ./none, chat: false, vllm_kwargs: {ARG: 64}}"
    job = f"model: {model}\nX: text\nselect: tickets\ndb: data/\n"
    file.write_text(job.replace("ARG", "max_modl_len"))
    code, printed = command("check", str(file))
    assert (code, "an engine argument of vLLM; did you mean 'max_model_len'?" in printed) == (2, True), (
        printed
    )
    file.write_text(job.replace("ARG", "max_model_len"))
    assert command("check", str(file))[0] == 0


def test_a_gateway_may_serve_more_than_it_lists(command: Command, job: Path, server: ScriptedServer) -> None:
    listing = Reply({"object": "list", "data": [{"id": "small", "owned_by": "someone"}]})
    server.script = lambda asked: listing if asked.path == "/v1/models" else None
    job.write_text(job.read_text().replace("identifier: tagger,", "identifier: tagger, model: large,"))
    assert command("check", str(job))[0] == 0


def test_outputs_of_another_source_are_found(command: Command, job: Path, tmp_path: Path) -> None:
    """And that a trial would replace outputs of another prompt."""
    assert command("run", str(job))[0] == 0
    (tmp_path / "data" / "others.jsonl").write_text('{"id": 1, "text": "t1"}\n')
    text = job.read_text()
    job.write_text(text.replace("tickets", "others"))
    code, printed = command("check", str(job))
    assert (code, "same_source=True" in printed) == (2, True), printed
    assert command("run", str(job)) == (code, printed)
    job.write_text(text.replace("Tag:", "Topic:") + "limit: 1\n")
    code, printed = command("check", str(job))
    assert (code, "limit=1 would replace outputs" in printed) == (2, True), printed
    assert command("run", str(job)) == (code, printed)


def test_rows_to_process_are_counted(command: Command, job: Path, tmp_path: Path) -> None:
    """Also those of a table that has outputs, and ids that are not there; nothing is written."""
    assert "4 rows, 4 to process; outputs: " in command("check", str(job))[1]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["tickets.jsonl"]
    job.write_text(job.read_text() + "limit: 3\n")
    assert "4 rows, 3 to process" in command("check", str(job))[1]
    assert command("run", str(job))[0] == 0
    assert "4 rows, 1 to process" in command("check", str(job))[1]
    job.write_text(job.read_text() + "ids: [1, 98, 99]\n")
    found = json.loads(command("check", str(job), "--json")[1])
    assert (found["rows"], found["to_process"], found["missing_ids"]) == (1, 0, 2)
    assert "ids that are not in the source: 2" in command("check", str(job))[1]
