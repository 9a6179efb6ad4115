"""`predict_in_db` over a lake, SQLite and PostgreSQL: which rows are sent and written, and when it stops."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, answer_to, refused, usual
from vllm_tasks import DataType, InvalidCall, VllmAPI
from vllm_tasks.calls.call import records
from vllm_tasks.canonical import input_hash
from vllm_tasks.errors import ServerUnavailable, TooManyFailed
from vllm_tasks.results import Report
from vllm_tasks.tables import Log
from vllm_tasks.tables.commit_policy import CommitPolicy


@pytest.fixture
def model(server: ScriptedServer, place: Place) -> Iterator[VllmAPI]:
    with VllmAPI(identifier="m", api_url=server.url, db=place.db, retries=0) as model:
        yield model


def changed(model: VllmAPI, **fields: Any) -> VllmAPI:
    """The same model with other fields, checked as when made."""
    given = {name: getattr(model, name) for name in model.model_fields_set}
    return VllmAPI(**{**given, **fields})


class Sent:
    """The prompts that reached the server since the last call of this."""

    def __init__(self, server: ScriptedServer) -> None:
        self._server, self._seen = server, 0

    def __call__(self) -> list[str]:
        posts = self._server.posts
        new, self._seen = posts[self._seen :], len(posts)
        return sorted(asked.prompt for asked in new)


@pytest.fixture
def sent(server: ScriptedServer) -> Sent:
    return Sent(server)


def ask(model: VllmAPI, **options: Any) -> Report:
    return model.predict_in_db("text", "rows", **{"max_failed": None, **options})


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
    ask(model, overwrite=True, ids=[0])
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


# ---------------------------------------------------------------------- typed outputs


def says(text: str | Callable[[Asked], str]) -> Callable[[Asked], Reply | None]:
    """A script whose every answer has this text."""

    def script(asked: Asked) -> Reply | None:
        if "prompt" not in (asked.body or {}):
            return None
        reply = usual(asked)
        for choice in reply.body["choices"]:
            choice["text"] = text if isinstance(text, str) else text(asked)
        return reply

    return script


@pytest.mark.parametrize(
    ("datatype", "text", "value"),
    [("int", "42", 42), ("float", "0.5", 0.5), ("bool", "yes", True), ("bytes", "ab", b"ab")],
)
def test_outputs_have_the_type_asked_for(
    model: VllmAPI, place: Place, server: ScriptedServer, datatype: str, text: str, value: Any
) -> None:
    """A datatype makes a column of that type; an answer of another type is an error with the raw answer."""
    place.fill_texts("a", "b")
    server.script = says(lambda asked: text if asked.prompt == "a" else "☂")
    ask(changed(model, datatype=datatype), max_failed=None)
    good, bad = place.outputs()
    assert good["output"] == value
    assert type(good["output"]) is type(value)
    if datatype != "bytes":
        assert bad["output"] is None
        assert bad["_error"].startswith("output: ")
        assert "☂" in bad["_error"]


def test_a_schema_makes_typed_columns(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """Each property is a column, and vLLM gets the schema."""
    place.fill_texts("a")
    server.script = says(json.dumps({"name": "x", "age": 7, "tags": ["p", {"q": None}]}))
    ask(changed(model, output_schema={"name": "str", "age": "int", "tags": "json"}))
    (row,) = place.outputs()
    assert (row["name"], row["age"]) == ("x", 7)
    assert json.loads(row["tags"]) == ["p", {"q": None}]
    assert server.posts[0].body["response_format"]["json_schema"]["schema"]["required"] == [
        "name",
        "age",
        "tags",
    ]


def test_flatten_makes_rows(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """A list becomes numbered rows, an empty one a row with NULL; a redone row takes all of them along."""
    place.fill_texts("two", "none", "bad")
    answers = {"two": '["p", "q"]', "none": "[]", "bad": "{}"}
    server.script = says(lambda asked: answers[asked.prompt])
    flat = changed(model, datatype="json", flatten=True)
    ask(flat)
    rows = [(r["id"], r["_position"], r["output"] and json.loads(r["output"])) for r in place.outputs()]
    assert rows == [(0, 0, "p"), (0, 1, "q"), (1, None, None), (2, None, None)]
    assert place.outputs()[3]["_error"].startswith("output: ")
    assert ask(flat).processed == 0
    answers["two"] = '["r"]'
    ask(flat, overwrite=True)
    rows = [(r["id"], r["_position"]) for r in place.outputs()]
    assert rows == [(0, 0), (1, None), (2, None)]


def test_several_choices_are_a_list(model: VllmAPI, place: Place) -> None:
    """With n=2 an output is a list of two."""
    place.fill_texts("a")
    ask(model, n=2)
    assert json.loads(place.answers()[0]) == [answer_to("a")] * 2


def test_cut_answers_can_be_errors(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """`finish_reason` is kept, and `on_length="error"` makes an error of "length"."""

    def cut(asked: Asked) -> Reply | None:
        reply = usual(asked)
        if "choices" in reply.body:
            reply.body["choices"][0]["finish_reason"] = "length"
        return reply

    place.fill_texts("a")
    server.script = cut
    report = ask(model, max_tokens=5)
    assert place.outputs()[0]["_finish_reason"] == "length"
    assert (report.truncated, report.failed) == (1, 0)
    report = ask(changed(model, model_update_kwargs={"on_length": "error"}), max_tokens=5)
    assert (report.truncated, report.failed) == (1, 1)
    assert "max_tokens" in place.outputs()[0]["_error"]


def as_upper(text: str) -> str:
    return text.upper()


def as_utf16(value: str) -> bytes:
    return value.encode("utf-16-le")


def test_own_types_decode_and_encode(model: VllmAPI, place: Place) -> None:
    """An own type's decoder reads the answer, its encoder makes what is stored."""
    place.fill_texts("a")
    own = DataType(identifier="own", decoder=as_upper, encoder=as_utf16)
    ask(changed(model, datatype=own))
    assert place.answers()[0] == answer_to("a").upper().encode("utf-16-le")


def test_what_a_database_cannot_hold_is_an_error_of_its_row(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """A NUL character, which PostgreSQL refuses, fails no other row."""
    place.fill_texts("a", "b", "c")
    server.script = says(lambda asked: "x\0y" if asked.prompt == "b" else "fine")
    ask(model)
    a, b, c = place.outputs()
    assert (a["output"], c["output"]) == ("fine", "fine")
    assert b["output"] == "x\0y" or b["_error"].startswith("output: ")


# ---------------------------------------------------------------------- streaming


def test_a_long_row_holds_up_no_commit(
    model: VllmAPI, place: Place, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one row is still in flight, the others are committed when their time is up."""
    monkeypatch.setenv("VLLM_TASKS_COMMIT_SECONDS", "0.3")
    place.fill_texts("slow", *(f"t{i}" for i in range(50)))
    committed = asyncio.Event()

    async def script(asked: Asked) -> None:
        if asked.body and asked.prompt == "slow":
            await committed.wait()

    server.script = script
    job = threading.Thread(target=ask, args=[model])
    job.start()
    try:
        server.wait_until(lambda: len(_there(place)) == 50)
    finally:
        server._loop.call_soon_threadsafe(committed.set)
        job.join()
    assert len(place.answers()) == 51


def test_the_first_groups_are_small() -> None:
    """In a young run no row waits longer for its commit than 2 s or a tenth of the run's time so far."""
    commit_policy = CommitPolicy.of(None, commit_rows=512, commit_seconds=30.0)

    def closes(age: float, elapsed: float, *, redo: bool = False) -> bool:
        return commit_policy.is_due(10, age, age, elapsed, redo=redo)

    assert [closes(2, 5), closes(6, 60), closes(30, 10_000)] == [True] * 3
    assert [closes(1.9, 5), closes(5.9, 60), closes(29.9, 10_000)] == [False] * 3
    assert not closes(29.9, 60, redo=True), "a lake copies the files of rows that are redone"


def _there(place: Place) -> list[Any]:
    try:
        return place.outputs()
    except InvalidCall:  # not made yet
        return []


def test_the_engine_stays_full_across_groups(server: ScriptedServer, place: Place) -> None:
    """Rows of later groups are in flight while earlier ones are committed, within the limit."""
    place.fill_texts(*(f"t{i}" for i in range(400)))

    async def script(asked: Asked) -> None:
        await asyncio.sleep(0.01)

    server.script = script
    with VllmAPI(
        identifier="m", api_url=server.url, db=place.db, max_in_flight=16, max_batch_size=1
    ) as model:
        report = ask(model, max_chunk_size=20)
    assert report.commits >= 20
    assert server.peak == 16


def test_groups_have_the_size_asked_for(model: VllmAPI, place: Place) -> None:
    """`max_chunk_size` is the number of rows of a commit."""
    place.fill_texts(*(f"t{i}" for i in range(100)))
    assert ask(model, max_chunk_size=30).commits == 4


# ---------------------------------------------------------------------- the end


def test_rows_that_become_no_prompt_do_not_look_hopeless(model: VllmAPI, place: Place) -> None:
    """They fail before any completion, and do not count against the rows that are sent."""
    place.fill_texts(*(None if i % 5 == 0 else f"t{i}" for i in range(500)))
    report = ask(model, max_failed=0.5)
    assert (report.succeeded, report.failed) == (400, 100)


def test_an_interrupt_after_a_commit_does_not_repeat_it(model: VllmAPI, place: Place) -> None:
    """An interrupt at the end of a commit that is retried leaves each key there once."""

    class Interrupted(Log):
        def commit(self, name: str, work: Callable[[], None]) -> None:
            work()
            raise KeyboardInterrupt

    place.fill_texts(*(f"t{i}" for i in range(100)))
    with pytest.raises(KeyboardInterrupt):
        ask(model, max_chunk_size=10, display=Interrupted())
    assert len(place.answers()) >= 10
    ask(model)
    assert place.answers() == {i: answer_to(f"t{i}") for i in range(100)}


def test_a_hopeless_run_stops_at_once(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """If the first rows all fail alike, no more rows are sent; the failed ones are committed."""
    place.fill_texts(*(f"t{i}" for i in range(5000)))
    server.script = lambda asked: refused(400, "never") if asked.body else None
    with pytest.raises(TooManyFailed, match=r"all failed alike.*retry_failed=True") as raised:
        ask(model, max_failed=0.5)
    report = raised.value.report
    assert report.succeeded == 0
    assert 50 <= report.failed == len(place.outputs()) < 5000
    assert report.errors[0].kind == "refused"


@pytest.mark.parametrize(
    ("max_failed", "fails"), [(0.05, True), (3, True), (4, False), (0.2, False), (None, False)]
)
def test_a_budget_is_a_share_or_a_count(
    model: VllmAPI, place: Place, server: ScriptedServer, max_failed: float | int | None, fails: bool
) -> None:
    """4 failed rows of 40 are within a fifth and a count of 4, and beyond a twentieth and a count of 3."""
    place.fill_texts(*(f"t{i}" for i in range(40)))
    bad = {"t3", "t13", "t23", "t33"}
    server.script = lambda asked: refused(400, "no") if asked.body and asked.prompt in bad else None
    if fails:
        with pytest.raises(TooManyFailed, match=r"4 of \d+ rows failed.*4 of them refused"):
            ask(model, max_failed=max_failed)
    else:
        ask(model, max_failed=max_failed)
    assert sum(row["_error"] is not None for row in place.outputs()) == 4


def test_a_server_that_goes_away_is_waited_for(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """A server that stops and comes back during a run costs only time."""
    place.fill_texts(*(f"t{i}" for i in range(300)))
    stopped = threading.Event()

    async def script(asked: Asked) -> None:
        if asked.body:
            await asyncio.sleep(0.02)

    def restart() -> None:
        server.wait_until(lambda: len(server.posts) > 100)
        server.stop()
        stopped.set()
        server.start()

    server.script = script
    restarting = threading.Thread(target=restart)
    restarting.start()
    patient = changed(model, retries=5, max_in_flight=32)
    with patient:
        ask(patient)
    restarting.join()
    assert stopped.is_set()
    assert place.answers() == {i: answer_to(f"t{i}") for i in range(300)}


def test_a_server_that_stays_away_keeps_what_is_finished(
    place: Place, server: ScriptedServer, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run fails after the grace period with completed rows committed; the next one sends the rest."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.5")
    place.fill_texts(*(f"t{i}" for i in range(100)))
    allowed = 40

    async def script(asked: Asked) -> None:
        if asked.body and len(server.posts) > allowed:
            await asyncio.sleep(3600)

    def stop() -> None:
        server.wait_until(lambda: len(server.posts) >= allowed + 8 and server.open == 8)
        time.sleep(0.2)  # the last answers arrive
        server.stop()

    server.script = script
    with VllmAPI(identifier="m", api_url=server.url, db=place.db, max_in_flight=8, model="named") as model:
        stopping = threading.Thread(target=stop)
        stopping.start()
        with pytest.raises(ServerUnavailable):
            ask(model)
        stopping.join()
        assert len(place.answers()) == allowed
        sent()
        server.script = lambda _: None
        server.start()
        assert ask(model).processed == 100 - allowed
    assert len(sent()) == 100 - allowed
    assert len(place.answers()) == 100


def no_booms(x: str) -> str:
    if x.startswith("boom"):
        raise ValueError("boom")
    return x


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
def test_keys_that_no_table_holds_keep_what_is_finished(model: VllmAPI, place: Place) -> None:
    """Rows whose keys the outputs cannot hold end the run, and every other completed row is kept."""
    good = {"boom 1", "boom 2", "boom 3"}
    place.fill_texts(*good, os.urandom(4000).hex(), os.urandom(4000).hex())
    with pytest.raises(InvalidCall, match="can have no output"):
        ask(changed(model, prompt_func=booms), primary_id="text")
    assert {row["text"] for row in place.db.outputs("m").to_pylist()} == good


def booms(x: str) -> str:
    raise ValueError(x)


POISON = 20
"""Rows of each kind: 1 % of 2,000."""
STAGES = {
    "unreadable": "prompt: prompt_func raised AttributeError",  # NULL
    "template": "prompt: prompt_func raised ValueError: boom",
    "long": "too_long: ",
    "refused": "refused: ",
    "late": "timeout: ",
    "undecodable": "output: ",
}


def test_poison_at_every_stage_fails_its_rows_alone(place: Place, server: ScriptedServer) -> None:
    """2,000 rows with 1 % poison at each stage: the job completes, each bad row has the error of its
    stage, and `retry_failed` sends exactly those."""
    texts = [f"t{i}" for i in range(2000)]
    expected = {}
    for n, (stage, words) in enumerate(STAGES.items()):
        for i in range(n, 2000, 2000 // POISON):
            texts[i] = None if stage == "unreadable" else f"{'boom' if stage == 'template' else stage} {i}"  # type: ignore[call-overload]
            expected[i] = words
    place.fill_texts(*texts)
    healed = False

    async def script(asked: Asked) -> Reply | None:
        stage = asked.prompt.split()[0] if asked.body else ""
        if stage == "late" and not healed:
            await asyncio.sleep(3600)
        if stage == "long" and not healed:
            return refused(400, "This model's maximum context length is 10 tokens")
        if stage == "refused" and not healed:
            return refused(400, "not with me")
        return says("none" if stage == "undecodable" and not healed else "7")(asked)

    server.script = script
    fields = {"identifier": "m", "api_url": server.url, "db": place.db, "timeout": 2, "retries": 0}
    with VllmAPI(**fields, max_in_flight=64, prompt_func=no_booms, datatype="int") as model:
        report = model.predict_in_db("text", "rows", max_failed=0.1)
        assert (report.succeeded, report.failed) == (2000 - len(expected), len(expected))
        rows = {row["id"]: row for row in place.outputs()}
        assert len(rows) == 2000
        for i, row in rows.items():
            assert row["output"] == (None if i in expected else 7)
            assert (row["_error"] or "").startswith(expected.get(i, "")), row
        healed = True
        before = len(server.posts)
        report = model.predict_in_db("text", "rows", retry_failed=True, max_failed=None)
    sent = {int(asked.prompt.split()[1]) for asked in server.posts[before:]}
    assert sent == {i for i, words in expected.items() if not words.startswith("prompt")}
    assert report.processed == len(expected)
    assert {i for i, output in place.answers().items() if output is None} == expected.keys() - sent


# ---------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"X": "txt"}, "txt"),
        ({"select": "no_such_table"}, "no_such_table"),
        ({"select": "DELETE FROM rows"}, "SELECT"),
        ({"select": "SELECT 1; SELECT 2"}, "SELECT|statement"),
        ({"primary_id": "nope"}, "nope"),
        ({"X": ["text", "id"]}, "singleton"),
        ({"max_chunk_size": 0}, "max_chunk_size=0"),
        ({"limit": 0}, "limit=0"),
        ({"max_failed": -1}, "max_failed=-1"),
        ({"max_failed": 1.5}, "max_failed=1.5"),
        ({"max_failed": True}, "max_failed=True"),
        ({"refresh": "all"}, "refresh='all'"),
        ({"overwrite": True, "retry_failed": True}, "choose one"),
        ({"predict_id": "a/b"}, "a/b"),
        ({"predict_id": "../m"}, "predict_id"),
        ({"predict_id": "a#1"}, "predict_id"),
        ({"predict_id": " "}, "predict_id"),
        ({"ids": "abc"}, "ids"),
        ({"ids": 5}, "ids"),
        ({"ids": [[1]]}, "ids"),
        ({"X": 5}, "X=5"),
        ({"primary_id": None}, "primary_id=None"),
        ({"db": {}}, "db="),
        ({"temprature": 1}, "temperature"),
        ({"shards": 2}, "task"),
        ({"context": "unused"}, "context"),
    ],
)
def test_a_wrong_call_is_refused_before_any_work(
    model: VllmAPI, place: Place, sent: Sent, wrong: dict[str, Any], words: str
) -> None:
    """The message names the mistake; nothing is sent or written."""
    place.fill_texts("a")
    call = {"X": "text", "select": "rows", **wrong}
    with pytest.raises(InvalidCall, match=words):
        model.predict_in_db(**call)
    assert sent() == []
    assert _there(place) == []


def test_keys_must_be_unique_and_there(model: VllmAPI, place: Place, sent: Sent) -> None:
    """Duplicate and NULL keys are refused with their count and an example."""
    place.fill_texts("a", "b", "a", None)
    with pytest.raises(InvalidCall, match="text"):
        model.predict_in_db("id", "rows", primary_id="text")
    with pytest.raises(InvalidCall, match=r"1.*a"):
        model.predict_in_db("id", "SELECT * FROM rows WHERE text IS NOT NULL", primary_id="text")
    assert sent() == []


def test_keys_of_several_types_name_a_group(model: VllmAPI, tmp_path: Path) -> None:
    """SQLite lets a column hold numbers and texts at once; the group is named all the same."""
    url = f"sqlite:///{tmp_path}/mixed.db"
    with closing(sqlite3.connect(tmp_path / "mixed.db")) as database:
        database.execute("CREATE TABLE rows (id PRIMARY KEY, text)")
        database.executemany("INSERT INTO rows VALUES (?, ?)", [(1, "a"), ("x", "b")])
        database.commit()
    report = model.predict_in_db("text", "rows", db=url)
    assert report.succeeded == 2


def test_outputs_under_a_name_of_their_own(model: VllmAPI, place: Place) -> None:
    """`model_update_kwargs` may name the outputs table, but no name leads out of the lake."""
    place.fill_texts("a")
    ask(changed(model, model_update_kwargs={"table": "answers"}))
    (row,) = place.db.outputs("m", table="answers").to_pylist()
    assert row["output"] == answer_to("a")
    with pytest.raises(ValidationError, match=r"table='../x' cannot name a table"):
        changed(model, model_update_kwargs={"table": "../x"})


def test_outputs_of_another_shape_are_refused(model: VllmAPI, place: Place, sent: Sent) -> None:
    """Existing outputs with other columns are left alone; the way out is another predict_id."""
    place.fill_texts("a")
    ask(model)
    sent()
    with pytest.raises(InvalidCall, match="predict_id"):
        ask(changed(model, datatype="int"))
    assert sent() == []
    assert place.answers() == {0: answer_to("a")}


def test_a_model_without_tables_says_so(server: ScriptedServer) -> None:
    """Without a db the call is refused."""
    with pytest.raises(InvalidCall, match="has no db"):
        VllmAPI(identifier="m", api_url=server.url).predict_in_db("text", "rows")


@pytest.mark.parametrize(
    ("columns", "signature"),
    [
        ([], "*args"),
        (["a", "a"], "*args"),
        ({"a": 1}, "*args"),
        ({"a": "b"}, "*args"),
        ({"a": 0}, "**kwargs"),
        ({"a": 0, "b": 0}, "*args"),
        ({"a": "x", "b": "x"}, "**kwargs"),
    ],
)
def test_columns_that_fit_no_argument_are_refused(columns: Any, signature: Any) -> None:
    """`*args` takes positions without a gap, `**kwargs` takes names, and no column comes twice."""
    with pytest.raises(InvalidCall, match="X="):
        records(columns, signature)
