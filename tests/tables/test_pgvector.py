"""Vectors in a PostgreSQL database with the extension pgvector."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import sqlalchemy as sa

from tests.places import Place
from tests.servers.postgres import Postgres, binaries_with_pgvector, running
from tests.servers.scripted_server import Reply, ScriptedServer, vector_of
from tests.tables.runs import ask, changed
from vllm_tasks import InvalidCall, VllmAPI

EXTENSION = "CREATE EXTENSION vector"


@pytest.fixture(scope="module")
def with_pgvector() -> Iterator[Postgres]:
    """A real server that has the extension."""
    if (found := binaries_with_pgvector()) is None:
        pytest.skip("needs pgvector: the package pgserver has no wheel for this machine or Python")
    with running(found) as server:
        yield server


@pytest.fixture
def place(with_pgvector: Postgres) -> Place:
    place = Place(with_pgvector.new_database())
    place.fill_texts("a", "b", "printer")
    return place


@pytest.fixture
def embed(model: VllmAPI) -> VllmAPI:
    return changed(model, task="embed")


def sql(place: Place, statement: str) -> list[Any]:
    """The rows of a statement, as a tool without this package reads them."""
    engine = sa.create_engine(place.url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        done = connection.exec_driver_sql(statement)
        rows = done.all() if done.returns_rows else []
    engine.dispose()
    return rows


def read(place: Place, select: str) -> list[Any]:
    """The rows of a statement, as a source."""
    with closing(place.db.tables()) as tables:
        return [row for page in tables.read(select) for row in page]


def type_of(place: Place) -> str:
    return str(sql(place, "SELECT pg_typeof(output)::text FROM _outputs__m LIMIT 1")[0][0])


def test_vectors_have_the_type_of_the_extension(embed: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """They are read again as in other tables, also as a source; a search orders them without a cast."""
    sql(place, EXTENSION)
    server.script = lambda asked: Reply({"data": []}) if asked.prompt == "b" else None
    ask(embed)
    assert type_of(place) == "vector"
    assert place.answers() == {0: vector_of("a"), 1: None, 2: vector_of("printer")}
    assert str(place.db.outputs("m").schema.field("output").type) == "list<element: float>"
    rows = read(place, "SELECT id, output FROM _outputs__m")
    assert {row["id"]: row["output"] for row in rows} == place.answers()
    nearest = f"SELECT id FROM _outputs__m ORDER BY output <-> '{vector_of('printer')}' LIMIT 1"
    assert sql(place, nearest) == [(2,)]
    server.script = lambda _: None
    assert ask(embed, retry_failed=True).succeeded == 1
    assert place.answers()[1] == vector_of("b")
    assert ask(embed).processed == 0


def test_a_table_keeps_its_type(embed: VllmAPI, place: Place) -> None:
    """Neither the extension nor a run changes it. After its owner has, with an index, runs resume."""
    ask(embed)
    sql(place, EXTENSION)
    place.fill_texts("a", "b", "printer", "new")
    assert ask(embed).processed == 1
    assert type_of(place) == "real[]"
    sql(place, "ALTER TABLE _outputs__m ALTER output TYPE vector(4)")
    sql(place, "CREATE INDEX ON _outputs__m USING hnsw (output vector_cosine_ops)")
    place.fill_texts("a", "b", "printer", "new", "newest")
    assert ask(embed).processed == 1
    assert place.answers()[4] == vector_of("newest")
    with pytest.raises(InvalidCall, match="expected 4 dimensions, not 8"):
        ask(embed, dimensions=8)


def test_an_extension_that_is_not_searched_is_not_used(embed: VllmAPI, place: Place) -> None:
    """The type would have another name in every session."""
    sql(place, "CREATE SCHEMA apart")
    sql(place, f"{EXTENSION} SCHEMA apart")
    ask(embed)
    assert type_of(place) == "real[]"


def test_a_column_of_a_source_is_a_list(model: VllmAPI, place: Place) -> None:
    """As an array of numbers is; and it is no key."""
    sql(place, EXTENSION)
    select = "SELECT id, '[1,0.5]'::vector AS text FROM rows"
    assert read(place, select)[0]["text"] == [1.0, 0.5]
    with pytest.raises(InvalidCall, match="'text' is of the type vector, which does not identify a row"):
        model.predict_in_db("id", select, primary_id="text")
