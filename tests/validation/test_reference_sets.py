"""Reference sets: what the programs write is in the package, and right answers get the best values."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest

from reference_sets import __main__ as programs
from tests.lettered import of_letters
from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, usual
from tests.validation.exam import Make
from vllm_tasks import Dataset, InvalidCall, reference_set
from vllm_tasks.calls.classes import Classes
from vllm_tasks.validation.reference import ReferenceSet
from vllm_tasks.validation.sets import ReferenceName, rows_of

NAMES: Sequence[ReferenceName] = get_args(ReferenceName)
BEST = {
    "arithmetic": {"numeric_match": 1.0},
    "classification": {
        "accuracy": 1.0,
        "macro_f1": 1.0,
        "log_loss": 0.0,
        "brier": 0.0,
        "expected_calibration_error": 0.0,
    },
    "extraction": {"json_fields": 1.0, "json_valid": 1.0},
    "retrieval": {"recall_at_k": 1.0, "ndcg_at_k": 1.0},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_are_those_that_the_programs_write(name: ReferenceName) -> None:
    """`python -m reference_sets` changes nothing."""
    file = programs.FOLDER / f"{name}.jsonl"
    assert file.read_text(encoding="utf-8") == programs.content_of(programs.SETS[name]())


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_many_and_different(name: ReferenceName) -> None:
    """No input is there twice, ids are unique, and each set has levels 1 to 3 and several topics."""
    rows = rows_of(name)
    text = reference_set(name).validation.key[0]
    assert 200 <= len(rows) <= 300
    assert len({row[text] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    assert {row["level"] for row in rows} >= {1, 2, 3}
    assert len({row["topic"] for row in rows}) >= 3


def gold(found: ReferenceSet) -> Callable[[Asked], Reply | None]:
    """A script: the model knows all answers."""
    text, target = found.validation.key
    known = {row[text]: row[target] for row in found.rows}
    ids = [t for t in known.values() if isinstance(t, str)] if found.name == "retrieval" else []

    def answer(asked: Asked) -> Reply | None:
        if asked.body is None or asked.path == "/tokenize":
            return None
        # The longest text, since one may be the end of another.
        wanted = known[max((text for text in known if text in asked.prompt), key=len)]
        reply = usual(asked)
        if found.name == "retrieval":
            relevant = [wanted] if isinstance(wanted, str) else wanted
            vector = [float(name in relevant) for name in ids]
            packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            reply.body["data"][0]["embedding"] = packed
            return reply
        if isinstance(classes := found.fields.get("datatype"), Classes):
            return of_letters(asked, [float(name == wanted) for name in classes.names])
        said = (
            json.dumps(wanted) if isinstance(wanted, dict) else f"It is 7 * 3 = 21 and so on. #### {wanted}"
        )
        (choice,) = reply.body["choices"]
        choice.update({"text": said} if "text" in choice else {"message": {"content": said}})
        return reply

    return answer


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_have_the_best_values(
    name: ReferenceName, here: Place, server: ScriptedServer, make: Make
) -> None:
    """All answers of a model that knows them are scored as right, so no row is ambiguous for a metric."""
    found = reference_set(name)
    server.script = gold(found)
    (report,) = make(here, **found.fields).validate(found.validation).datasets
    values = {value.metric: value.value for value in report.values}
    assert (report.rows, report.failed) == (len(found.rows), 0)
    assert {metric: values[metric] for metric in BEST[name]} == pytest.approx(BEST[name], abs=1e-9)


def test_a_sample_is_the_same_in_every_run(here: Place, server: ScriptedServer, make: Make) -> None:
    """It is drawn by a seed."""
    found = reference_set("extraction", sample_size=5)
    server.script = gold(found)
    hashes = {
        make(here, identifier=name, **found.fields).validate(found.validation).datasets[0].dataset_hash
        for name in ("a", "b")
    }
    assert len(hashes) == 1
    assert len(server.posts) == 10


def test_a_pinned_reference_set_is_a_set_of_its_own(here: Place, server: ScriptedServer, make: Make) -> None:
    """Two sets under one name have two snapshots."""
    tables = []
    for name in ("arithmetic", "extraction"):
        found = reference_set(name)
        server.script = gold(found)
        pinned = Dataset(identifier="set", reference=found.name, pin=True, sample_size=2)
        asked = found.validation.model_copy(update={"datasets": [pinned]})
        tables.append(make(here, **found.fields).validate(asked).datasets[0].dataset_table)
    assert len(set(tables)) == 2


def test_an_unknown_set_is_named_with_the_known_ones() -> None:
    """So is a data set with two sources."""
    with pytest.raises(InvalidCall, match=r"'extracton'.*did you mean 'extraction'.*retrieval"):
        reference_set("extracton")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exactly one of select, raw_data and reference"):
        Dataset(identifier="d", select="t", reference="arithmetic")


def test_the_fields_of_a_set_belong_to_the_caller() -> None:
    """A change of them is not there in the next set."""
    reference_set("arithmetic").fields["predict_kwargs"]["max_tokens"] = 1
    assert reference_set("arithmetic").fields["predict_kwargs"]["max_tokens"] > 1


def test_the_sets_are_small() -> None:
    """Compressed, as in a wheel, they take less than 100 kB together."""
    assert sum(len(zlib.compress(file.read_bytes())) for file in programs.FOLDER.glob("*.jsonl")) < 100_000


def vectors_of(known: dict[str, list[float]]) -> Callable[[Asked], Reply | None]:
    """A script: the vectors of texts."""

    def script(asked: Asked) -> Reply | None:
        if asked.path != "/v1/embeddings":
            return None
        vector = known[asked.prompt]
        if not vector:
            return Reply({"error": {"message": "no"}}, 400)
        reply = usual(asked)
        packed = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        reply.body["data"][0]["embedding"] = packed
        return reply

    return script


VECTORS = {"red": [2.0, 0.1], "blue": [0.0, 1.0], "green": [1.0, 1.0], "rose": [5.0, 0.0], "sea": [0.1, 1.0]}
ROWS = [
    {"text": "red", "y": "1"},
    {"text": "blue", "y": "2"},
    {"text": "green", "y": 3},
    {"text": "rose", "y": ["1"]},
    {"text": "sea", "y": {"2": 2, "3": 1}},
]


def retrieved(place: Place, make: Make, rows: list[dict[str, Any]], k: int = 1, **options: Any) -> Any:
    found = reference_set("retrieval").validation
    metrics = [metric.model_copy(update={"options": {"k": k}}) for metric in found.metrics]
    data = Dataset(identifier="d", raw_data=rows)
    asked = found.model_copy(update={"datasets": [data], "metrics": metrics, "key": ("text", "y"), **options})
    (report,) = make(place, task="embed").validate(asked, max_failed=None).datasets
    return report


def test_queries_are_scored_by_the_nearest_documents(
    place: Place, server: ScriptedServer, make: Make
) -> None:
    """In every store: lengths of vectors do not count, and a document is no row of the value."""
    server.script = vectors_of(VECTORS)
    report = retrieved(place, make, ROWS)
    values = {value.metric: value for value in report.values}
    assert (values["recall_at_k"].value, values["recall_at_k"].n) == (0.75, 2)
    assert values["ndcg_at_k"].value == 1.0
    (worst,) = report.worst
    assert (worst.inputs, worst.answer) == (["sea"], ["2"])
    again = retrieved(place, make, ROWS, max_regression={"recall_at_k": 0.0})
    assert not again.reasons
    assert again.verdicts[0].paired.difference == 0
    assert retrieved(place, make, ROWS, k=2).values[0].value == 1.0


def test_what_failed_is_not_found(here: Place, server: ScriptedServer, make: Make) -> None:
    """A document without a vector is in no ranking, and a query without one is a miss."""
    server.script = vectors_of(VECTORS | {"red": [], "sea": []})
    report = retrieved(here, make, ROWS, k=3)
    assert [(value.value, value.n, value.failed) for value in report.values] == [(0.0, 2, 2)] * 2
    server.script = vectors_of(VECTORS | {"sea": []})
    report = retrieved(here, make, ROWS, k=3, on_error="exclude")
    assert [(value.value, value.n, value.failed) for value in report.values] == [(1.0, 1, 1)] * 2


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (ROWS[:3], "0 queries and 3 documents"),
        (ROWS[3:], "2 queries and 0 documents"),
        ([ROWS[0], *ROWS[2:]], "'2' is relevant to a query but is not a document"),
        ([*ROWS, {"text": "red", "y": 1}], "two documents have the id '1'"),
    ],
)
def test_rows_that_cannot_be_ranked_are_refused(
    here: Place, server: ScriptedServer, make: Make, rows: list[dict[str, Any]], said: str
) -> None:
    """Before any row is sent."""
    with pytest.raises(InvalidCall, match=said):
        retrieved(here, make, rows)
    assert not server.posts
