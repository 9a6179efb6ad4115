"""Outputs know their source: another source is refused, the same one under another name is accepted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.places import Place
from tests.servers.postgres import Postgres
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import Datalayer, InvalidCall, VllmAPI
from vllm_tasks.datalayer.source_id import source_id
from vllm_tasks.results import Report


@pytest.fixture
def model(server: ScriptedServer, place: Place) -> Iterator[VllmAPI]:
    with VllmAPI(identifier="m", api_url=server.url, db=place.db, retries=0) as model:
        yield model


def ask(model: VllmAPI, select: str, **options: Any) -> Report:
    return model.predict_in_db("text", select, **options)


PAIRS = [
    ("t", "t.parquet"),
    ("t", " t "),
    ("t", "./t.jsonl.gz"),
    ("t", "/lake/t.csv"),
    ("t", "t/"),
    ("t", "t/*.parquet"),
    ("sub/t.csv", "sub/t"),
    ("SELECT a FROM t", "select  a\n from t -- said\n;"),
]
OTHERS = [
    ("t", "u"),
    ("t", "sub/t"),
    ("t/2024*.parquet", "t/2025*.parquet"),
    ("SELECT 'a b' FROM t", "SELECT 'a  b' FROM t"),
    ("SELECT a FROM t WHERE b = 1", "SELECT a FROM t WHERE b = 2"),
    ("t", "SELECT * FROM t"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_harmless_changes_are_the_same_source(one: str, other: str) -> None:
    """A table by name or path, a statement with other white space, comments and letter case of keywords."""
    assert source_id(one, "/lake") == source_id(other, "/lake/")


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_other_tables_and_statements_are_other_sources(one: str, other: str) -> None:
    assert source_id(one, "/lake") != source_id(other, "/lake")


def test_a_source_is_not_its_host() -> None:
    """The location counts only if rows are read from another place than `db`, and never its host."""
    assert source_id("t", "postgresql://a/x") == source_id("public.t", "postgresql+psycopg://u:p@b/x")
    assert source_id("t", "/one") == source_id("t", "s3://bucket/two") == "t"
    assert source_id("t", "/one", "/one") == "t"
    assert source_id("t", "/one", "postgresql://u:secret@a/shop") == "shop/t"
    assert source_id("t", "/one", "postgresql://b/shop?x=1") == "shop/t"
    assert source_id("t", "/one", "postgresql://a/other") != "shop/t"


def test_a_place_is_the_same_however_it_is_written(
    model: VllmAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder or a file that is both `source` and `db`; options for reading are those of `source`."""
    monkeypatch.chdir(tmp_path)
    assert source_id("t", "data/", "./data") == source_id("t", str(tmp_path), ".") == "t"
    assert source_id("t", "sqlite:///x.db", f"sqlite:///{tmp_path}/./x.db") == "t"
    assert source_id("t", "/one", ".") == f"{tmp_path.name}/t"
    Path("data").mkdir()
    Path("data/t.csv").write_text("id;text\n1;a\n")
    german = Datalayer(url="./data", read={"t": {"delimiter": ";"}})
    assert ask(model, "t", source=german, db="data/").succeeded == 1
    report = ask(model, "SELECT id, text FROM t", source=german, db=f"{tmp_path}", predict_id="n")
    assert report.source.startswith("./data/query-")
    for wrong, words in ((" ", "is empty"), ("data/t.csv", "source='data'"), ("x.duckdb", "duckdb:///")):
        with pytest.raises(InvalidCall, match=words):
            ask(model, "t", source=wrong)


def test_outputs_in_a_schema_know_their_source(server: ScriptedServer, postgres: Postgres) -> None:
    """A second run, and one with a changed prompt and a limit, look into them as into any others."""
    place = Place(postgres.new_database())
    place.fill_texts("a", "b")
    engine = sa.create_engine(place.url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA answers"))
    engine.dispose()
    options: Any = {"api_url": server.url, "db": place.db, "retries": 0}
    options["model_update_kwargs"] = {"table": "answers.m"}
    with VllmAPI(identifier="m", **options) as model:
        assert [ask(model, "rows").processed for _ in range(2)] == [2, 0]
        with pytest.raises(InvalidCall, match="are of 'rows'"):
            ask(model, "SELECT * FROM rows")
    with VllmAPI(identifier="m", prompt="Say {input}", **options) as model:
        with pytest.raises(InvalidCall, match="preview"):
            ask(model, "rows", limit=1)
        assert ask(model, "rows").replaced == 2


def test_another_source_is_refused_before_any_row(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """Rows of another source have keys of the same values; the way out is named, and works."""
    place.fill_texts("a", "b")
    ask(model, "rows")
    statement = "SELECT id, 'other' AS text FROM rows"
    asked = len(server.posts)
    with pytest.raises(InvalidCall, match=r"are of 'rows', not of 'query-.*predict_id=.*same_source=True"):
        ask(model, statement)
    assert len(server.posts) == asked
    assert ask(model, statement, predict_id="own").succeeded == 2
    assert {row["_source"] for row in place.outputs()} == {"rows"}


def test_the_same_rows_by_another_name_go_on(model: VllmAPI, place: Place) -> None:
    """`same_source` is needed once; then outputs of both names resume with either name."""
    place.fill_texts("a")
    ask(model, "rows")
    place.fill_texts("a", "b")
    edited = "SELECT * FROM rows WHERE id < 10"
    assert ask(model, edited, same_source=True).processed == 1
    assert ask(model, edited).processed == 0
    assert ask(model, "rows").processed == 0
    assert ask(model, "  SELECT *\nFROM rows where id < 10;").processed == 0


def test_a_lake_that_was_moved_goes_on(server: ScriptedServer, tmp_path: Path) -> None:
    """It resumes with its outputs, under another name and by a file's name."""
    place = Place(str(tmp_path / "before"))
    place.fill_texts("a")
    model = VllmAPI(identifier="m", api_url=server.url)
    ask(model, "rows", db=place.url)
    shutil.move(place.url, tmp_path / "after")
    assert ask(model, "rows.parquet", db=str(tmp_path / "after")).processed == 0


def test_a_limit_replaces_no_outputs_of_another_prompt(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """A trial with another prompt is refused with the ways out; a trial of new rows is allowed."""
    place.fill_texts("a", "b")
    ask(model, "rows")
    asked = len(server.posts)
    with pytest.raises(InvalidCall, match=r"limit=1 would replace.*preview.*predict_id"):
        ask(model, "rows", limit=1, temperature=0.5)
    assert len(server.posts) == asked
    assert ask(model, "rows", limit=1, temperature=0.5, predict_id="trial").processed == 1
    report = ask(model, "rows", temperature=0.5)
    assert report.replaced == 2
    assert "2 outputs of an earlier prompt" in str(report)
    assert ask(model, "rows", overwrite=True, limit=1, temperature=0.5).replaced == 0


def test_a_limit_may_replace_errors(model: VllmAPI, place: Place) -> None:
    """A trial in which every row failed is repeated with another prompt."""
    place.fill_texts(None, None)
    ask(model, "rows", limit=2, max_failed=None)
    assert ask(model, "rows", limit=2, max_failed=None, temperature=0).replaced == 2


def test_a_saved_name_without_a_server(model: VllmAPI) -> None:
    """Without a server a name cannot be looked up: it is refused with the reason and the alternatives."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    words = r"'warehouse' is not a folder here.*PREFECT_API_URL.*a URL, or a path"
    nowhere = temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"})
    with nowhere, pytest.raises(InvalidCall, match=words):
        model.predict_in_db("text", "rows", source="warehouse")


def test_a_saved_name_with_the_end_of_its_line(model: VllmAPI) -> None:
    """As it is read from a file."""
    with pytest.raises(InvalidCall, match=r"'warehouse\\n' is neither a folder here nor the name"):
        model.predict_in_db("text", "rows", source="warehouse\n")
