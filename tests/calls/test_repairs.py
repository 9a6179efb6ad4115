"""Further attempts at rows whose answers are not accepted: sent back with the reason, or sampled anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from tests.servers.scripted_server import Asked, Reply, ScriptedServer, refused, usual
from vllm_tasks import InvalidCall, RowError, VllmAPI
from vllm_tasks.calls.call import Call
from vllm_tasks.calls.datatypes import Undecodable
from vllm_tasks.calls.repairs import TURN, Repairs
from vllm_tasks.results import Choice, Completion
from vllm_tasks.rows import Request, Result


def answers(text: Callable[[Asked], str | None]) -> Callable[[Asked], Reply | None]:
    """A script that answers with `text`; it refuses a request without one."""

    def script(asked: Asked) -> Reply | None:
        if not asked.path.endswith("completions"):
            return None
        found = text(asked)
        if found is None:
            return refused(400, "this is too long")
        reply = usual(asked)
        for choice in reply.body["choices"]:
            choice.update({"text": found} if "text" in choice else {"message": {"content": found}})
        return reply

    return script


def repaired(asked: Asked) -> str:
    """A number, once it is told that a word is none."""
    return "7" if "Answer again" in asked.prompt else "seven"


def api(server: ScriptedServer, **fields: Any) -> VllmAPI:
    return VllmAPI(**{"identifier": "m", "model": "m", "api_url": server.url, "chat": False, **fields})


# ---------------------------------------------------------------------- repair


def test_an_answer_is_sent_back_with_the_reason(server: ScriptedServer) -> None:
    """The chat has the answer and a further turn, with all else as before; a good row has one request."""
    server.script = answers(lambda a: "1" if a.body["messages"][0]["content"] == "one" else repaired(a))
    with api(server, chat=True, datatype="int", repair=1, predict_kwargs={"max_tokens": 5}) as model:
        assert model.predict_batches(["one", "seven"]) == [1, 7]
    assert len(server.posts) == 3
    assert server.posts[-1].body["messages"] == [
        {"role": "user", "content": "seven"},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": TURN.format(why="is not an integer of 64 bits")},
    ]
    assert server.posts[-1].body["max_tokens"] == 5


def test_a_text_is_continued(server: ScriptedServer) -> None:
    """Without chat, the answer and the turn follow the prompt as text."""
    server.script = answers(repaired)
    with api(server, datatype="int", repair=1) as model:
        assert model.predict("How many? ") == 7
    turn = TURN.format(why="is not an integer of 64 bits")
    assert server.posts[-1].prompt == f"How many? seven\n\n{turn}\n\n"


def test_each_repair_sees_all_before_and_they_have_an_end(server: ScriptedServer) -> None:
    """The last answer is the error of the row, with its text."""
    server.script = answers(lambda a: f"word {a.prompt.count('Answer again')}")
    with api(server, datatype="int", repair=2) as model:
        (error,) = model.predict_batches(["x"], on_error="return")
    assert isinstance(error, RowError)
    assert (error.kind, error.index) == ("output", 0)
    assert error.message == "the answer is not an integer of 64 bits: word 2"
    assert len(server.posts) == 3
    assert server.posts[-1].prompt.count("word 1") == 1


def test_a_repair_that_fails_leaves_the_first_error(server: ScriptedServer) -> None:
    """The longer prompt may not fit: the answer that was not accepted says more."""
    server.script = answers(lambda a: None if "Answer again" in a.prompt else "seven")
    with api(server, datatype="int", repair=1) as model:
        (error,) = model.predict_batches(["x"], on_error="return")
    assert isinstance(error, RowError)
    assert error.kind == "output"
    assert error.message.endswith(": seven")


def test_a_row_that_has_no_answer_is_not_repaired(server: ScriptedServer) -> None:
    """Nothing can be sent back."""
    server.script = answers(lambda _: None)
    with api(server, datatype="int", repair=1) as model:
        (error,) = model.predict_batches(["x"], on_error="return")
    assert isinstance(error, RowError)
    assert error.kind == "refused"
    assert len(server.posts) == 1


def test_equal_rows_share_their_repair(server: ScriptedServer) -> None:
    """Folded rows get one answer, also after a repair."""
    server.script = answers(repaired)
    with api(server, datatype="int", repair=1, predict_kwargs={"temperature": 0}) as model:
        assert model.predict_batches(["x", "x"]) == [7, 7]
    assert len(server.posts) == 2


def test_completions_are_as_vllm_gave_them(server: ScriptedServer) -> None:
    """They are not decoded, so nothing is repaired."""
    server.script = answers(repaired)
    with api(server, datatype="int", repair=1) as model:
        (full,) = model.completions(["x"])
    assert type(full) is Completion
    assert full.text == "seven"


# ---------------------------------------------------------------------- check


def is_said(value: int, row: str) -> str | None:
    return None if str(value) in row else f"{value} is not in the text"


@pytest.mark.parametrize("repair", [0, 1])
def test_a_check_sees_the_value_and_the_record(server: ScriptedServer, repair: int) -> None:
    """Its message is the error of the row, or what the model is told."""
    server.script = answers(lambda a: "8" if "Answer again" in a.prompt else "7")
    with api(server, datatype="int", check=is_said, repair=repair) as model:
        seven, eight = model.predict_batches(["7 up", "8 up"], on_error="return")
    assert seven == 7
    if repair:
        assert eight == 8
        assert "Your answer is refused by the check: 7 is not in the text. Answer" in server.posts[-1].prompt
    else:
        assert isinstance(eight, RowError)
        assert eight.message == "the answer is refused by the check: 7 is not in the text: 7"


def test_rows_that_a_check_may_tell_apart_are_not_folded(server: ScriptedServer) -> None:
    """Equal prompts of other records: each is checked with its own."""
    server.script = answers(lambda _: "7")
    with api(
        server,
        datatype="int",
        signature="**kwargs",
        prompt_func=lambda text, limit: text,
        check=lambda value, row: None if value < row["limit"] else "too large",
        predict_kwargs={"temperature": 0},
    ) as model:
        small, large = model.predict_batches(
            [{"text": "x", "limit": 5}, {"text": "x", "limit": 9}], on_error="return"
        )
    assert isinstance(small, RowError)
    assert large == 7


def test_a_check_that_fails_is_an_error_of_its_row(server: ScriptedServer) -> None:
    """Its own mistakes fail no other row."""

    def careless(value: str, row: str) -> Any:
        return True if row == "true" else 1 / len(row) and None

    with api(server, check=careless) as model:
        good, wrong, broken = model.predict_batches(["x", "true", ""], on_error="return")
    assert good == " x!"
    assert isinstance(wrong, RowError)
    assert "it returned a bool, not None or a message" in wrong.message
    assert isinstance(broken, RowError)
    assert "refused by the check: ZeroDivisionError" in broken.message


def test_a_check_that_would_end_the_process_is_an_error_of_its_row() -> None:
    """It would end the thread on which all engines run, and every call would wait for ever."""
    with pytest.raises(Undecodable, match="refused by the check: SystemExit: no"):
        Repairs(check=lambda value, row: sys.exit("no")).checked("x", "y")


def test_every_choice_is_checked(server: ScriptedServer) -> None:
    """One that is not accepted fails the row, as one that cannot be decoded does."""
    with api(server, check=lambda value, row: f"{value} of {row}") as model:
        (error,) = model.predict_batches(["x"], n=2, on_error="return")
    assert isinstance(error, RowError)
    assert "refused by the check:  x! of x" in error.message


# ---------------------------------------------------------------------- resample


def test_a_row_is_sampled_anew(server: ScriptedServer) -> None:
    """The same prompt is sent again; with a seed, the next one."""
    server.script = answers(lambda a: {None: "x", 5: "x", 6: "y", 7: "7"}[a.body.get("seed")])
    with api(server, datatype="int", resample=3) as model:
        assert model.predict("How many?", seed=5) == 7
        assert [p.body["seed"] for p in server.posts] == [5, 6, 7]
        assert {p.prompt for p in server.posts} == {"How many?"}
        assert isinstance(model.predict_batches(["x"], on_error="return")[0], RowError)
    assert len(server.posts) == 3 + 4


# ---------------------------------------------------------------------- refusals and identity


@pytest.mark.parametrize(
    ("fields", "call", "said"),
    [
        ({"resample": 1}, {"temperature": 0}, "resample with temperature=0"),
        ({"repair": 1}, {"n": 2}, "repair sends one answer back, and n=2"),
    ],
)
def test_what_could_not_help_is_refused(
    server: ScriptedServer, fields: dict[str, Any], call: dict[str, Any], said: str
) -> None:
    """Before any row is sent, also if only the call says so."""
    with api(server, **fields) as model, pytest.raises(InvalidCall, match=re.escape(said)):
        model.predict("x", **call)
    assert not server.posts


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"repair": 1, "resample": 1}, "use one of them"),
        ({"repair": -1}, "greater than or equal to 0"),
        ({"check": len}, r"called as check\(value, row\)"),
        ({"check": "os.path.join"}, "is outside"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], said: str) -> None:
    """When the model is made."""
    with pytest.raises(ValidationError, match=said):
        VllmAPI(identifier="m", **fields)


def test_repairs_count_in_the_fingerprint_only_where_there_are_any(server: ScriptedServer) -> None:
    """Nothing for the default; the words to the model for `repair`; the function for `check`."""

    def identity(**fields: Any) -> dict[str, Any]:
        return api(server, **fields)._decoder({}).identity()

    plain = identity()
    assert not {"repair", "resample", "check", "turn"} & plain.keys()
    assert identity(repair=1)["turn"] == TURN
    found = [plain, identity(repair=1), identity(repair=2), identity(resample=1), identity(check=is_said)]
    assert len({str(each) for each in found}) == len(found)


# ---------------------------------------------------------------------- on a work pool


def on_pool(model: VllmAPI, rounds: list[list[Any]]) -> Call:
    """A call whose requests are processed elsewhere, and the prompts of each round."""

    def answerer(requests: Sequence[Request | RowError]) -> list[Result]:
        prompts = [r.prompt for r in requests if isinstance(r, Request)]
        rounds.append(prompts)
        told = ["Answer again" in str(prompt) for prompt in prompts]
        return [Completion((Choice("7" if again else "seven"),), 1, 1) for again in told]

    return replace(model.prepare(model.predict), answerer=answerer)


def test_a_pool_gets_repairs_as_further_requests(server: ScriptedServer) -> None:
    """They are made here, where the datatype and the check are; the pool gets finished prompts."""
    rounds: list[list[Any]] = []
    call = on_pool(api(server, datatype="int", repair=2), rounds)
    assert call.predict_batches(["a", "b"]) == [7, 7]
    assert [len(prompts) for prompts in rounds] == [2, 2]
    assert rounds[0] == ["a", "b"]


def test_repairs_on_a_pool_need_to_know_what_a_turn_is(server: ScriptedServer) -> None:
    """With chat=None only the pool knows whether a text is chat; messages are, whatever it knows."""
    rounds: list[list[Any]] = []
    call = on_pool(api(server, chat=None, datatype="int", repair=1), rounds)
    with pytest.raises(InvalidCall, match="set chat=True or chat=False"):
        call.predict("a")
    assert not rounds
    assert call.predict([{"role": "user", "content": "a"}]) == 7
