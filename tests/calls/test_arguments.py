"""Arguments with another meaning: misspelt names, objects of another kind, fields that X does not give."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.places import Place
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks._prefect.mapping import ModelTask
from vllm_tasks.calls.arguments import check_spelling
from vllm_tasks.calls.sampling import known_names
from vllm_tasks.placement.parameters import parameters
from vllm_tasks.tables import predict_in_db


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(str(tmp_path / "lake"))
    place.fill_texts("a", "b")
    return place


@pytest.fixture
def model(server: ScriptedServer, place: Place) -> VllmAPI:
    return VllmAPI(identifier="m", api_url=server.url, db=place.db)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        *(("overwite", "overwrite"), ("primary_key", "primary_id"), ("retry_fail", "retry_failed")),
        *(("refesh", "refresh"), ("max_fail", "max_failed"), ("temprature", "temperature")),
        *(("same_sourse", "same_source"), ("limt", "limit"), ("max_token", "max_tokens")),
    ],
)
def test_a_misspelt_argument_is_recognised(model: VllmAPI, wrong: str, right: str) -> None:
    """The error is one sentence, with the name that was probably meant."""
    with pytest.raises(InvalidCall, match=f"did you mean '{right}'") as refused:
        model.predict_in_db("text", "rows", **{wrong: 1})
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("method", ["predict_batches", "completions"])
def test_so_is_one_of_a_call_over_rows(model: VllmAPI, method: str) -> None:
    with pytest.raises(InvalidCall, match="did you mean 'on_error'"):
        getattr(model, method)(["a"], on_eror="return")


@pytest.mark.parametrize("select", [None, 7, ["rows"], [{"id": 1}], b"rows"], ids=lambda s: type(s).__name__)
def test_what_names_no_table_is_refused(model: VllmAPI, select: Any) -> None:
    """The error says what to give, and does not repeat the value's contents."""
    with pytest.raises(InvalidCall, match=r"select=.*name of a table") as refused:
        model.predict_in_db("text", select)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("xs", [None, 3, {"a", "b"}, "text"])
def test_what_is_no_list_of_records_is_refused(model: VllmAPI, xs: Any) -> None:
    """It would be a TypeError of Python, or rows in another order each time."""
    with pytest.raises(InvalidCall, match="xs must be a list of records"):
        model.predict_batches(xs)


def test_a_set_of_columns_is_refused(model: VllmAPI) -> None:
    """Its order, and so the prompt, would be another in each process."""
    several = model.model_copy(update={"signature": "*args", "prompt": "{0} {1}"})
    with pytest.raises(InvalidCall, match="has no order"):
        several.predict_in_db({"id", "text"}, "t")  # type: ignore[arg-type]


def test_a_path_is_its_text(model: VllmAPI, place: Place) -> None:
    """A path works as the table, as `db`, and as the field of a model."""
    assert model.predict_in_db("text", Path("rows"), db=Path(place.url)).succeeded == 2  # type: ignore[arg-type]
    for db in (place.url, Path(place.url)):
        own = VllmAPI(identifier="own", api_url=model.api_url, db=db)  # type: ignore[arg-type]
        assert own.db is not None
        assert own.db.url.get_secret_value() == place.url


def test_a_file_is_no_lake(model: VllmAPI, place: Place, tmp_path: Path) -> None:
    """If a folder is expected, the error says how to reach the file."""
    file = f"{place.url}/rows.parquet"
    with pytest.raises(InvalidCall, match=r"select='rows\.parquet'"):
        model.predict_in_db("text", "rows", db=file)
    for name in ("x.db", "there.sqlite"):
        (tmp_path / "there.sqlite").touch()
        with pytest.raises(InvalidCall, match=f"sqlite:///.*{name}"):
            model.predict_in_db("text", "rows", db=str(tmp_path / name))
    os.rename(place.url, tmp_path / "a.db")  # a folder may have any name
    assert model.predict_in_db("text", "rows", db=str(tmp_path / "a.db")).succeeded == 2


def test_what_is_no_datalayer_is_refused(model: VllmAPI, place: Place) -> None:
    with closing(sqlite3.connect(":memory:")) as connection:
        for db in (connection, {"url": place.url}, 7):
            with pytest.raises(InvalidCall, match="neither a Datalayer nor its URL"):
                model.predict_in_db("text", "rows", db=db)  # type: ignore[arg-type]
        with pytest.raises(ValidationError, match="db is a Connection; give a Datalayer"):
            VllmAPI(identifier="m", db=connection)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "columns", "words"),
    [
        ({"signature": "*args", "prompt": "{0} and {1}"}, ["text"], r"\{1\}"),
        ({"signature": "**kwargs", "prompt": "Say {text}"}, {"text": "body"}, r"\{text\}.*'body'"),
        ({"signature": "*args,**kwargs", "prompt": "{0} {txt}"}, {"text": 0}, r"\{txt\}"),
        ({"signature": "**kwargs"}, ["text"], r"\{input\}"),
        ({"signature": "**kwargs", "prompt_func": lambda body: body}, ["text"], "prompt_func.*body"),
        ({"signature": "*args", "prompt_func": lambda a, b: a + b}, ["text"], "prompt_func.*b"),
    ],
)
def test_fields_that_x_does_not_give_are_refused_before_any_row(
    model: VllmAPI, place: Place, server: ScriptedServer, fields: Any, columns: Any, words: str
) -> None:
    """A field that no row can fill is reported once, before any row is sent or committed."""
    wrong = VllmAPI(identifier="m", api_url=server.url, db=place.db, **fields)
    with pytest.raises(InvalidCall, match=words):
        wrong.predict_in_db(columns, "rows", max_failed=None)
    assert not server.posts
    with pytest.raises(InvalidCall):
        place.outputs()


def test_fields_of_x_context_and_artifacts_are_there(server: ScriptedServer, place: Place) -> None:
    """Fields may come from other arguments of the call, from a function's defaults, and from `**kwargs`."""
    template = {"signature": "**kwargs", "prompt": "{context} {id}: {text}"}
    function = {"signature": "**kwargs", "prompt_func": lambda text, more="", *, context, **_: text + context}
    for number, fields in enumerate((template, function)):
        model = VllmAPI(identifier=f"m{number}", api_url=server.url, db=place.db, **fields)  # type: ignore[arg-type]
        assert model.predict_in_db(["text", "id"], "rows", context="c").succeeded == 2


def test_what_is_too_large_for_a_flow_run_is_refused(model: VllmAPI) -> None:
    """Prefect's server takes 512 KiB of parameters; the largest part of the call is named."""
    call = {"work": "table", "options": {"ids": list(range(200_000)), "limit": None}}
    with pytest.raises(InvalidCall, match=r"'ids'.*524,288"):
        parameters(call, model, None)
    assert parameters({**call, "options": {"ids": [1]}}, model, None)


def test_mapping_goes_over_models_and_tables_alone(model: VllmAPI, place: Place) -> None:
    """A task is not mapped over a model's fields, a datalayer's, or a list of columns, keys or contexts."""
    from prefect import unmapped

    task = ModelTask(lambda model, X, select, **more: None, name="x")  # noqa: N803
    wholes = {"model": model, "db": place.db, "X": ["a", "b"], "ids": [1, 2], "context": ["c"], "stop": ["."]}
    for name, value in wholes.items():
        assert isinstance(task._each(name, value), unmapped), name
    for name, value in {"model": [model], "select": ["t", "u"], "predict_id": ("a", "b")}.items():
        assert task._each(name, value) is value, name


def test_a_routed_call_knows_its_own_arguments(model: VllmAPI) -> None:
    """A routed call takes all its options together: none of them is reported as misspelt."""
    options = {"predict_id": "p", "limit": 1, "same_source": False, "shards": 1, "temperature": 0}
    check_spelling(options, predict_in_db, known_names("openai"), more=("shards",))
    with pytest.raises(InvalidCall, match="'shards'"):
        check_spelling(["shard_s"], predict_in_db, known_names("openai"), more=("shards",))
