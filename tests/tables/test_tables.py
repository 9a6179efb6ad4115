"""`predict_in_db` over a lake, SQLite and PostgreSQL: which rows are sent and written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.places import Place
from tests.servers.scripted_server import Asked, ScriptedServer, answer_to, refused
from tests.tables.runs import Sent, ask, changed
from vllm_tasks import VllmAPI
from vllm_tasks.canonical import input_hash
from vllm_tasks.tables.counting import Counted

# ---------------------------------------------------------------------- the main job


def test_every_row_gets_its_output_once(model: VllmAPI, place: Place, sent: Sent) -> None:
    """Each row of the source has one output; a second call sends nothing."""
    place.fill_texts(*(f"t{i}" for i in range(1000)))
    report = ask(model)
    assert place.answers() == {i: answer_to(f"t{i}") for i in range(1000)}
    assert (report.rows, report.processed, report.succeeded, report.failed) == (1000, 1000, 1000, 0)
    assert (report.prompt_tokens, report.completion_tokens) == (3000, 5000)
    assert len(sent()) == 1000
    again = ask(model)
    assert (again.rows, again.up_to_date, again.processed) == (1000, 1000, 0)
    assert sent() == []


def test_an_output_says_where_it_comes_from(model: VllmAPI, place: Place) -> None:
    """Model, instance, tokens, finish reason, hashes and time stand beside each output."""
    place.fill_texts("a")
    report = ask(model)
    (row,) = place.outputs()
    assert row["_model"] == "scripted-model"
    assert row["_uuid"] == model.uuid
    assert row["_fingerprint"] == report.fingerprint
    assert row["_input_hash"] == input_hash(["a"])
    assert (row["_prompt_tokens"], row["_completion_tokens"], row["_finish_reason"]) == (3, 5, "stop")
    assert 0 < row["_seconds"] < report.seconds["total"]
    assert row["_error"] is None
    assert row["_created_at"].tzinfo is not None
    assert report.served_by["model"] == "scripted-model"


def test_rows_that_fail_are_errors_beside_the_others(
    model: VllmAPI, place: Place, server: ScriptedServer, sent: Sent
) -> None:
    """A failed row has its error and is done; only `retry_failed` sends it again."""
    place.fill_texts("good", "bad", None)
    server.script = lambda asked: refused(400, "no such thing") if asked.prompt == "bad" else None
    report = ask(model)
    assert (report.succeeded, report.failed) == (1, 2)
    assert {e.kind: e.keys for e in report.errors} == {"refused": ((1,),), "prompt": ((2,),)}
    errors = {row["id"]: row["_error"] for row in place.outputs()}
    assert errors[0] is None
    assert errors[1].startswith("refused: HTTP 400")
    assert "no such thing" in errors[1]
    assert errors[2].startswith("prompt: 'input' is None")
    assert place.answers() == {0: answer_to("good"), 1: None, 2: None}
    assert sent() == ["bad", "good"]
    assert ask(model).processed == 0
    server.script = lambda _: None
    assert ask(model, retry_failed=True).processed == 2
    assert sent() == ["bad"]  # the third one never becomes a prompt
    assert place.answers() == {0: answer_to("good"), 1: answer_to("bad"), 2: None}
    assert len(place.outputs()) == 3


# ---------------------------------------------------------------------- which rows


def test_what_decides_an_answer_asks_all_again(model: VllmAPI, place: Place, sent: Sent) -> None:
    """Another prompt, sampling or system reruns all rows; the outputs keep one row a key."""
    place.fill_texts("a", "b")
    ask(model)
    sent()
    other = changed(model, prompt="Say {input}")
    ask(other)
    assert sent() == ["Say a", "Say b"]
    assert place.answers() == {0: answer_to("Say a"), 1: answer_to("Say b")}
    ask(other, temperature=0.5)
    assert sent() == ["Say a", "Say b"]
    ask(changed(other, chat=True, system="Be kind"))
    assert len(sent()) == 2
    assert len(place.outputs()) == 2


def test_what_does_not_decide_an_answer_asks_nothing(
    model: VllmAPI, place: Place, server: ScriptedServer, sent: Sent
) -> None:
    """Another server, batch size or number of attempts reruns nothing."""
    place.fill_texts("a", "b")
    ask(model)
    sent()
    with ScriptedServer() as elsewhere:
        moved = changed(model, api_url=elsewhere.url, max_batch_size=1, retries=3, timeout=5, max_in_flight=7)
        with moved:
            assert ask(moved, max_chunk_size=1).processed == 0
        assert elsewhere.posts == []
    assert sent() == []


def test_new_rows_alone_are_asked(model: VllmAPI, place: Place, sent: Sent) -> None:
    """Rows that came since the last call are sent; a changed row only with `refresh="changed"`."""
    place.fill_texts("a", "b")
    ask(model)
    sent()
    place.fill_texts("a", "B", "c")
    ask(model)
    assert sent() == ["c"]
    report = ask(model, refresh="changed")
    assert sent() == ["B"]
    assert report.processed == 1
    assert place.answers() == {0: answer_to("a"), 1: answer_to("B"), 2: answer_to("c")}
    assert ask(model, refresh="changed").processed == 0


@pytest.mark.parametrize("count", [5, 1])
def test_rows_that_come_or_go_during_a_run_are_not_up_to_date(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """A file that is written while it is read and counted: only the rows of the run have an output."""
    file, written, count_rows = tmp_path / "rows.jsonl", threading.Event(), Counted._count

    def write(rows: int) -> None:
        file.write_text("".join(f'{{"id": {i}, "text": "{i}"}}\n' for i in range(rows)))

    def script(asked: Asked) -> None:
        if asked.body and not written.is_set():
            write(count)
            written.set()

    def after_that(self: Counted) -> None:
        written.wait(60)
        count_rows(self)

    monkeypatch.setattr(Counted, "_count", after_that)
    server.script = script
    write(2)
    with VllmAPI(identifier="m", api_url=server.url, db=str(tmp_path), retries=0) as model:
        report = ask(model)
    assert (report.rows, report.processed, report.up_to_date) == (count, 2, 0)


def test_a_number_written_otherwise_is_another_input(model: VllmAPI, tmp_path: Path, sent: Sent) -> None:
    """The digits of JSON lines are in the prompt, so a change of them is a change of the row."""
    file = tmp_path / "prices.jsonl"
    for written, prompts in (("12.5", ["12.5", "7"]), ("12.50", ["12.50"])):
        file.write_text(f'{{"id": 0, "text": {written}}}\n{{"id": 1, "text": 7}}\n')
        model.predict_in_db("text", "prices", db=str(tmp_path), refresh="changed")
        assert sorted(sent()) == prompts


def test_ids_limit_and_overwrite(model: VllmAPI, place: Place, sent: Sent) -> None:
    """`ids` selects rows, `limit` bounds their number, `overwrite` sends done rows again."""
    place.fill_texts("a", "b", "c", "d")
    ask(model, ids=[1, 3])
    assert sent() == ["b", "d"]
    assert ask(model, limit=1).processed == 1
    assert len(sent()) == 1
    ask(model)
    assert len(sent()) == 1
    before = {row["id"]: row["_created_at"] for row in place.outputs()}
    ask(model, overwrite=True, ids=np.array([0]))
    assert sent() == ["a"]
    after = {row["id"]: row["_created_at"] for row in place.outputs()}
    assert after[0] > before[0]
    assert {k: v for k, v in after.items() if k} == {k: v for k, v in before.items() if k}
    assert ask(model, overwrite=True).processed == 4
    assert len(place.outputs()) == 4


def test_two_predict_ids_are_two_tables(model: VllmAPI, place: Place, sent: Sent) -> None:
    """`predict_id` names the outputs; the default is the model's identifier."""
    place.fill_texts("a")
    ask(model)
    ask(model, predict_id="other")
    assert sent() == ["a", "a"]
    assert place.answers("m") == place.answers("other")


def test_a_select_statement_is_a_source(model: VllmAPI, place: Place, sent: Sent) -> None:
    """Rows may come from a SELECT, with computed columns."""
    place.fill_texts("a", "b", "c")
    statement = "SELECT id, text || '?' AS question FROM rows WHERE id < 2"
    model.predict_in_db("question", statement, predict_id="q")
    assert sent() == ["a?", "b?"]
    assert place.answers("q") == {0: answer_to("a?"), 1: answer_to("b?")}


@pytest.mark.parametrize(
    ("signature", "columns", "prompt", "expected"),
    [
        ("*args", ["text", "id"], "{0} {1}", "a 0"),
        ("**kwargs", ["text", "id"], "{text} {id}", "a 0"),
        ("**kwargs", {"text": "title", "id": "number"}, "{title} {number}", "a 0"),
        ("*args", {"text": 1, "id": 0}, "{1} {0}", "a 0"),
        ("*args,**kwargs", {"text": 0, "id": "number"}, "{0} {number}", "a 0"),
        ("singleton", ["text"], "{input}", "a"),
    ],
)
def test_columns_become_arguments(
    model: VllmAPI, place: Place, sent: Sent, signature: str, columns: Any, prompt: str, expected: str
) -> None:
    """`X` maps columns to arguments of the prompt."""
    place.fill_texts("a")
    changed(model, signature=signature, prompt=prompt).predict_in_db(columns, "rows")
    assert sent() == [expected]


def test_context_fills_prompts_and_counts(model: VllmAPI, place: Place, sent: Sent) -> None:
    """The context is part of each prompt and of the fingerprint."""
    place.fill_texts("a")
    asks = changed(model, prompt="{context}: {input}")
    ask(asks, context="one")
    ask(asks, context="two")
    ask(asks, context="two")
    assert sent() == ["one: a", "two: a"]


def test_an_output_may_be_the_next_source(model: VllmAPI, place: Place, sent: Sent) -> None:
    """The outputs of one model are a table like any other."""
    place.fill_texts("a")
    ask(model)
    model.predict_in_db("output", "_outputs__m", predict_id="second")
    assert sent() == [answer_to("a"), "a"] or sent() == []
    assert place.answers("second") == {0: answer_to(answer_to("a"))}
