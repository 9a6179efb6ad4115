"""`validate`: the rows that are sent, their scores, and the records; also after kills."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest
from scipy.stats import binomtest

from tests.jobs import Jobs
from tests.places import Place
from tests.servers.scripted_server import MODEL, Asked, Reply, ScriptedServer
from tests.validation.exam import (
    OWN,
    Make,
    Pupil,
    asked,
    broken_on,
    choosing,
    exam,
    letters,
    only,
    own,
    table,
    validation,
    values,
)
from vllm_tasks import InvalidCall
from vllm_tasks.errors import TooManyFailed
from vllm_tasks.validation import Dataset, Metric, history
from vllm_tasks.validation.run import validate

# ---------------------------------------------------------------------- a run


def test_a_validation_says_what_it_found(make: Make, place: Place, pupil: Pupil) -> None:
    """Every value has its interval, n, failed and truncated rows in the report, on the model and in the
    history, with every row's score and answer.
    """
    pupil.misses(3, 5)
    pupil.cuts = {"q5", "q6"}
    pupil.refuses = {"q7"}
    model = make(place)
    report = validate(model, validation(40), flow_run="of-a-flow")
    assert report.passed
    assert report.metric_values == model.metric_values == {"exam": {"exact_match": 37 / 40}}
    (found,) = only(report).values
    expected = binomtest(37, 40).proportion_ci(method="wilsoncc")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (found.n, found.failed, found.truncated, found.on_error) == (40, 1, 2, "miss")
    (kept_value,) = values(place)
    told = {
        "model": "m",
        "dataset": "exam",
        "dataset_hash": only(report).dataset_hash,
        "metric": "exact_match",
        "fingerprint": report.fingerprint,
        **{name: getattr(found, name) for name in ("value", "low", "high", "n", "failed", "truncated")},
        "passed": True,
        "reason": None,
        "compared_with": None,
        "uuid": model.uuid,
        "flow_run": "of-a-flow",
    }
    assert told.items() <= kept_value.items()
    targets = {row["row"]: json.loads(row["target"]) for row in table(place, only(report).dataset_table)}
    scores = {targets[row["row"]]: row["score"] for row in table(place, "_metric_scores")}
    assert scores == {f"a{i}": float(i not in (3, 5, 7)) for i in range(40)}
    outputs = {targets[row["row"]]: row for row in place.db.outputs("m-on-exam").to_pylist()}
    assert outputs["a3"]["output"] == "no idea"
    assert "I refuse" in outputs["a7"]["_error"]
    assert {row["run"] for row in outputs.values()} == {only(report).run}


def test_each_validation_asks_anew_and_equal_answers_give_equal_values(
    make: Make, place: Place, pupil: Pupil, server: ScriptedServer
) -> None:
    """A new validation sends every row again, in a run of its own; equal answers give equal values and
    intervals to the last digit.
    """
    pupil.misses(*range(0, 30, 4))
    model = make(place)
    checked = validation(
        30, metrics=[Metric(identifier=name) for name in ("exact_match", "token_f1", "chrf")]
    )
    first, second = (only(validate(model, checked)) for _ in range(2))
    assert set(asked(server).values()) == {2}
    assert first.run != second.run
    assert first.values == second.values
    assert [record.run for record in second.history] == [first.run] * 3 + [second.run] * 3
    assert [v.paired and v.paired.difference for v in second.verdicts] == [0.0, 0.0, 0.0]
    assert len(place.db.outputs("m-on-exam")) == 60


def test_failed_rows_are_misses_unless_they_are_left_out(make: Make, here: Place, pupil: Pupil) -> None:
    """A failed row lowers the value by default; with `exclude` it is left out of n, and still counted."""
    pupil.refuses = {"q1", "q2"}
    model = make(here)
    miss = only(validate(model, validation(10), max_failed=0.2)).values[0]
    assert (miss.value, miss.n, miss.failed) == (0.8, 10, 2)
    exclude = only(validate(model, validation(10, on_error="exclude"), max_failed=2)).values[0]
    assert (exclude.value, exclude.n, exclude.failed) == (1.0, 8, 2)
    assert [(v["n"], v["failed"], v["on_error"]) for v in values(here)] == [
        (10, 2, "miss"),
        (8, 2, "exclude"),
    ]


def test_exactly_the_fraction_that_is_allowed_may_fail(make: Make, here: Place, pupil: Pupil) -> None:
    """As a float, 0.29 * 100 is less than 29."""
    pupil.refuses = {f"q{i}" for i in range(29)}
    assert only(validate(make(here), validation(100), max_failed=0.29)).failed == 29


def test_a_run_with_too_many_failed_rows_is_gone_on_with(
    make: Make, place: Place, pupil: Pupil, server: ScriptedServer
) -> None:
    """With more failed rows than allowed nothing is recorded; once the cause is corrected, `retry_failed`
    sends those rows and no others.
    """
    pupil.refuses = {"q1", "q2", "q3"}
    model = make(place)
    with pytest.raises(TooManyFailed, match="I refuse"):
        validate(model, validation(20))
    assert values(place) == []
    assert model.metric_values == {}
    with pytest.raises(InvalidCall, match=r"3 of 20 rows of 'exam' failed, .*retry_failed=True"):
        validate(model, validation(20))
    assert values(place) == []
    pupil.refuses = set()
    before = len(server.posts)
    report = only(validate(model, validation(20), retry_failed=True))
    assert asked(server, before) == {"q1": 1, "q2": 1, "q3": 1}
    assert (report.processed, report.failed, report.values[0].value) == (3, 0, 1.0)
    assert len(values(place)) == 1


def test_the_share_of_failed_rows_is_of_the_whole_set(make: Make, here: Place, pupil: Pupil) -> None:
    """A resumed run may have as many failed rows as one that was never interrupted."""
    model = make(here)
    pupil.refuses = {"q1", "q2", "q3"}
    with pytest.raises(TooManyFailed):
        validate(model, validation(20), max_failed=2)
    pupil.refuses = {"q1"}
    report = only(validate(model, validation(20), retry_failed=True))
    assert (report.failed, report.values[0].value) == (1, 0.95)


def test_an_own_metric_that_fails_names_its_row_and_costs_no_answer(
    make: Make, place: Place, pupil: Pupil, server: ScriptedServer
) -> None:
    """A metric that raises is named with the row, and nothing is recorded; once corrected, it scores the
    existing answers without any request.
    """
    model = make(place)
    with broken_on("a3") as raised:
        validate(model, validation(5, metrics=[OWN]))
    (row,) = (r["row"] for r in table(place, only_frozen(place)) if json.loads(r["target"]) == "a3")
    assert f"the metric 'mine' failed, on row {row}: " in str(raised.value)
    assert values(place) == []
    report = only(validate(model, validation(5, metrics=[OWN])))
    assert (report.processed, report.values[0].value) == (0, 1.0)
    assert set(asked(server).values()) == {1}
    assert [record.run for record in report.history] == [report.run]


def test_a_run_that_was_half_recorded_is_recorded_once(make: Make, place: Place, pupil: Pupil) -> None:
    """Values are written last: a run with scores alone counts as interrupted; in the end it is there once."""
    model, checked = make(place), validation(5, metrics=[OWN])
    with broken_on("a1"):
        validate(model, checked)
    (run,) = {row["run"] for row in place.db.outputs("m-on-exam").to_pylist()}
    tables = place.db.tables()
    half = {"run": [run] * 2, "metric": ["mine"] * 2, "row": [0, 1], "score": [0.5, 0.5]}
    tables.put("_metric_scores", pa.table(half), ["run", "metric", "row"])
    tables.close()
    report = only(validate(model, checked))
    assert (report.run, report.processed) == (run, 0)
    assert [row["score"] for row in table(place, "_metric_scores")] == [1.0] * 5
    assert len(values(place)) == 1


def only_frozen(place: Place) -> str:
    """The name of the only run's snapshot table."""
    (run,) = {row["run"] for row in place.db.outputs("m-on-exam").to_pylist()}
    return f"_dataset__exam__{run.split('-')[0]}"


def test_what_is_gone_on_with_is_the_whole_call(
    make: Make, here: Place, pupil: Pupil, server: ScriptedServer
) -> None:
    """If the second of two data sets fails, nothing is recorded, and no row of the first is sent again."""
    rows = [{"q": f"q{i}", "a": f"a{i}"} for i in range(100, 110)]
    two = validation(
        datasets=[
            Dataset(identifier="one", raw_data=exam(10)),
            Dataset(identifier="two", raw_data=rows),
        ]
    )
    pupil.refuses = {f"q{i}" for i in range(100, 110)}
    model = make(here)
    with pytest.raises(TooManyFailed):
        validate(model, two)
    assert values(here) == []
    pupil.refuses = set()
    report = validate(model, two, retry_failed=True)
    assert [found.processed for found in report.datasets] == [0, 10]
    assert all(asked(server)[f"q{i}"] == 1 for i in range(10))
    assert report.metric_values == {"one": {"exact_match": 1.0}, "two": {"exact_match": 1.0}}
    assert validate(model, two, datasets=["two", "two"]).metric_values == {"two": {"exact_match": 1.0}}


def test_another_prompt_is_another_run(make: Make, here: Place, pupil: Pupil) -> None:
    """An interrupted run is resumed by the same model, not by one with another prompt."""
    checked = validation(5, metrics=[OWN])
    with broken_on("a1"):
        validate(make(here), checked)
    pupil.says = {f"Q: q{i}": f"a{i}" for i in range(5)}
    other = only(validate(make(here, prompt="Q: {input}"), checked))
    assert (other.processed, other.values[0].value) == (5, 1.0)
    report = only(validate(make(here), checked))
    assert (report.processed, report.values[0].value) == (0, 1.0)
    assert report.run != other.run


def test_a_run_of_long_ago_is_not_gone_on_with(
    make: Make, here: Place, pupil: Pupil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began more than a day ago is processed again, because the weights may have changed."""
    model, checked = make(here), validation(5, metrics=[OWN])
    with broken_on("a1"):
        validate(model, checked)
    monkeypatch.setattr(history, "RESUMED_WITHIN", timedelta(0))
    assert only(validate(model, checked)).processed == 5


# ---------------------------------------------------------------------- what goes in and comes out


def numbers(prediction: Any, target: Any) -> bool:
    assert type(prediction) is type(target), (prediction, target)
    return bool(prediction == target)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"datatype": "int"}, 7),
        ({"datatype": "float"}, 2.5),
        ({"datatype": "bool"}, True),
        ({"datatype": "json"}, {"b": [1, 2.5, None], "a": "größer 🙂"}),
        ({"datatype": "json"}, ["x", "y"]),
        (
            {"output_schema": {"city": "str", "size": "int", "is_port": "bool"}},
            {"city": "Kiel", "size": 3, "is_port": True},
        ),
        ({"output_schema": {"more": "json"}}, {"more": {"x": [1]}}),
        ({"output_schema": {"city": "str"}, "flatten": True}, [{"city": "Kiel"}, {"city": "Ulm"}]),
        ({"datatype": "json", "flatten": True}, [3, 1, 2]),
        ({"datatype": "json", "flatten": True}, []),
    ],
    ids=str,
)
def test_typed_answers_reach_metrics_as_data(
    make: Make, place: Place, pupil: Pupil, fields: dict[str, Any], said: Any
) -> None:
    """A metric gets the value of the model's datatype or schema, the same from every table."""
    pupil.says = {"q0": json.dumps(said), "q1": "no such thing {"}
    rows = [{"q": "q0", "a": said}, {"q": "q1", "a": said}]
    checked = validation(rows, metrics=[Metric(identifier="mine", object=numbers)])
    report = only(validate(make(place, **fields), checked, max_failed=1))
    assert (report.values[0].value, report.failed) == (0.5, 1)
    checked = validation(rows, metrics=[Metric(identifier="exact_match")])
    if not (fields.get("flatten") and said == []):
        assert only(validate(make(place, **fields), checked, max_failed=1)).values[0].value == 0.5


def test_bytes_are_compared_as_the_text_that_they_are(make: Make, place: Place, pupil: Pupil) -> None:
    """An answer of the type bytes is its UTF-8, and a target is text."""
    pupil.says = {"q0": "größer"}
    checked = validation([{"q": "q0", "a": "größer"}])
    assert only(validate(make(place, datatype="bytes"), checked)).values[0].value == 1.0


def test_several_columns_are_arguments(make: Make, place: Place, pupil: Pupil) -> None:
    """With signature **kwargs the columns of X are named fields, from a table and from raw data."""
    place.fill_texts("x", "y")
    pupil.says = {"0 and x": "x", "1 and y": "y"}
    model = make(place, signature="**kwargs", prompt="{number} and {word}")
    checked = validation(
        datasets=[
            Dataset(identifier="table", select="rows"),
            Dataset(identifier="raw", raw_data=[{"id": 0, "text": "x"}, {"id": 1, "text": "y"}]),
        ],
        key=({"id": "number", "text": "word"}, "text"),
    )
    report = validate(model, checked)
    assert report.metric_values == {"table": {"exact_match": 1.0}, "raw": {"exact_match": 1.0}}
    assert report.datasets[0].dataset_hash == report.datasets[1].dataset_hash


def test_inputs_may_be_chat_messages_and_rows_may_repeat(
    make: Make, here: Place, pupil: Pupil, server: ScriptedServer
) -> None:
    """A list of messages is sent as chat; each of several equal rows counts."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "q1"}]
    report = only(validate(make(here), validation([{"q": messages, "a": "a1"}] * 3)))
    assert (report.rows, report.values[0].n, report.values[0].value) == (3, 3, 1.0)
    assert all(post.body["messages"] == messages for post in server.posts)
    assert len(here.db.outputs("m-on-exam")) == 3


def test_odd_characters_are_only_characters(make: Make, place: Place, pupil: Pupil) -> None:
    """Quotes and other scripts in names, questions and answers are kept in every kind of table."""
    texts = ["it's", '"quoted"', "50 % :of {x}", "größer 🙂", "tab\tand\nline", "a\\b", "'; --"]
    pupil.says = {text: text.upper() for text in texts}
    model = make(place, identifier="o'brien's größtes")
    checked = validation(
        datasets=[Dataset(identifier="d's exam", raw_data=[{"q": t, "a": t.upper()} for t in texts])],
        metrics=[Metric(identifier="it's mine", object=own)],
        thresholds={"d's exam/it's mine": 1.0},
    )
    first = validate(model, checked)
    assert first.passed
    assert first.metric_values == {"d's exam": {"it's mine": 1.0}}
    second = only(validate(model, checked))
    assert second.verdicts[0].compared_with == only(first).run
    assert [record.value for record in second.history] == [1.0, 1.0]


def test_names_may_be_long(make: Make, place: Place, server: ScriptedServer) -> None:
    """Model, data set and metric together may be too long for the name of a table; names that begin alike
    are kept apart.
    """
    server.script = letters
    checked = choosing(["b", "d"], 0, delimiter="")
    name = "meta-llama-Llama-3.1-8B-Instruct-für-größere-Prüfungen"
    one, other = (only(validate(make(place, identifier=name + end), checked)) for end in "12")
    assert (one.processed, other.processed) == (3, 3)
    assert one.outputs != other.outputs
    assert [len(found.history) for found in (one, other)] == [1, 1]
    again = only(validate(make(place, identifier=name + "1"), checked))
    assert again.verdicts[0].compared_with == one.run


def test_a_prompt_that_cannot_be_sent_is_a_failed_row(
    make: Make, place: Place, pupil: Pupil, server: ScriptedServer
) -> None:
    """A lone surrogate and a missing value each fail their row alone."""
    rows = [*exam(3), {"q": "\ud800", "a": "x"}, {"q": None, "a": "y"}]
    report = only(validate(make(place), validation(rows), max_failed=2))
    assert (report.failed, report.values[0].value) == (2, 0.6)
    assert set(asked(server)) == {"q0", "q1", "q2"}


@pytest.mark.parametrize("identifier", ['say "hi"', "llama3:8b"])
def test_a_model_whose_name_is_no_name_of_a_table_asks_nothing(
    make: Make, here: Place, pupil: Pupil, server: ScriptedServer, identifier: str
) -> None:
    """An identifier that cannot be part of a table's name is refused before any row is sent."""
    with pytest.raises(InvalidCall, match="cannot name a table"):
        validate(make(here, identifier=identifier), validation())
    assert server.posts == []


@pytest.mark.parametrize("names", ["exam", 1, [None], True])
def test_data_sets_are_named_in_a_list(make: Make, here: Place, server: ScriptedServer, names: Any) -> None:
    """A text would be taken for a list of its letters."""
    with pytest.raises(InvalidCall, match="is not a list of names; the validation has"):
        validate(make(here), validation(), datasets=names)
    assert server.posts == []


# ---------------------------------------------------------------------- killed


ROWS = 400


KILLS = 4


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_TASKS_COMMIT_SECONDS", "0.1")  # of the jobs: each test begins without
        with Jobs(tmp_path_factory.mktemp("jobs") / "log") as jobs:
            yield jobs


def test_killed_at_any_moment_the_figures_are_the_same(
    make: Make, place: Place, pupil: Pupil, server: ScriptedServer, jobs: Jobs
) -> None:
    """After SIGKILLs at random moments the same call resumes: no committed row is sent twice, and values,
    intervals and scores equal those of an undisturbed run.
    """

    async def slow(asked: Asked) -> Reply | None:
        await asyncio.sleep(random.uniform(0.005, 0.03))
        return pupil(asked)

    pupil.misses(*random.sample(range(ROWS), 90))
    checked = validation(ROWS, metrics=[Metric(identifier="exact_match"), Metric(identifier="token_f1")])
    undisturbed = only(validate(make(place, identifier="undisturbed"), checked))
    server.script = slow
    model = {"identifier": "m", "api_url": server.url, "model": MODEL, "max_in_flight": 8}
    model["validation"] = checked.model_dump(mode="json")
    done: set[str] = set()
    for _ in range(KILLS):
        first = len(server.posts)
        job = jobs.start(model, work="validate", db=place.url)
        enough = first + random.randint(0, ROWS // KILLS)
        server.wait_until(lambda: len(server.posts) >= enough or len(committed(place)) == ROWS)  # noqa: B023
        time.sleep(random.uniform(0, 0.1))
        jobs.kill(job)
        time.sleep(0.05)  # what was sent arrives
        assert not asked(server, first).keys() & done, "a committed row was asked again"
        assert done <= (done := committed(place)), "a committed row is gone"
        if records_of(place, "m"):  # it was done before it was killed
            break
    else:
        first = len(server.posts)
        jobs.run(model, work="validate", db=place.url)
        assert not asked(server, first).keys() & done
    records = records_of(place, "m")
    assert {(r["metric"], r["value"], r["low"], r["high"], r["n"]) for r in records} == {
        (v.metric, v.value, v.low, v.high, v.n) for v in undisturbed.values
    }
    assert len(records) == 2
    scores = {(r["run"], r["metric"], r["row"]): r["score"] for r in table(place, "_metric_scores")}
    assert len(scores) == 4 * ROWS
    (run,) = {record["run"] for record in records}
    assert all(scores[run, m, i] == score for (of, m, i), score in scores.items() if of == undisturbed.run)


def records_of(place: Place, model: str) -> list[dict[str, Any]]:
    return [row for row in values(place) if row["model"] == model]


def committed(place: Place) -> set[str]:
    """The questions that have an answer; fails the test if one has two."""
    outputs = table(place, "_outputs__m-on-exam")
    if not outputs:
        return set()
    assert len({row["row"] for row in outputs}) == len(outputs)
    snapshot = f"_dataset__exam__{outputs[0]['run'].split('-')[0]}"
    questions = {row["row"]: json.loads(row["input"])[0] for row in table(place, snapshot)}
    return {questions[row["row"]] for row in outputs}
