"""Pictures of a table's rows: in a column of bytes or as files, hashed by what they are."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.places import Place
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import VllmAPI, export_batch
from vllm_tasks.calls.media import media_parts
from vllm_tasks.rows import Request
from vllm_tasks.tables.open_rows import bytes_of_request
from vllm_tasks.validation import Dataset, Metric, Validation

PNG = b"\x89PNG\r\n\x1a\n"
BYTES = {"lake": "from_hex('{}')", "sqlite": "x'{}'", "postgres": "decode('{}', 'hex')"}


def seeing(server: ScriptedServer, place: Place, **fields: Any) -> VllmAPI:
    given = {"images": "photo", "signature": "**kwargs", "prompt": "What is {text}?", **fields}
    return VllmAPI(identifier="m", api_url=server.url, db=place.db, retries=0, **given)


def sent(server: ScriptedServer, since: int = 0) -> dict[str, list[bytes]]:
    """The pictures that reached the server, by the text beside them."""
    return {
        asked.prompt: [
            base64.b64decode(part["image_url"]["url"].partition(",")[2])
            for part in media_parts(asked.body["messages"])
        ]
        for asked in server.posts[since:]
    }


def test_a_column_of_bytes(server: ScriptedServer, place: Place) -> None:
    """In every kind of store; a second run has nothing to do, and a row without a picture is an error."""
    place.fill_texts("this", "that", "nothing")
    one, two = (BYTES[place.kind].format((PNG + end).hex()) for end in (b"1", b"2"))
    select = f"SELECT id, text, CASE id WHEN 0 THEN {one} WHEN 1 THEN {two} END AS photo FROM rows"
    with seeing(server, place) as model:
        report = model.predict_in_db(["text", "photo"], select, max_failed=None)
        assert (report.succeeded, report.failed) == (2, 1)
        again = model.predict_in_db(["text", "photo"], select, max_failed=None)
    assert sent(server) == {"What is this?": [PNG + b"1"], "What is that?": [PNG + b"2"]}
    assert again.processed == 0
    assert "'photo' is None" in place.outputs()[2]["_error"]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        file.write_bytes(PNG + str(i).encode())
    return files


@pytest.fixture
def lake(tmp_path: Path, pictures: list[Path]) -> Place:
    """A table of pictures' paths, and of lists of them."""
    place = Place(str(tmp_path / "lake"))
    place.fill([{"id": i, "photo": str(file), "many": [str(file)] * i} for i, file in enumerate(pictures)])
    return place


def test_a_changed_file_is_a_changed_input(server: ScriptedServer, lake: Place, pictures: list[Path]) -> None:
    """The hash of the input is over the bytes: an unchanged picture elsewhere is not processed again."""
    with seeing(server, lake, signature="singleton", images="input", prompt="Look") as model:
        assert model.predict_in_db("photo", "rows").succeeded == 3
        again = {"refresh": "changed", "same_source": True}
        assert model.predict_in_db("photo", "rows", **again).processed == 0
        pictures[1].write_bytes(PNG + b"changed")
        moved = "SELECT id, replace(photo, '.png', '.moved') AS photo FROM rows"
        for file in pictures:
            file.rename(file.with_suffix(".moved"))
        seen = len(server.posts)
        assert model.predict_in_db("photo", moved, **again).processed == 1
        assert sent(server, seen) == {"Look": [PNG + b"changed"]}
        (pictures[2].with_suffix(".moved")).unlink()
        assert model.predict_in_db("photo", moved, max_failed=None, **again).failed == 1
    assert "cannot be read: FileNotFoundError" in lake.outputs()[2]["_error"]


def test_lists_and_limits(server: ScriptedServer, lake: Place) -> None:
    """A list column has several pictures, and `limit` counts rows whose prompts are made one by one."""
    with seeing(server, lake, images="many", prompt="Compare {id}") as model:
        assert model.predict_in_db(["id", "many"], "rows", limit=2).succeeded == 2
        assert model.predict_in_db(["id", "many"], "rows").succeeded == 1
    counts = {text: len(found) for text, found in sent(server).items()}
    assert counts == {"Compare 0": 0, "Compare 1": 1, "Compare 2": 2}


def test_the_field_counts_in_the_fingerprint(server: ScriptedServer, lake: Place) -> None:
    """Another field is another prompt."""
    same = {"prompt": "Look at {id}"}
    select = "SELECT id, photo, photo AS other FROM rows"
    with seeing(server, lake, **same) as model:
        assert model.predict_in_db(["id", "photo"], select).succeeded == 3
    with seeing(server, lake, images="other", **same) as model:
        report = model.predict_in_db(["id", "other"], select, same_source=True)
    assert report.processed == 3


def test_kept_prompts_previews_and_batch_files(server: ScriptedServer, lake: Place, tmp_path: Path) -> None:
    """A table and a page have the size of a picture, and a batch file all of it."""
    given = (["id", "photo"], "rows")
    with seeing(server, lake, prompt="Look at {id}", keep=["prompt"]) as model:
        model.predict_in_db(*given)
        page = str(model.preview(*given))
        assert export_batch(model, *given, tmp_path / "batch.jsonl") == 3
    shown = "data:image/png;base64,... (9 bytes)"
    (kept,) = json.loads(lake.outputs()[0]["_prompt"])
    assert kept["content"][0]["image_url"]["url"] == shown
    assert shown in page
    line = json.loads((tmp_path / "batch.jsonl").read_text().splitlines()[0])
    url = line["body"]["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == PNG + b"0"


def test_a_validation_sends_them(server: ScriptedServer, lake: Place, pictures: list[Path]) -> None:
    """Its snapshot keeps the paths, and its answers are those of the pictures there."""
    rows = [{"photo": row, "right": " Look!"} for row in map(str, pictures)]
    exam = Validation(
        datasets=[Dataset(identifier="d", raw_data=rows)],
        metrics=[Metric(identifier="exact_match")],
        key=("photo", "right"),
    )
    with seeing(server, lake, signature="singleton", images="input", prompt="Look") as model:
        model.validate(exam)
        assert model.metric_values == {"d": {"exact_match": 1.0}}
    found = [
        part["image_url"]["url"] for asked in server.posts for part in media_parts(asked.body["messages"])
    ]
    assert sorted(base64.b64decode(url.partition(",")[2])[-1:] for url in found) == [b"0", b"1", b"2"]


def test_pictures_count_among_the_bytes_that_are_held() -> None:
    """Those in a prompt, and those of a record that a check needs."""
    parts = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x" * 10_000}}]}]
    request = Request(parts, record={"photo": bytes(20_000)})
    assert 30_000 < bytes_of_request(request) < 31_000
