"""`check` finds what `run` would refuse, and sends no row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.servers.scripted_server import ScriptedServer


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
