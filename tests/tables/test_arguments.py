"""`predict_in_db`: wrong calls, and outputs that do not fit."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.places import Place
from tests.servers.scripted_server import ScriptedServer, answer_to
from tests.tables.runs import Sent, ask, changed, there
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.calls.columns import records


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
        ({"overwrite": "no"}, "overwrite='no' must be True or False"),
        ({"retry_failed": None}, "retry_failed=None"),
        ({"same_source": "false"}, "same_source='false'"),
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
    assert there(place) == []


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
        ({"a", "b"}, "*args"),
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
