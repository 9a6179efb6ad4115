"""`preview`: prompts, answers and values of some rows, and nothing committed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from prefect import flow

from tests.artifacts import artifacts
from tests.places import Place
from tests.servers.scripted_server import ScriptedServer, answer_to, refused
from tests.tables.runs import says
from vllm_tasks import InvalidCall, VllmAPI, preview
from vllm_tasks.results import Preview
from vllm_tasks.tables.previews import PreviewRow


@pytest.fixture
def model(server: ScriptedServer, place: Place) -> Iterator[VllmAPI]:
    with VllmAPI(identifier="m", api_url=server.url, db=place.db, prompt="Say {input}", retries=0) as model:
        yield model


def test_a_preview_shows_rows_and_commits_nothing(model: VllmAPI, place: Place) -> None:
    """The prompt as sent, the answer and its value are shown, for done rows, too, and no table is created."""
    place.fill_texts("a", "b", "c")
    shown = model.preview("text", "rows", n=2)
    assert len(shown.rows) == 2
    for row in shown.rows:
        text = "abc"[row.key[0]]
        assert (row.prompt, row.answer, row.error) == (f"Say {text}", answer_to(f"Say {text}"), None)
        assert row.value == row.answer
        assert f"prompt: Say {text}" in str(shown)
    with pytest.raises(InvalidCall):
        place.outputs()
    model.predict_in_db("text", "rows")
    before = place.outputs()
    assert len(model.preview("text", "rows", n=5, temperature=0).rows) == 3
    assert place.outputs() == before


def test_errors_are_shown_in_their_rows(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """A row without a prompt, a refused row, and an answer of another type stand beside a good row."""
    place.fill_texts("1", None, "bad", "word")
    says_it = says(lambda asked: asked.prompt.removeprefix("Say "))
    server.script = lambda asked: (
        refused(400, "no") if asked.body and "bad" in asked.prompt else says_it(asked)
    )
    typed = VllmAPI(**{**{n: getattr(model, n) for n in model.model_fields_set}, "datatype": "int"})
    rows = {row.key[0]: row for row in typed.preview("text", "rows").rows}
    assert (rows[0].value, rows[0].error) == (1, None)
    assert [str(rows[i].error).partition(":")[0] for i in (1, 2, 3)] == ["prompt", "refused", "output"]
    assert (rows[1].prompt, rows[2].prompt) == (None, "Say bad")
    assert (rows[3].answer, rows[3].value) == ("word", None)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"n": 0}, "n=0"), ({"n": True}, "n=True"), ({"X": "txt"}, "txt"), ({"primary_key": "x"}, "primary_id")],
)
def test_wrong_previews_are_refused(model: VllmAPI, place: Place, wrong: dict[str, Any], words: str) -> None:
    place.fill_texts("a")
    with pytest.raises(InvalidCall, match=words):
        model.preview(**{"X": "text", "select": "rows", **wrong})


def test_long_texts_are_cut_where_they_are_printed(model: VllmAPI, place: Place) -> None:
    place.fill_texts("x" * 5000)
    shown = model.preview("text", "rows")
    assert len(str(shown.rows[0].prompt)) == 5004
    assert len(str(shown)) < 2000


def test_messages_are_printed_as_people_read_them(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """Each with its role; messages with pictures or tool calls are printed as JSON."""
    place.fill_texts("a")
    chat = VllmAPI(**{n: getattr(model, n) for n in model.model_fields_set}, chat=True, system="Be brief.")
    shown = chat.preview("text", "rows")
    assert shown.rows[0].prompt[0] == {"role": "system", "content": "Be brief."}
    assert "prompt: system: Be brief.\nuser: Say a\n" in str(shown)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    odd = Preview("m", "rows", (PreviewRow((1,), parts, None, None, None),))
    assert 'prompt: [{"role": "user", "content": [{"type": "text"' in str(odd)


@pytest.mark.usefixtures("prefect_server")
def test_the_task_makes_a_table_artifact(server: ScriptedServer, tmp_path: Any) -> None:
    """In a flow the rows appear in Prefect's UI."""
    place = Place(str(tmp_path / "lake"))
    place.fill_texts("a", "b")
    model = VllmAPI(identifier="looked-at", api_url=server.url, db=place.db)

    @flow
    def look() -> Preview:
        found: Preview = preview(model, "text", "rows", 1)
        return found

    found = look()
    (made,) = artifacts("looked-at-preview")
    assert found.rows[0].prompt in str(made.data)
    (cells,) = json.loads(str(made.data))
    assert cells.keys() == {"key", "prompt", "answer"}, "columns without a text are left out"
