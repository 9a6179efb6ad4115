"""Runs commands in a folder with a table, against a scripted server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.servers.scripted_server import ScriptedServer
from vllm_tasks._cli.app import main

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in a folder with a table; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"id": i, "text": f"t{i}", "label": "a" if i % 2 else "b"} for i in range(4)]
    (data / "tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*words: str) -> tuple[int, str]:
        codes: list[int] = []
        try:
            main(list(words), codes.append)
        except SystemExit as end:  # of the command line's own errors
            codes.append(int(end.code or 0))
        printed = capsys.readouterr()
        return (codes or [0])[0], printed.out + printed.err

    return run


@pytest.fixture
def job(server: ScriptedServer, tmp_path: Path) -> Path:
    return write(tmp_path, server, "X: text\nselect: tickets\ndb: data/\n")


@pytest.fixture
def printed_of_refused(command: Command, job: Path, server: ScriptedServer) -> Callable[..., str]:
    """Runs the job with a change, which must be refused without sending a row; returns what was printed."""

    def run(change: tuple[str, str], name: str = "run") -> str:
        job.write_text(job.read_text().replace(*change))
        code, printed = command(name, str(job))
        assert code == 2
        assert not server.posts
        return printed

    return run


def write(folder: Path, server: ScriptedServer, rest: str) -> Path:
    """A job file for this server."""
    model = f"model: {{identifier: tagger, api_url: '{server.url}', prompt: 'Tag: {{input}}'}}\n"
    file = folder / "job.yaml"
    file.write_text(model + rest)
    return file
