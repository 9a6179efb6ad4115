"""Read-ahead: rows and bytes that are not yet complete or committed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.places import Place
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import VllmAPI
from vllm_tasks.rows import Choice, Completion, Request, RowError
from vllm_tasks.tables import commit_policy, open_rows
from vllm_tasks.tables.open_rows import OpenRows, bytes_of_answer, bytes_of_request


def test_sizes_are_those_of_the_texts() -> None:
    """The texts in a prompt of any shape, and in an answer, are counted."""
    parts = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x" * 10_000}}]}]
    assert 10_000 < bytes_of_request(Request("x" * 10_000, {})) < 10_200
    assert 10_000 < bytes_of_request(Request(parts, {})) < 10_500
    assert bytes_of_request(RowError("prompt", "no")) == 0
    assert 20_000 < bytes_of_answer(Completion((Choice("x" * 10_000), Choice("y" * 10_000)))) < 20_300


def test_the_reader_waits_for_bytes_and_never_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row beyond the limit waits until enough is committed; a row larger than the limit goes alone."""
    monkeypatch.setattr(open_rows, "HELD", 100)
    rows = OpenRows()
    assert rows.wait_for_capacity(10, 10, 1000), "nothing else is open"
    rows.read([(1,)], 90)
    came = threading.Event()
    reader = threading.Thread(target=lambda: (rows.wait_for_capacity(10, 10, 50), came.set()))
    reader.start()
    rows.completed(60)  # the prompt is still held, and the answer beside it
    assert not came.wait(0.1)
    rows.sent(90)
    assert not came.wait(0.1), "60 bytes of the answer and 50 are too many"
    rows.committed([(1,)], 60)
    assert came.wait(5)
    reader.join()
    assert rows.held == 0


def test_wide_rows_are_read_ahead_by_their_bytes(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If five of them fit, no more are in flight, whatever the engine would take, and all complete."""
    monkeypatch.setattr(open_rows, "HELD", 500_000)
    monkeypatch.setattr(commit_policy, "WIDEST", 200_000)
    monkeypatch.setattr("vllm_tasks.tables.source_rows.SLICE", 50_000)
    held: list[int] = []
    read = OpenRows.read

    def watched(self: OpenRows, *given: object) -> object:
        try:
            return read(self, *given)  # type: ignore[arg-type]
        finally:
            held.append(self.held)

    monkeypatch.setattr(OpenRows, "read", watched)
    place = Place(str(tmp_path / "lake"))
    place.fill_texts(*(f"{i} " + "x" * 100_000 for i in range(60)))
    with VllmAPI(identifier="m", api_url=server.url, db=place.db, max_in_flight=64) as model:
        report = model.predict_in_db("text", "rows")
    assert report.succeeded == 60
    assert max(held) <= 500_000
    assert report.commits > 1, "answers as wide as their prompts close groups by their bytes"
