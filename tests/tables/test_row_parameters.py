"""Columns with sampling parameters of the row's own, over a table."""

from __future__ import annotations

from typing import Any

import pytest

from tests.places import Place
from tests.servers.scripted_server import ScriptedServer, usual
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.validation import Dataset, Metric, Validation

BUDGET = {"max_tokens": "budget"}
SELECT = "SELECT id, text, CASE WHEN id = 2 THEN NULL ELSE id + 3 END AS budget FROM rows"


def bodies(server: ScriptedServer, since: int = 0) -> dict[str, Any]:
    return {post.prompt: post.body.get("max_tokens") for post in server.posts[since:]}


def test_columns_give_each_row_its_parameters(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """A whole number stays one, in every kind of table; NULL is the call's own value."""
    place.fill_texts("a", "b", "c")
    given = {"sampling_columns": BUDGET, "max_tokens": 99}
    report = model.predict_in_db("text", SELECT, **given)
    assert (report.succeeded, report.failed) == (3, 0)
    assert bodies(server) == {"a": 3, "b": 4, "c": 99}
    assert model.predict_in_db("text", SELECT, **given).processed == 0


def test_a_changed_parameter_is_a_changed_input(place: Place, server: ScriptedServer) -> None:
    """It counts in the hash of the row's input; the names of the columns count in the fingerprint."""
    place.fill_texts("a", "b")
    select = "SELECT id, text, {} AS budget, 7 AS other FROM rows"
    with VllmAPI(identifier="m", api_url=server.url, db=place.db) as model:
        model.predict_in_db("text", select.format("5"), sampling_columns=BUDGET)
        again = {"sampling_columns": BUDGET, "refresh": "changed", "same_source": True}
        changed = select.format("CASE id WHEN 0 THEN 5 ELSE 6 END")
        seen = len(server.posts)
        assert model.predict_in_db("text", changed, **again).processed == 1
        assert bodies(server, seen) == {"b": 6}
        others = {"sampling_columns": {"max_tokens": "other"}, "same_source": True}
        assert model.predict_in_db("text", changed, **others).processed == 2
        assert model.predict_in_db("text", changed, same_source=True).processed == 2


def test_previews_and_estimates_send_them_too(server: ScriptedServer, tmp_path: Any) -> None:
    """Both take the argument of `predict_in_db`."""
    place = Place(str(tmp_path / "lake"))
    place.fill_texts(*"abcdefgh")
    with VllmAPI(identifier="m", api_url=server.url, db=place.db) as model:
        model.preview("text", SELECT, 2, sampling_columns=BUDGET)
        assert set(bodies(server).values()) <= {3, 4, None, 6, 7, 8, 9, 10}
        seen = len(server.posts)
        assert model.estimate("text", SELECT, 8, sampling_columns=BUDGET).sample == 8
    assert bodies(server, seen) == {"a": 3, "b": 4, "c": None} | {"defgh"[i]: 6 + i for i in range(5)}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"max_token": "budget"}, "did you mean 'max_tokens'?"),
        ({"max_tokens": 5}, "a value that all rows share is passed as max_tokens=60"),
        ({"n": "budget"}, "n is the same for all rows"),
        ({"max_tokens": "bugdet"}, "did you mean 'budget'?"),
        (["budget"], "must map sampling parameters to columns"),
    ],
)
def test_wrong_columns_are_refused(server: ScriptedServer, tmp_path: Any, columns: Any, words: str) -> None:
    """Before any row is sent."""
    place = Place(str(tmp_path / "lake"))
    place.fill_texts("a")
    with (
        VllmAPI(identifier="m", api_url=server.url, db=place.db) as model,
        pytest.raises(InvalidCall) as error,
    ):
        model.predict_in_db("text", SELECT, sampling_columns=columns)
    assert words in str(error.value).replace("\n", " ")
    assert server.posts == []


def test_a_value_that_is_no_parameter_fails_its_row(server: ScriptedServer, tmp_path: Any) -> None:
    """Other rows are answered."""
    place = Place(str(tmp_path / "lake"))
    place.fill_texts("a", "b")
    select = "SELECT id, text, CASE id WHEN 0 THEN 'x'::BLOB END AS end FROM rows"
    with VllmAPI(identifier="m", api_url=server.url, db=place.db) as model:
        report = model.predict_in_db("text", select, sampling_columns={"stop": "end"}, max_failed=None)
    assert (report.succeeded, report.failed) == (1, 1)
    assert "bytes is not JSON serializable" in place.outputs()[0]["_error"]


def test_a_validation_sends_them_too(server: ScriptedServer, tmp_path: Any) -> None:
    """The columns are those of the data set, and part of its snapshot."""
    rows = [{"q": f"q{i}", "a": f" q{i}!", "budget": i or None} for i in range(3)]
    chosen = Validation(
        datasets=[Dataset(identifier="exam", raw_data=rows)],
        metrics=[Metric(identifier="exact_match")],
        key=("q", "a"),
    )
    with VllmAPI(identifier="m", api_url=server.url, db=str(tmp_path)) as model:
        report = model.validate(chosen, sampling_columns=BUDGET)
        assert bodies(server) == {"q0": None, "q1": 1, "q2": 2}
        assert model.validate(chosen).fingerprint != report.fingerprint


def test_rows_with_their_own_limit_are_not_warned_of(
    server: ScriptedServer, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning of truncated answers is for callers that have set no limit."""
    place = Place(str(tmp_path / "lake"))
    place.fill_texts("a")

    def truncated(asked: Any) -> Any:
        if "prompt" not in (asked.body or {}):
            return None
        reply = usual(asked)
        reply.body["choices"][0]["finish_reason"] = "length"
        return reply

    server.script = truncated
    with VllmAPI(identifier="m", api_url=server.url, db=place.db) as model:
        model.predict_in_db("text", SELECT, sampling_columns=BUDGET)
        assert "truncated" not in caplog.text
        model.predict_in_db("text", SELECT, same_source=True)
    assert "1 of 1 answers were truncated" in caplog.text
