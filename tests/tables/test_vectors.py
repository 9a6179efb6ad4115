"""Tables of a model that returns numbers: vectors, scores and classes, in every kind of store."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from deltalake import DeltaTable

from tests.jobs import Jobs
from tests.places import Place
from tests.servers.scripted_server import CLASSES, Asked, Reply, ScriptedServer, usual, vector_of
from tests.tables.runs import ask, changed, there
from tests.tables.test_exactly_once import model_of
from vllm_tasks import InvalidCall, VllmAPI


def rows_of(place: Place) -> list[Mapping[str, Any]]:
    """The outputs as a source."""
    with closing(place.db.tables()) as tables:
        return [row for page in tables.read("_outputs__m") for row in page]


def test_an_embedding_is_a_vector_in_every_store(model: VllmAPI, place: Place) -> None:
    """It is typed in the outputs and read again alike, and a second call processes nothing."""
    place.fill_texts("a", "b")
    embed = changed(model, task="embed")
    assert ask(embed).succeeded == 2
    rows = place.outputs()
    assert [row["output"] for row in rows] == [vector_of("a"), vector_of("b")]
    assert str(place.db.outputs("m").schema.field("output").type) == "list<element: float>"
    assert rows[0]["_prompt_tokens"] == 3
    assert rows[0]["_finish_reason"] is None
    assert {row["id"]: row["output"] for row in rows_of(place)} == {0: vector_of("a"), 1: vector_of("b")}
    assert ask(embed).processed == 0


def test_embeddings_have_estimates_and_budgets(model: VllmAPI, place: Place) -> None:
    """They have no tokens of an answer, which is another thing than a server that counts none."""
    place.fill_texts(*"abcdefghij")
    embed = changed(model, task="embed")
    found = embed.estimate("text", "rows", sample=8)
    assert (found.missing, found.prompt_tokens.value, found.completion_tokens.value) == (10, 30, 0)
    report = ask(embed, max_total_tokens=1000)
    assert (report.succeeded, report.prompt_tokens, report.stopped_by) == (10, 30, None)
    assert report.samples == (), "which would be empty texts"


def test_a_vector_keeps_its_32_bits(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """Numbers that are not short in base 10 come back as the nearest number of 32 bits, from any server."""
    exact = [float(np.float32(x)) for x in (0.1, -1 / 3, 1e-38, 3.4e38)]
    server.script = lambda asked: _embedding(asked, [0.1, -1 / 3, 1e-38, 3.4e38])  # as decimal numbers
    place.fill_texts("a")
    assert changed(model, task="embed").predict("a") == exact
    ask(changed(model, task="embed"))
    (row,) = rows_of(place)
    assert [float(np.float32(x)) for x in row["output"]] == exact
    assert row["output"][:2] == [0.1, -0.33333334]  # printed as other columns of 32 bits are


def test_vectors_are_stored_as_other_programs_read_them(model: VllmAPI, place: Place) -> None:
    """An array of floats in Delta and PostgreSQL, little-endian bytes in SQLite."""
    place.fill_texts("a")
    ask(changed(model, task="embed"))
    if place.kind == "lake":
        (field,) = (f for f in DeltaTable(f"{place.url}/_outputs__m").schema().fields if f.name == "output")
        assert '"elementType":"float"' in field.to_json().replace(" ", "")
        return
    engine = sa.create_engine(place.url.replace("postgresql:", "postgresql+psycopg:"))
    kind = "typeof(output)" if place.kind == "sqlite" else "pg_typeof(output)::text"
    with engine.connect() as connection:
        stored, kind = connection.execute(sa.text(f"SELECT output, {kind} FROM _outputs__m")).one()
    engine.dispose()
    assert kind == ("blob" if place.kind == "sqlite" else "real[]")
    assert (np.frombuffer(stored, "<f4").tolist() if place.kind == "sqlite" else stored) == vector_of("a")


def test_all_vectors_of_a_table_have_one_length(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """One of another length is an error of its row, also if the others were committed by an earlier call."""
    embed = changed(model, task="embed")
    place.fill_texts("a", "b", "longer")
    server.script = lambda asked: _embedding(asked, [0.5] * 5) if asked.prompt == "longer" else None
    ask(embed)
    *_, wrong = place.outputs()
    assert wrong["output"] is None
    assert wrong["_error"] == "output: column 'output': 5 numbers, and the vectors before it have 4"
    place.fill_texts("a", "b", "longer", "longer")
    assert ask(embed).failed == 1
    assert place.outputs()[3]["_error"].endswith("the vectors before it have 4")


def test_other_dimensions_are_other_outputs(model: VllmAPI, place: Place) -> None:
    """They count in the fingerprint, so that every row is processed again, to the new length."""
    place.fill_texts("a", "b")
    embed = changed(model, task="embed")
    ask(embed)
    assert ask(embed, dimensions=8).replaced == 2
    assert {len(row["output"]) for row in place.outputs()} == {8}


def test_a_failed_row_has_no_vector(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """It has its error, and its vector after another try."""
    place.fill_texts("a", "b")
    server.script = lambda asked: Reply({"data": []}) if asked.prompt == "b" else None
    embed = changed(model, task="embed")
    assert ask(embed).failed == 1
    assert place.answers() == {0: vector_of("a"), 1: None}
    server.script = lambda _: None
    ask(embed, retry_failed=True)
    assert place.answers() == {0: vector_of("a"), 1: vector_of("b")}


@pytest.mark.parametrize("place", ["lake"], indirect=True)
def test_no_partition_is_a_vector(model: VllmAPI, place: Place) -> None:
    """A folder's name does not hold it."""
    with pytest.raises(ValueError, match="do not hold vectors exactly"):
        changed(model, task="embed", model_update_kwargs={"partition_by": ["output"]})


def test_a_score_is_of_two_columns(model: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """By position or by name; a row without one of the texts is an error."""
    place.fill_texts("a", None)
    select = (
        "SELECT id, text, 'why' AS q FROM rows"
        if place.kind == "lake"
        else "SELECT id, text, 'why' q FROM rows"
    )
    score = changed(model, task="score", signature="*args")
    score.predict_in_db(["q", "text"], select, max_failed=None)
    good, bad = place.outputs()
    assert good["output"] == 3 / 8 + 1
    assert bad["_error"] == ("prompt: task='score' takes two texts, a query and a document, got a str, None")
    (post,) = server.posts
    assert (post.path, post.body["text_1"], post.body["text_2"]) == ("/score", "why", "a")
    named = changed(model, task="score", signature="**kwargs", identifier="n")
    named.predict_in_db({"text": "document", "q": "query"}, select, max_failed=None)
    assert place.outputs("n")[0]["output"] == 3 / 8 + 1
    with pytest.raises(InvalidCall, match="takes two columns"):
        named.predict_in_db(["q", "text"], select)


def test_a_classification_has_three_columns(model: VllmAPI, place: Place) -> None:
    """Label, its probability, and those of all classes."""
    place.fill_texts("a", "b")
    classify = changed(model, task="classify")
    ask(classify)
    for row, text in zip(place.outputs(), "ab", strict=True):
        value = classify.predict(text)
        assert (row["label"], row["probability"]) == (value["label"], value["probability"])
        assert json.loads(row["probabilities"]) == value["probabilities"]
        assert value["probability"] == max(value["probabilities"]) == 0.625


def test_a_reward_is_a_number_before_any_activation(
    model: VllmAPI, place: Place, server: ScriptedServer
) -> None:
    """The request says so, because a server applies the model's activation otherwise."""
    place.fill_texts("a")
    ask(changed(model, task="reward", chat=True))
    assert place.answers() == {0: vector_of("a")[0] * 9 - 4}
    assert server.posts[0].body["use_activation"] is False
    assert server.posts[0].body["messages"] == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("task", ["embed", "classify"])
def test_killed_at_any_moment_no_vector_or_class_is_lost_or_doubled(
    place: Place, server: ScriptedServer, tmp_path: Path, task: str
) -> None:
    """After each SIGKILL committed rows are complete, and in the end each key has its own vector or class."""
    texts = [f"t{i}" for i in range(400)]
    place.fill_texts(*texts)
    model = {**model_of(server, place), "task": task}
    with Jobs(tmp_path / "log") as jobs:
        for _ in range(4):
            enough = len(server.posts) + random.randint(1, 120)
            job = jobs.start(model, "text", "rows", max_chunk_size=20)
            server.wait_until(lambda: len(server.posts) >= enough or len(there(place)) == len(texts))  # noqa: B023
            time.sleep(random.uniform(0, 0.1))
            jobs.kill(job)
        jobs.run(model, "text", "rows", max_chunk_size=20)
    rows = place.outputs()
    assert [row["id"] for row in rows] == list(range(400))
    if task == "embed":
        assert [row["output"] for row in rows] == [vector_of(text) for text in texts]
    else:
        assert [row["label"] for row in rows] == [CLASSES[vector_of(text)[0] < 0.5] for text in texts]
        assert {row["probability"] for row in rows} == {0.625}


def _embedding(asked: Asked, vector: list[Any]) -> Reply | None:
    if asked.body is None:
        return None
    reply = usual(asked)
    reply.body["data"][0]["embedding"] = vector
    return reply
