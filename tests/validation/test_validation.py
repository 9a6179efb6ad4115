"""`validate` and `compare`: the rows that are sent, their scores, the gate, and the records."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError
from scipy.stats import binomtest

from tests.jobs import Jobs
from tests.places import Place
from tests.servers.scripted_server import MODEL, Asked, Reply, ScriptedServer, refused
from vllm_tasks import InvalidCall, VllmAPI, VllmModel
from vllm_tasks.datalayer.selection import Tables
from vllm_tasks.errors import TooManyFailed
from vllm_tasks.metrics.measure import Answer
from vllm_tasks.validation import Dataset, Metric, Validation, history
from vllm_tasks.validation.comparison import compare
from vllm_tasks.validation.gate import verdict
from vllm_tasks.validation.report import DatasetReport, ValidationReport, Value
from vllm_tasks.validation.run import validate
from vllm_tasks.validation.scores import compared, score
from vllm_tasks.validation.snapshot import Columns, read_snapshot, take_snapshot
from vllm_tasks.validation.statistics import Paired

# ---------------------------------------------------------------------- a model whose answers a test decides


@dataclass
class Pupil:
    """The server's answer to each prompt: `a7` to `q7` unless `says` has another."""

    says: dict[str, str] = field(default_factory=dict)
    refuses: set[str] = field(default_factory=set)
    cuts: set[str] = field(default_factory=set)

    def __call__(self, asked: Asked) -> Reply | None:
        if not asked.body:
            return None
        if (prompt := asked.prompt) in self.refuses:
            return refused(400, "I refuse")
        text = self.says.get(prompt, "a" + prompt[1:])
        return reply(text, "length" if prompt in self.cuts else "stop", chat="messages" in asked.body)

    def misses(self, *rows: int) -> None:
        """Answer these questions wrongly, and all others right."""
        self.says = {f"q{i}": "no idea" for i in rows}


def reply(text: str, finish_reason: str = "stop", *, chat: bool = False, **more: Any) -> Reply:
    said = {"message": {"content": text}} if chat else {"text": text}
    return Reply(
        {
            "model": MODEL,
            "choices": [{"index": 0, "finish_reason": finish_reason, **said, **more}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 5},
        }
    )


@pytest.fixture
def pupil(server: ScriptedServer) -> Pupil:
    server.script = pupil = Pupil()
    return pupil


@pytest.fixture
def here(tmp_path: Path) -> Place:
    """A single store, for tests in which the kind of table does not matter."""
    return Place(f"sqlite:///{tmp_path}/tables.db")


Make = Callable[..., VllmAPI]


@pytest.fixture
def make(server: ScriptedServer) -> Iterator[Make]:
    """Makes models that ask the server, and closes them."""
    made = []

    def of(place: Place, **fields: Any) -> VllmAPI:
        if place.url.startswith("sqlite"):
            Path(place.url.removeprefix("sqlite:///")).touch()
        given = {"identifier": "m", "api_url": server.url, "model": MODEL, "db": place.db, "retries": 0}
        made.append(VllmAPI(**{**given, **fields}))
        return made[-1]

    yield of
    for model in made:
        model.close()


def exam(rows: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"q": f"q{i}", "a": f"a{i}", **columns} for i in range(rows)]


def validation(rows: int | list[dict[str, Any]] = 10, **fields: Any) -> Validation:
    """The data set `exam`, by exact match."""
    raw_data = exam(rows) if isinstance(rows, int) else rows
    given = {
        "datasets": [Dataset(identifier="exam", raw_data=raw_data)],
        "metrics": [Metric(identifier="exact_match")],
        "key": ("q", "a"),
    }
    return Validation(**{**given, **fields})


def asked(server: ScriptedServer, since: int = 0) -> Counter[str]:
    return Counter(post.prompt for post in server.posts[since:])


def only(report: ValidationReport) -> DatasetReport:
    (found,) = report.datasets
    return found


def table(place: Place, name: str) -> list[dict[str, Any]]:
    tables = place.db.tables()
    try:
        return tables.outputs(name).to_pylist() if tables.has(name) else []
    finally:
        tables.close()


def values(place: Place) -> list[dict[str, Any]]:
    return sorted(table(place, "_metric_values"), key=lambda row: row["created_at"])


# ---------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"datasets": [{"identifier": "d"}]}, "exactly one of select and raw_data"),
        ({"datasets": [{"identifier": "d", "select": "t", "raw_data": []}]}, "exactly one"),
        ({"datasets": [{"identifier": "d", "raw_data": [], "db": "x"}]}, "no select"),
        ({"datasets": [{"identifier": "a/b", "select": "t"}]}, "cannot name a table"),
        ({"datasets": [{"identifier": 'a"b', "select": "t"}]}, "cannot name a table"),
        ({"datasets": [{"identifier": "d", "select": "t", "sample_size": 0}]}, "greater than or equal to 1"),
        ({"datasets": [{"identifier": "d", "select": "t"}] * 2}, "two datasets 'd'"),
        ({"datasets": []}, "at least 1 item"),
        ({"metrics": []}, "at least 1 item"),
        ({"metrics": [{"identifier": "exact_match"}] * 2}, "two metrics 'exact_match'"),
        ({"metrics": [{"identifier": "exact_mach"}]}, "did you mean 'exact_match'"),
        ({"metrics": [{"identifier": "m", "object": "os.system"}]}, "outside the modules"),
        ({"metrics": [{"identifier": "exact_match", "options": {"normalise": []}}]}, "did you mean 'normal"),
        ({"metrics": [{"identifier": "exact_match", "options": {"delimiter": ""}}]}, "no option 'delimiter'"),
        ({"thresholds": {"exact_mach": 1.0}}, "did you mean 'exact_match'"),
        ({"thresholds": {"other/exact_match": 1.0}}, "not a metric of this validation"),
        ({"thresholds": {"exact_match": math.nan}}, "finite number"),
        ({"max_regression": {"exact_match": -0.1}}, "a drop is 0 or more"),
        (
            {"metrics": [{"identifier": "s", "object": max, "over": "set"}], "max_regression": {"s": 0}},
            "whole",
        ),
        ({"rows_show": 1}, "Extra inputs"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_made(fields: dict[str, Any], words: str) -> None:
    """A validation that could not run is refused when it is made, with the name that was probably meant."""
    with pytest.raises(ValidationError, match=words):
        validation(**fields)


def test_a_limit_of_a_dataset_wins() -> None:
    """`dataset/metric` goes before `metric`, in thresholds and in allowed drops."""
    checked = validation(
        thresholds={"exact_match": 0.5, "exam/exact_match": 0.9},
        max_regression={"exact_match": 0.1, "exam/exact_match": 0.0},
    )
    assert checked.limits("exam", "exact_match") == (0.9, 0.0)
    assert checked.limits("another", "exact_match") == (0.5, 0.1)
    assert checked.limits("exam", "bleu") == (None, None)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"validation": None}, "has no validation"),
        ({"datasets": ["exams"]}, "did you mean 'exam'"),
        ({"datasets": []}, "names none"),
        ({"reuse": True}, "the weights of a server are not known"),
        ({"db": 7}, "neither a Datalayer"),
    ],
)
def test_a_call_that_cannot_succeed_asks_nothing(
    call: dict[str, Any], words: str, make: Make, here: Place, server: ScriptedServer
) -> None:
    """Mistakes in a call of `validate` are reported before any row is sent."""
    with pytest.raises(InvalidCall, match=words):
        validate(make(here), **{"validation": validation(), **call})
    assert server.posts == []


@pytest.mark.parametrize("revision", [None, "main", "abc123"])
def test_old_answers_are_no_good_where_weights_may_change(revision: str | None, here: Place) -> None:
    """`reuse` needs weights that are known: a name on a hub is refused unless a commit hash pins it."""
    kwargs = {} if revision is None else {"revision": revision}
    model = VllmModel(identifier="m", model_name="some/model", vllm_kwargs=kwargs, db=here.db)
    with pytest.raises(InvalidCall, match="commit hash"):
        validate(model, validation(), reuse=True)


# ---------------------------------------------------------------------- the rows of a data set

SOURCE = "SELECT id AS n, text AS q, text AS a FROM rows"
COLUMNS = Columns(("n", "q"), "a")
TEXTS = [f"{text}{i}" for i in range(50) for text in ("plain ", "größer 🙂 ", '"it\'s" \\ % :x {y}\n')]


@pytest.fixture
def home(place: Place) -> Iterator[Tables]:
    place.fill_texts(*TEXTS)
    tables = place.db.tables()
    yield tables
    tables.close()


def sample(**fields: Any) -> Dataset:
    given = {"identifier": "d", "select": SOURCE, "sample_size": 20, "random_seed": 7}
    return Dataset(**{**given, **fields})


def test_a_sample_is_the_same_on_every_machine(home: Tables) -> None:
    """Rows are drawn by seed and contents: from any kind of table, in any order, on any machine."""
    drawn = take_snapshot(sample(), COLUMNS, home)
    assert drawn.hash.startswith("4f90f579d8dd")
    assert len(drawn.cases) == 20
    rows = [{"n": i, "q": text, "a": text} for i, text in enumerate(TEXTS)]
    random.shuffle(rows)
    assert take_snapshot(sample(select=None, raw_data=rows), COLUMNS, home).hash == drawn.hash
    assert take_snapshot(sample(select=f"{SOURCE} ORDER BY text DESC"), COLUMNS, home).cases == drawn.cases
    other = take_snapshot(sample(random_seed=8), COLUMNS, home)
    assert {c.target for c in other.cases} != {c.target for c in drawn.cases}
    whole = take_snapshot(sample(sample_size=None), COLUMNS, home)
    assert Counter(case.target for case in whole.cases) == Counter(TEXTS)


def test_pinned_rows_stay(place: Place, home: Tables) -> None:
    """With `pin` all later runs have the rows of the first one; another sample has a pin of its own."""
    pinned = take_snapshot(sample(pin=True), COLUMNS, home)
    free = take_snapshot(sample(), COLUMNS, home)
    assert free.hash == pinned.hash
    place.fill_texts("all", "is", "new")
    home.close()
    home = place.db.tables()
    assert take_snapshot(sample(pin=True), COLUMNS, home) == pinned
    assert take_snapshot(sample(sample_size=3), COLUMNS, home).hash != pinned.hash
    assert [c.target for c in take_snapshot(sample(pin=True, sample_size=3), COLUMNS, home).cases] != []
    assert read_snapshot("d", free.table, COLUMNS, home) == free, "rows that were asked stay, pinned or not"
    home.close()


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ({"select": "SELECT id AS n, text AS q FROM rows"}, "'a'"),
        ({"select": "nowhere"}, "nowhere"),
        ({"select": None, "raw_data": [{"n": 1, "q": "x"}]}, "row 0 of dataset 'd' has no 'a'"),
        ({"select": None, "raw_data": []}, "no rows"),
        ({"select": f"{SOURCE} WHERE id < 0"}, "no rows"),
        ({"sample_size": 151}, "has 150 rows, fewer than sample_size=151"),
        (
            {
                "sample_size": None,
                "select": "SELECT id AS n, text AS q, nullif(text, 'plain 3') AS a FROM rows",
            },
            "1 of 150 rows of dataset 'd' have no answer",
        ),
    ],
)
def test_a_set_that_cannot_be_validated_with_says_why(
    home: Tables, dataset: dict[str, Any], words: str
) -> None:
    """A missing column, an empty set, too few rows and answers that are NULL are clear errors."""
    with pytest.raises(InvalidCall, match=words):
        take_snapshot(sample(**dataset), COLUMNS, home)


def test_any_text_and_data_survive_being_kept(home: Tables) -> None:
    """Snapshot rows hold every character, nested data and rows that are there several times."""
    odd = [
        "\0",
        "\ud800",
        "'; DROP TABLE rows; --",
        '"%s" :x \\u0041',
        "\N{MATHEMATICAL FRAKTUR CAPITAL U}🙂\u202e",
        "",
    ]
    rows = [{"n": {"nested": [1, 2.5, None, True]}, "q": text, "a": [text, {"k": text}]} for text in odd * 2]
    snapshot = take_snapshot(sample(select=None, raw_data=rows, sample_size=None), COLUMNS, home)
    assert sorted(case.inputs[1] for case in snapshot.cases) == sorted(odd * 2)
    assert read_snapshot("d", snapshot.table, COLUMNS, home) == snapshot


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
    expected = binomtest(37, 40).proportion_ci(method="wilson")
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


class Broken(Exception):
    pass


BROKEN_ON: set[str] = set()


def own(prediction: Any, target: Any) -> float:
    if target in BROKEN_ON:
        raise Broken(target)
    return float(prediction == target)


@contextmanager
def broken_on(*targets: str) -> Iterator[pytest.ExceptionInfo[Broken]]:
    """Scoring with `own` fails on these rows: they complete, and nothing is recorded."""
    BROKEN_ON.update(targets)
    try:
        with pytest.raises(InvalidCall) as raised:
            yield raised
    finally:
        BROKEN_ON.clear()


OWN = Metric(identifier="mine", object=own)


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


# ---------------------------------------------------------------------- judges and likelihoods


def judged(model: VllmAPI) -> Validation:
    judge = Metric(identifier="judge", options={"model": model, "rubric": "Is it right?"})
    return validation(6, metrics=[OWN, judge])


class Judge(Pupil):
    """As a judge it gives 5 for a right answer and 1 for others."""

    def __call__(self, asked: Asked) -> Reply | None:
        if not asked.body or "rubric" not in str(asked.body.get("messages")).lower():
            return super().__call__(asked)
        if any(text in asked.prompt for text in self.refuses):
            return refused(400, "I do not judge")
        points = 1 if "no idea" in asked.prompt else 5
        return reply(json.dumps({"reason": "so it is", "score": points}), chat=True)


def test_a_judge_gives_verdicts_on_answers(make: Make, place: Place, server: ScriptedServer) -> None:
    """A judge scores each answer once, and the score is kept; a failed row stays a miss."""
    server.script = pupil = Judge()
    pupil.misses(1)
    pupil.refuses = {"q2"}
    report = only(validate(make(place), judged(make(place, identifier="judge")), max_failed=1))
    exact, judge = report.values
    assert (exact.value, judge.value) == (4 / 6, 4 / 6)
    assert (judge.n, judge.failed) == (6, 1)
    assert report.processed == 6 + 5
    kept_verdicts = place.db.outputs(next(r.outputs for r in report.history if r.metric == "judge"))
    assert sorted(kept_verdicts.column("score").to_pylist()) == [1, 5, 5, 5, 5]


def test_a_judge_that_fails_is_asked_again_and_the_model_is_not(
    make: Make, here: Place, server: ScriptedServer
) -> None:
    """If a judge fails on too many answers, the next call sends it those alone."""
    server.script = pupil = Judge()
    pupil.misses(1)
    model, judge = make(here), make(here, identifier="judge")
    pupil.refuses = {"a4", "a5"}
    with pytest.raises(TooManyFailed, match="I do not judge") as raised:
        validate(model, judged(judge), max_failed=1)
    assert values(here) == []
    pupil.refuses = set()
    report = only(validate(model, judged(judge), retry_failed=True))
    assert report.processed == 6 - raised.value.report.succeeded
    assert report.values[1].value == 5 / 6
    assert all(asked(server)[f"q{i}"] == 1 for i in range(6))


def test_verdicts_are_of_the_answers_that_are_scored(make: Make, here: Place, server: ScriptedServer) -> None:
    """Another prompt gives other answers, for which the old judge scores do not count."""
    server.script = pupil = Judge()
    pupil.misses(*range(6))
    judge = make(here, identifier="judge")
    with broken_on("a1"):
        validate(make(here), judged(judge))
    pupil.says = {f"Q: q{i}": f"a{i}" for i in range(6)}
    report = only(validate(make(here, prompt="Q: {input}"), judged(judge)))
    assert [value.value for value in report.values] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": None}, "needs a judge"),
        ({"rubric": " "}, "needs a rubric"),
        ({"scale": [1]}, "scale"),
        ({"scale": [5, 1]}, "scale"),
    ],
)
def test_a_judge_without_what_it_needs_is_refused(
    make: Make, here: Place, server: ScriptedServer, options: dict[str, Any], words: str
) -> None:
    """A judge needs a model, a rubric and a scale; a missing one is reported before any row is sent."""
    judge = Metric(
        identifier="judge", options={"model": make(here, identifier="judge"), "rubric": "Right?", **options}
    )
    with pytest.raises(InvalidCall, match=words):
        validate(make(here), validation(metrics=[judge]))
    assert server.posts == []


def letters(asked: Asked) -> Reply | None:
    """Each letter is a token, and later letters of the alphabet are less likely."""
    if not asked.body:
        return None
    tokens = [
        {str(ord(c)): {"logprob": -float(ord(c) % 32), "decoded_token": c, "rank": 1}} for c in asked.prompt
    ]
    return reply("", "length", prompt_logprobs=[None, *tokens[1:]])


def choosing(choices: Sequence[Any], target: Any, **options: Any) -> Validation:
    return validation(
        [{"q": "x", "a": target, "choices": choices}],
        metrics=[Metric(identifier="multiple_choice", options={"choices": "choices", **options})],
    )


@pytest.mark.parametrize(
    ("choices", "target", "options", "value"),
    [
        (["d", "b", "c"], 1, {"delimiter": ""}, 1.0),
        (["d", "b", "c"], "b", {"delimiter": ""}, 1.0),
        (["d", "b", "c"], "d", {"delimiter": ""}, 0.0),
        (["bbb", "d"], "bbb", {"delimiter": ""}, 0.0),
        (["bbb", "d"], "bbb", {"delimiter": "", "normalize": "characters"}, 1.0),
        ([1, 0], 1, {"delimiter": ""}, 0.0),
    ],
)
def test_the_most_likely_choice_is_the_answer(
    make: Make,
    here: Place,
    server: ScriptedServer,
    choices: list[Any],
    target: Any,
    options: dict[str, Any],
    value: float,
) -> None:
    """The right choice is given by its index or as itself, and choices are compared by likelihood only."""
    server.script = letters
    report = only(validate(make(here), choosing(choices, target, **options)))
    assert report.values[0].value == value
    assert asked(server) == Counter(["x", *(f"x{choice}" for choice in choices)])


def test_likelihoods_are_of_what_the_model_is_asked(make: Make, here: Place, server: ScriptedServer) -> None:
    """Parameters that decide the prompt are sent, other sampling parameters are not."""
    server.script = letters
    model = make(here, predict_kwargs={"add_special_tokens": False, "temperature": 0.7, "max_tokens": 9})
    validate(model, choosing(["d", "b"], 1, delimiter=""))
    for post in server.posts:
        own = {name: post.body[name] for name in ("add_special_tokens", "temperature", "max_tokens")}
        assert own == {"add_special_tokens": False, "temperature": 0, "max_tokens": 1}


@pytest.mark.parametrize(
    ("choices", "target", "words"),
    [
        ("abc", 0, "needs a list of choices"),
        ([], 0, "needs a list of choices"),
        (["a", None], 0, "needs texts"),
        (["a", "b"], 2, "none of its 2 choices"),
        (["a", "b"], "c", "none of its 2 choices"),
        (["a", "b"], True, "none of its 2 choices"),
    ],
)
def test_choices_that_are_none_are_refused(
    make: Make, here: Place, server: ScriptedServer, choices: Any, target: Any, words: str
) -> None:
    """A row without choices, or with an answer that is none of them, is refused before any row is sent."""
    with pytest.raises(InvalidCall, match=words):
        validate(make(here), choosing(choices, target))
    assert server.posts == []


def test_another_delimiter_makes_other_texts(make: Make, here: Place, server: ScriptedServer) -> None:
    """An interrupted run with another delimiter is not resumed: its likelihoods belong to other texts."""

    def broken(asked: Asked) -> Reply | None:
        return refused(400, "no") if asked.prompt.endswith("b") else letters(asked)

    server.script = broken
    model = make(here)
    with pytest.raises(TooManyFailed):
        validate(model, choosing(["d", "b"], "b", delimiter="-"))
    server.script = letters
    before = len(server.posts)
    report = only(validate(model, choosing(["d", "b"], "b", delimiter="")))
    assert asked(server, before) == {"x": 1, "xd": 1, "xb": 1}
    assert report.values[0].value == 1.0


def test_failed_rows_are_counted_in_rows_and_not_in_choices(
    make: Make, here: Place, server: ScriptedServer
) -> None:
    """A row with any number of failed choices is one failed row."""

    def script(asked: Asked) -> Reply | None:
        return refused(400, "no") if asked.prompt.startswith("y") else letters(asked)

    server.script = script
    rows = [{"q": q, "a": 0, "choices": ["a", "b", "c"]} for q in ("x", "y", "z")]
    checked = validation(rows, metrics=[Metric(identifier="multiple_choice", options={"choices": "choices"})])
    report = only(validate(make(here), checked, max_failed=1))
    assert (report.failed, report.values[0].failed, report.values[0].value) == (1, 1, 2 / 3)


def test_a_server_without_logprobs_has_no_likelihoods(make: Make, here: Place, pupil: Pupil) -> None:
    """A server that leaves `prompt_logprobs` out fails the run, with the reason in the error."""
    with pytest.raises(TooManyFailed, match="prompt_logprobs"):
        validate(make(here), validation(3, metrics=[Metric(identifier="perplexity")]))
    with pytest.raises(InvalidCall, match="needs texts"):
        validate(make(here), validation([{"q": "x", "a": ["y"]}], metrics=[Metric(identifier="perplexity")]))


# ---------------------------------------------------------------------- scores


def answers(*predictions: Any, targets: Any = "x") -> list[Answer]:
    return [
        Answer(i, targets, p, error="refused: no" if p is None else None) for i, p in enumerate(predictions)
    ]


def mine(function: Callable[..., Any], **fields: Any) -> Metric:
    return Metric(identifier="mine", object=function, **fields)


@pytest.mark.parametrize("found", [math.nan, math.inf, None, "much", [1.0]])
def test_a_score_that_is_no_number_is_refused(found: Any) -> None:
    """A score of a custom metric that is no finite number is refused with its row, and not averaged."""
    with pytest.raises(InvalidCall, match=r"'mine' returned .* for row 1, which is no"):
        score(mine(lambda p, t: found if p == "b" else 1.0), answers("a", "b"), "miss")
    if found is not None:
        with pytest.raises(InvalidCall, match=r"'mine' returned .*, which is no"):
            score(mine(lambda ps, ts: found, over="set"), answers("a", "b"), "miss")


def test_a_failed_row_has_no_score_where_less_is_better() -> None:
    """A miss would be the best score there, so the row is left out and counted."""
    edits = mine(lambda p, t: float(len(p)), higher_is_better=False)
    found = score(edits, answers("aa", None, "aaaa"), "miss")
    assert (found.value.value, found.value.n, found.value.failed) == (3.0, 2, 1)
    assert found.scores == {0: 2.0, 2: 4.0}
    with pytest.raises(InvalidCall, match="nothing to score: all 2 rows failed, for example: refused: no"):
        score(edits, answers(None, None), "miss")


def test_a_metric_of_the_set_sees_failed_rows_as_none() -> None:
    """`over="set"` gets all rows at once; a failed row's prediction is None, or left out with `exclude`."""
    seen = []

    def share(predictions: list[Any], targets: list[Any]) -> float:
        seen.append(predictions)
        return sum(p == t for p, t in zip(predictions, targets, strict=True)) / len(targets)

    found = score(mine(share, over="set"), answers("x", None, "y", "x"), "miss")
    assert seen[0] == ["x", None, "y", "x"]
    assert (found.value.value, found.value.n, found.scores) == (0.5, 4, {})
    assert found.value.low <= 0.5 <= found.value.high
    assert score(mine(share, over="set"), answers("x", None, "y", "x"), "exclude").value.value == 2 / 3


def test_resamples_without_a_value_are_left_out() -> None:
    """A metric of the set that is undefined for some resamples has an interval from the others."""

    def precision(predictions: list[Any], targets: list[Any]) -> float:
        said = [t == "x" for p, t in zip(predictions, targets, strict=True) if p == "x"]
        return sum(said) / len(said) if said else math.nan

    found = score(mine(precision, over="set"), answers("x", "y", "y"), "miss")
    assert (found.value.value, found.value.low, found.value.high) == (1.0, 1.0, 1.0)


def test_a_metric_of_the_set_that_raises_is_named() -> None:
    """The exception of a metric over a set is raised with the metric's name."""
    with pytest.raises(InvalidCall, match="'mine' failed: ZeroDivisionError"):
        score(mine(lambda ps, ts: 1 / 0, over="set"), answers("a"), "miss")


def test_options_reach_a_metric() -> None:
    """Options are keywords of the function, even if a built-in metric uses their name differently."""
    split = mine(lambda p, t, *, delimiter: float(len(p.split(delimiter))), options={"delimiter": ";"})
    assert score(split, answers("a;b;c"), "miss").value.value == 3.0


def test_runs_are_compared_row_by_row() -> None:
    """The difference is after minus before, over rows that have a score in both."""
    before, after = answers(*"xxxxyyyyxx"), answers(*"xxxxxxxxxx")
    found = compared(Metric(identifier="exact_match"), before, after, "miss")
    assert (found.difference, found.rows) == (0.4, 10)
    assert (found.p_worse, found.p_different) == (1.0, 0.125)  # 4 coins that all fall one way, or all alike
    with pytest.raises(InvalidCall, match="whole sets"):
        compared(mine(max, over="set"), before, after, "miss")


# ---------------------------------------------------------------------- the gate


def value_of(value: float, *, higher_is_better: bool = True) -> Value:
    return Value("exact_match", value, value - 0.1, value + 0.1, 100, 0, 0, "miss", higher_is_better)


def change(difference: float, p_worse: float) -> Paired:
    return Paired(difference, difference - 0.05, difference + 0.05, p_worse, p_worse, 100)


@pytest.mark.parametrize(
    ("value", "higher_is_better", "passes"),
    [(0.5, True, True), (0.49, True, False), (0.5, False, True), (0.51, False, False), (0.49, False, True)],
)
def test_a_threshold_is_on_the_side_that_is_worse(value: float, higher_is_better: bool, passes: bool) -> None:
    """A value on the threshold passes; a worse value does not."""
    checked = validation(thresholds={"exact_match": 0.5})
    found = verdict(checked, "exam", value_of(value, higher_is_better=higher_is_better), None, None)
    assert (found.reason is None) is passes
    if not passes:
        assert "its threshold of 0.5" in str(found.reason)


@pytest.mark.parametrize(
    ("difference", "p_worse", "higher_is_better", "passes"),
    [
        (-0.2, 0.01, True, False),
        (-0.2, 0.2, True, True),  # by chance
        (-0.1, 0.01, True, True),  # as much as is allowed
        (0.2, 0.01, True, True),
        (0.2, 0.01, False, False),
        (-0.2, 0.99, False, True),
    ],
)
def test_a_drop_shuts_the_gate_when_it_is_large_and_not_by_chance(
    difference: float, p_worse: float, higher_is_better: bool, passes: bool
) -> None:
    """Only a drop that is larger than allowed, and that chance does not explain, is a reason."""
    checked = validation(max_regression={"exact_match": 0.1})
    value = value_of(0.6, higher_is_better=higher_is_better)
    found = verdict(checked, "exam", value, change(difference, p_worse), "run-1")
    assert (found.reason is None) is passes
    if not passes:
        assert "0.2 worse than in the run run-1" in str(found.reason)


def test_a_real_drop_is_recorded_with_its_reason_and_noise_passes(
    make: Make, place: Place, pupil: Pupil
) -> None:
    """The baseline is the last run that passed: a failed run is no baseline, and a run that is a little
    worse by chance passes.
    """
    model = make(place)
    checked = validation(60, max_regression={"exact_match": 0.0})
    pupil.misses(0, 1, 2)
    good = validate(model, checked)
    pupil.misses(2, 3, 4, 5)
    noisy = validate(model, checked)
    assert noisy.passed
    assert only(noisy).verdicts[0].compared_with == only(good).run
    pupil.misses(*range(20))
    bad = validate(model, checked)
    assert not bad.passed
    (reason,) = bad.reasons
    assert "exam: exact_match is 0.6667 (0.5406 to 0.7727, n=60), 0.2667 worse than in the run " in reason
    again = validate(model, checked)
    assert not again.passed, "a run that did not pass is not what the next one is measured by"
    assert only(again).verdicts[0].compared_with == only(noisy).run
    records = values(place)
    assert [row["passed"] for row in records] == [True, True, False, False]
    assert reason == f"exam: {records[2]['reason']}"
    assert records[2]["compared_with"] == only(noisy).run
    assert [row["reason"] for row in records[:2]] == [None, None]


def test_a_run_passes_as_a_whole(make: Make, here: Place, pupil: Pupil) -> None:
    """A run with one metric below its threshold is no baseline."""
    model = make(here)
    metrics = [Metric(identifier="exact_match"), mine(lambda p, t: float(len(p)), higher_is_better=False)]
    pupil.misses(1, 2)
    (reason,) = validate(model, validation(10, metrics=metrics, thresholds={"exam/mine": 2.9})).reasons
    assert reason.startswith("exam: mine is 3 (")
    assert reason.endswith(", n=10), above its threshold of 2.9")
    assert [row["passed"] for row in values(here)] == [False, False]
    later = only(validate(model, validation(10, metrics=metrics)))
    assert [v.compared_with for v in later.verdicts] == [None, None]


def test_rows_that_changed_are_shown_with_what_was_said(make: Make, here: Place, pupil: Pupil) -> None:
    """Improved and regressed rows against the baseline, as many of each as requested, with both answers."""
    model = make(here)
    pupil.misses(0)
    validate(model, validation(10))
    pupil.misses(1, 2, 3)
    pupil.refuses = {"q4"}
    changed = only(validate(model, validation(10, rows_shown=2), max_failed=1)).changed
    losses, wins = [c for c in changed if not c.improved], [c for c in changed if c.improved]
    assert len(losses) == 2
    (win,) = wins
    assert (win.inputs, win.target, win.answer_before, win.answer_after) == (["q0"], "a0", "no idea", "a0")
    assert (win.before, win.after) == (0.0, 1.0)
    shown = only(validate(model, validation(10, rows_shown=9), max_failed=1)).changed
    assert {c.target: c.answer_after for c in shown if not c.improved}.keys() <= {"a1", "a2", "a3", "a4"}
    assert only(validate(model, validation(10, rows_shown=0), max_failed=1)).changed == ()


# ---------------------------------------------------------------------- comparison


def test_two_models_are_compared_row_by_row(
    make: Make, place: Place, pupil: Pupil, server: ScriptedServer
) -> None:
    """Each model is compared with the first, over the same rows and the existing answers: nothing is sent."""
    pupil.misses(*range(12))
    pupil.says |= {f"Q: q{i}": f"a{i}" for i in range(30)}
    first, second = make(place, identifier="one"), make(place, identifier="two", prompt="Q: {input}")
    checked = validation(30, metrics=[Metric(identifier="exact_match"), mine(set_share, over="set")])
    reports = [validate(model, checked) for model in (first, second)]
    before = len(server.posts)
    found = compare([first, second], checked, reports)
    assert len(server.posts) == before
    assert [(s.metric, s.model) for s in found.standings] == [
        ("exact_match", "one"),
        ("exact_match", "two"),
        ("mine", "one"),
        ("mine", "two"),
    ]
    base, other, *sets = found.standings
    assert (base.paired, [s.paired for s in sets]) == (None, [None, None])
    assert other.paired is not None
    assert (other.paired.difference, other.paired.rows) == (pytest.approx(0.4), 30)
    assert other.paired.p_different == pytest.approx(2 / 2**12)
    assert "two 1 (" in str(found)


def set_share(predictions: list[Any], targets: list[Any]) -> float:
    return sum(p == t for p, t in zip(predictions, targets, strict=True)) / len(targets)


def test_what_is_not_alike_is_not_compared(make: Make, here: Place, pupil: Pupil) -> None:
    """Other rows, another order of reports, a repeated model and a missing set are refused."""
    one, two = make(here, identifier="one"), make(here, identifier="two")
    checked = validation(5)
    first, second = validate(one, checked), validate(two, checked)
    with pytest.raises(InvalidCall, match="identifiers of their own"):
        compare([one, one], checked, [first, first])
    with pytest.raises(InvalidCall, match="in their order"):
        compare([one, two], checked, [second, first])
    with pytest.raises(InvalidCall, match="in their order"):
        compare([one, two], checked, [first])
    with pytest.raises(InvalidCall, match="not validated on the same rows of 'exam'"):
        compare([one, two], checked, [first, validate(two, validation(6))])
    other = validation(datasets=[Dataset(identifier="more", raw_data=exam(3))])
    with pytest.raises(InvalidCall, match="'one' was not validated on 'more'"):
        compare([one, two], other, [first, second])


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
