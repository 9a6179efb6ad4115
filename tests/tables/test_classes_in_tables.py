"""Classes in outputs tables: typed columns, rows marked for review, and the labels that people give."""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.lettered import by_words, lettered
from tests.places import Place
from tests.servers.scripted_server import ScriptedServer
from tests.tables.runs import ask, changed
from vllm_tasks import Classes, Datalayer, InvalidCall, VllmAPI
from vllm_tasks.artifacts import markdown_of
from vllm_tasks.results import Report

TICKETS = Classes(["bug", "feature"], review_below=0.8)
SURE = {"crash": (0.95, 0.05), "wish": (0.1, 0.9), "slow": (0.6, 0.4), "odd": (0.45, 0.55)}


@pytest.fixture
def tickets(model: VllmAPI, server: ScriptedServer, place: Place) -> VllmAPI:
    """A model that is sure of two of four rows."""
    server.script = lettered(by_words(SURE))
    place.fill_texts("a crash", "a wish", "it is slow", "odd")
    return changed(model, datatype=TICKETS)


def labels(place: Place) -> list[Any]:
    return [row["label"] for row in place.outputs()]


def test_labels_and_probabilities_are_columns(tickets: VllmAPI, place: Place, server: ScriptedServer) -> None:
    """Each has its type; nothing is truncated; the report counts the rows for review."""
    server.script = lambda asked: None if "odd" in asked.prompt else lettered(by_words(SURE))(asked)
    report = ask(tickets)
    crash, wish, slow, odd = place.outputs()
    assert [row["label"] for row in (crash, wish, slow)] == ["bug", "feature", "bug"]
    assert [row["probability"] for row in (crash, wish, slow)] == pytest.approx([0.95, 0.9, 0.6])
    assert json.loads(slow["probabilities"]) == {"bug": pytest.approx(0.6), "feature": pytest.approx(0.4)}
    assert [row["_review"] for row in (crash, wish, slow, odd)] == [False, False, True, None]
    assert "none of the letters A to B" in odd["_error"]
    assert (report.succeeded, report.truncated, report.to_review) == (3, 0, 1)
    assert crash["_finish_reason"] == "stop"
    assert "1 are for review" in str(report)
    assert "| marked for review | 1 |" in markdown_of(report)
    assert [(row.key, row.label) for row in report.reviews] == [((2,), "bug")]
    twice = Report.of_shards([report, report], 1.0, shards=2)
    assert (twice.to_review, len(twice.reviews)) == (2, 2)
    assert ask(tickets).processed == 0


def test_a_persons_label_is_preferred_and_kept(tickets: VllmAPI, place: Place) -> None:
    """It takes the row out of the reviews, and stays when the row is processed again."""
    ask(tickets)
    assert place.db.reviews("m")["id"].to_pylist() == [3, 2]
    before = datetime.now(UTC)
    place.db.answer_reviews("m", {3: "bug", 1: "bug"})
    for _ in range(2):
        assert labels(place) == ["bug", "bug", "bug", "bug"]
        assert [row["_reviewed_at"] is not None for row in place.outputs()] == [False, True, False, True]
        assert place.outputs()[3]["_reviewed_at"] >= before
        assert place.outputs()[3]["probability"] == pytest.approx(0.55)
        assert place.db.reviews("m")["id"].to_pylist() == [2]
        ask(tickets, overwrite=True)
    place.db.answer_reviews("m", {3: "feature", 2: "feature"})
    assert labels(place) == ["bug", "bug", "feature", "feature"]
    assert place.db.reviews("m").num_rows == 0


def test_a_label_does_not_apply_to_a_row_that_has_changed(tickets: VllmAPI, place: Place) -> None:
    """The person saw another text."""
    ask(tickets)
    place.db.answer_reviews("m", {2: "feature", 3: "bug"})
    place.fill_texts("a crash", "a wish", "it is slow again", "odd")
    ask(tickets, refresh="changed")
    assert labels(place) == ["bug", "feature", "bug", "bug"]
    assert place.db.reviews("m")["id"].to_pylist() == [2]


def test_outputs_whose_labels_all_apply_no_more_are_read(tickets: VllmAPI, place: Place) -> None:
    """Whether all labelled rows have changed, or nobody has labelled any."""
    ask(tickets)
    place.db.answer_reviews("m", {})
    assert labels(place) == ["bug", "feature", "bug", "feature"]
    place.db.answer_reviews("m", {2: "feature"})
    place.fill_texts("a crash", "a wish", "it is slow again", "odd")
    ask(tickets, refresh="changed")
    assert labels(place) == ["bug", "feature", "bug", "feature"]
    assert [row["_reviewed_at"] for row in place.outputs()] == [None] * 4


def test_reviews_beside_the_source(tickets: VllmAPI, place: Place) -> None:
    """The rows of the source come with the labels of people."""
    ask(tickets)
    place.db.answer_reviews("m", {3: "bug"})
    rows = place.db.outputs("m", source="rows").to_pylist()
    assert {row["text"]: row["label"] for row in rows}["odd"] == "bug"


def test_what_cannot_be_reviewed_is_refused(tickets: VllmAPI, place: Place, model: VllmAPI) -> None:
    """A label that is no class, a key without an output, and outputs without marks, each by name."""
    ask(tickets)
    with pytest.raises(InvalidCall, match=r"'bugs' is none of the classes \['bug', 'feature'\].*'bug'"):
        place.db.answer_reviews("m", {3: "bugs"})
    with pytest.raises(InvalidCall, match="no output with the key 9"):
        place.db.answer_reviews("m", {3: "bug", 9: "bug"})
    for key in ((), (1, 2)):
        with pytest.raises(InvalidCall, match=re.escape(f"no output with the key {key}")):
            place.db.answer_reviews("m", {key: "bug"})
    with pytest.raises(InvalidCall, match=r"'id' of 'm' is of the type int64.*as `outputs` returns them"):
        place.db.answer_reviews("m", {"3": "bug"})
    wrong: Any = [(3, "bug")]
    with pytest.raises(InvalidCall, match="labels is a list: give a mapping of keys to labels"):
        place.db.answer_reviews("m", wrong)
    assert place.db.reviews("m").num_rows == 2
    ask(changed(model, datatype=Classes(["bug", "feature"])), predict_id="plain")
    for refused in (place.db.reviews, lambda name: place.db.answer_reviews(name, {1: "bug"})):
        with pytest.raises(InvalidCall, match=r"no column '_review'.*review_below"):
            refused("plain")


def test_a_table_of_its_own_name(tickets: VllmAPI, place: Place) -> None:
    """Reviews of outputs that `model_update_kwargs` name are found by that name."""
    own = changed(tickets, model_update_kwargs={"table": "labels"})
    ask(own)
    place.db.answer_reviews("m", {3: "bug"}, table="labels")
    assert place.db.reviews("m", table="labels")["id"].to_pylist() == [2]


def test_keys_of_several_columns(tmp_path: Path, server: ScriptedServer) -> None:
    """A label belongs to all values of a key, texts and numbers."""
    server.script = lettered(by_words(SURE))
    rows = [{"day": day, "n": n, "text": "odd"} for day in ("mon", "tue") for n in (1, 2)]
    pq.write_table(
        pa.Table.from_pylist(
            rows, pa.schema([("day", pa.string()), ("n", pa.int32()), ("text", pa.string())])
        ),
        tmp_path / "rows.parquet",
    )
    db = Datalayer(url=str(tmp_path))
    with VllmAPI(identifier="m", api_url=server.url, db=db, datatype=TICKETS) as model:
        model.predict_in_db("text", "rows", primary_id=["day", "n"])
    db.answer_reviews("m", {("tue", 1): "bug"})
    found = {(row["day"], row["n"]): row["label"] for row in db.outputs("m").to_pylist()}
    assert found == {("mon", 1): "feature", ("mon", 2): "feature", ("tue", 1): "bug", ("tue", 2): "feature"}
    with pytest.raises(InvalidCall, match="no output with the key"):
        db.answer_reviews("m", {"tue": "bug"})


def test_keys_of_other_types_are_refused(tmp_path: Path, server: ScriptedServer) -> None:
    """A date as key: the rows can be read, but not answered."""
    server.script = lettered(by_words(SURE))
    pq.write_table(pa.table({"id": [date(2026, 1, 1)], "text": ["odd"]}), tmp_path / "rows.parquet")
    db = Datalayer(url=str(tmp_path))
    with VllmAPI(identifier="m", api_url=server.url, db=db, datatype=TICKETS) as model:
        model.predict_in_db("text", "rows")
    assert db.reviews("m").num_rows == 1
    with pytest.raises(InvalidCall, match="'id' is of type date32"):
        db.answer_reviews("m", {date(2026, 1, 1): "bug"})


def test_a_preview_shows_labels(tickets: VllmAPI) -> None:
    """The prompt as it was sent, the letter, and the value of the row; nothing is committed."""
    first = tickets.preview("text", "rows", n=1).rows[0]
    assert isinstance(first.prompt, str)
    assert first.prompt.endswith("letter of one option only.")
    assert (first.answer, first.value["label"], first.value["_review"]) == ("A", "bug", False)
