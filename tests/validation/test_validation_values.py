"""Values of any type in a validation: the prompt, the sample and the score that they make."""

from __future__ import annotations

import datetime as dt
import json
import math
import sqlite3
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from tests.places import Place
from tests.servers.postgres import Postgres
from tests.servers.scripted_server import ScriptedServer
from tests.validation.exam import COLUMNS, Make, Pupil, choosing, letters, only, reply, sample, validation
from tests.validation.scoring import score
from vllm_tasks import InvalidCall, RowError
from vllm_tasks.datalayer.selection import Tables
from vllm_tasks.datalayer.values import Nanoseconds, Number
from vllm_tasks.validation import Dataset, Metric, Validation
from vllm_tasks.validation.run import validate
from vllm_tasks.validation.snapshot import Columns, read_snapshot, take_snapshot

EXACT = [Metric(identifier="exact_match")]


@pytest.fixture
def home(place: Place) -> Iterator[Tables]:
    place.fill_texts("x")
    tables = place.db.tables()
    yield tables
    tables.close()


def whole(*rows: dict[str, Any]) -> Dataset:
    return sample(select=None, sample_size=None, raw_data=list(rows))


def shown(value: Any) -> str:
    """The value as a prompt function sees it: its type and its text."""
    return f"{type(value).__name__}: {value}"


# ---------------------------------------------------------------------- kept

TYPED: dict[str, tuple[Any, Any]] = {
    "integer": (7, 7),
    "decimal": (Decimal("12.50"), Decimal("12.50")),
    "large": (Decimal("12345678901234567.890"), Decimal("12345678901234567.890")),
    "date": (dt.date(2024, 1, 2), "2024-01-02"),
    "clock": (dt.datetime(2024, 1, 2, 3, 4, 5), "2024-01-02 03:04:05"),
    "moment": (dt.datetime(2024, 1, 2, 3, 4, 5, 6, dt.UTC), "2024-01-02 03:04:05.000006+00:00"),
    "nanoseconds": (Nanoseconds.of(1001, None), "1970-01-01 00:00:00.000001001"),
    "time": (dt.time(1, 2, 3), "01:02:03"),
    "duration": (dt.timedelta(hours=25), "1 day, 1:00:00"),
    "uuid": (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    "number": (Number("12.50"), 12.5),
    "float": (0.1, 0.1),
    "bool": (True, True),
    "pair": (("a", Decimal("1.0")), ["a", Decimal("1.0")]),
    "struct": ({"b": dt.date(2024, 1, 2), "a": [Number("1e5")]}, {"b": "2024-01-02", "a": [100000.0]}),
    "map": ({dt.date(2024, 1, 2): 1}, {"2024-01-02": 1}),
}


@pytest.mark.parametrize("kind", TYPED)
def test_values_keep_their_types_and_targets_are_what_a_model_can_say(home: Tables, kind: str) -> None:
    """A prompt function gets the source's value; a metric gets numbers as numbers and the rest as text."""
    value, target = TYPED[kind]
    snapshot = take_snapshot(whole({"n": 0, "q": value, "a": value}), COLUMNS, home)
    (case,) = snapshot.cases
    given = list(value) if isinstance(value, tuple) else value
    assert shown(case.inputs[1]) == shown(given)
    assert (type(case.target), case.target) == (type(target), target)
    again = read_snapshot("d", snapshot.table, COLUMNS, home)
    assert again == snapshot
    assert shown(again.cases[0].inputs[1]) == shown(given)


@pytest.mark.parametrize("value", [{"x": [object()]}, {1, 2}, 1j])
def test_values_that_no_source_gives_are_refused(home: Tables, value: Any) -> None:
    """A value that could not be kept exactly is refused with its row, and not sent in another form."""
    rows = {"n": 1, "q": "x", "a": "y"}, {"n": 2, "q": value, "a": "y"}
    with pytest.raises(InvalidCall, match=r"row 1 of dataset 'd'.* is a "):
        take_snapshot(whole(*rows), COLUMNS, home)


NO_TARGETS = (
    b"x",
    math.nan,
    -math.inf,
    Decimal("NaN"),
    Decimal("sNaN"),
    Decimal("Infinity"),
    {"x": [math.inf]},
)


@pytest.mark.parametrize("value", NO_TARGETS)
def test_a_target_that_no_answer_can_equal_is_refused(home: Tables, value: Any) -> None:
    """The error names the row by its input. As an input the same value is sent, as by `predict_in_db`."""
    rows = {"n": 1, "q": "x", "a": "y"}, {"n": 2, "q": "this one", "a": value}
    with pytest.raises(InvalidCall, match=r"'a' of .*this one.* has .*leave such rows out"):
        take_snapshot(whole(*rows), COLUMNS, home)
    snapshot = take_snapshot(whole({"n": 1, "q": value, "a": "y"}), COLUMNS, home)
    assert repr(snapshot.cases[0].inputs) == repr([1, value])


# ---------------------------------------------------------------------- prompts

ARROW: dict[str, pa.Array] = {
    "decimal": pa.array([Decimal("12.50")]),
    "large": pa.array([Decimal("12345678901234567.89")], pa.decimal128(20, 2)),
    "float": pa.array([3.0]),
    "float32": pa.array([0.1], pa.float32()),
    "bool": pa.array([True]),
    "date": pa.array([dt.date(2024, 1, 2)]),
    "time": pa.array([dt.time(1, 2, 3)]),
    "timestamp": pa.array([dt.datetime(2024, 1, 2, 12, 30)]),
    "zoned": pa.array([dt.datetime(2024, 1, 2, 12, 30, tzinfo=dt.UTC)]),
    "nanoseconds": pa.array([1001], pa.timestamp("ns")),
    "duration": pa.array([dt.timedelta(hours=25)]),
    "binary": pa.array([b"\xff"]),
    "list": pa.array([[Decimal("1.0"), None]]),
    "struct": pa.array([{"b": dt.date(2024, 1, 2), "a": "x"}]),
    "map": pa.array([[(1, "x")]], pa.map_(pa.int64(), pa.string())),
}
POSTGRES = {
    "numeric": "12.50::numeric(10,2)",
    "boolean": "true",
    "real": "0.1::real",
    "date": "date '2024-01-02'",
    "time": "time '01:02:03'",
    "timestamp": "timestamp '2024-01-02 12:30'",
    "zoned": "timestamptz '2024-01-02 12:30+00'",
    "interval": "interval '25 hours'",
    "uuid": "'00000000-0000-0000-0000-000000000001'::uuid",
    "jsonb": """'{"b": [1, 2.50], "a": null}'::jsonb""",
    "array": "ARRAY[1.50, 2]",
}


def prompts_of(server: ScriptedServer, work: Any) -> list[str]:
    before = len(server.posts)
    work()
    return sorted(post.prompt for post in server.posts[before:])


def both(make: Make, server: ScriptedServer, place: Place, source: str, **fields: Any) -> list[list[str]]:
    """The prompts of `predict_in_db` and `validate` from the rows of `source`, by a column `q`."""
    model = make(place, **fields)
    checked = Validation(datasets=[Dataset(identifier="v", select=source)], metrics=EXACT, key=("q", "a"))
    return [
        prompts_of(server, lambda: model.predict_in_db("q", source, max_failed=None)),
        prompts_of(server, lambda: validate(model, checked, max_failed=None)),
    ]


@pytest.mark.parametrize("kind", ARROW)
def test_a_row_of_parquet_makes_one_prompt(
    make: Make, server: ScriptedServer, tmp_path: Path, kind: str
) -> None:
    """`predict_in_db` and `validate` pass the same value, of one type, to a prompt function."""
    place = Place(str(tmp_path / "lake"))
    Path(place.url).mkdir()
    pq.write_table(pa.table({"id": [1], "q": ARROW[kind], "a": ["x"]}), Path(place.url) / "t.parquet")
    predicted, validated = both(make, server, place, "t", prompt_func=shown)
    assert validated == predicted != []
    if kind == "decimal":
        assert both(make, server, place, "t", identifier="other") == [["12.50"], ["12.50"]]


@pytest.mark.parametrize("kind", POSTGRES)
def test_a_row_of_postgresql_makes_one_prompt(
    make: Make, server: ScriptedServer, postgres: Postgres, kind: str
) -> None:
    """They also do so if a database has the rows."""
    place = Place(postgres.new_database())
    engine = sa.create_engine(place.url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        statement = f"CREATE TABLE t AS SELECT 1 AS id, {POSTGRES[kind]} AS q, 'x' AS a"
        connection.execute(sa.text(statement.replace(":", r"\:")))
    engine.dispose()
    predicted, validated = both(make, server, place, "t", prompt_func=shown)
    assert validated == predicted != []


# ---------------------------------------------------------------------- drawn

TEXTS = [
    "plain",
    "größer 🙂",
    '"quoted", and',
    "007",
    "1.50",
    "true",
    "2024-01-02",
    "x" * 1000,
    "{y}",
    "null",
]


def stored(place: Path, kind: str) -> Place:
    """The same texts, as a table `t` of this kind."""
    rows = [{"q": text, "a": text.upper()} for text in TEXTS]
    place.mkdir()
    if kind == "sqlite":
        with sqlite3.connect(place / "t.db") as connection:
            connection.execute("CREATE TABLE t (q text, a text)")
            connection.executemany("INSERT INTO t VALUES (:q, :a)", rows[::-1])
        connection.close()
        return Place(f"sqlite:///{place}/t.db")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), place / "t.parquet")
    elif kind == "jsonl":
        (place / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    else:
        cells = [['"' + cell.replace('"', '""') + '"' for cell in row.values()] for row in rows]
        (place / "t.csv").write_text("q,a\n" + "".join(",".join(row) + "\n" for row in cells))
    return Place(str(place))


def test_the_same_texts_make_the_same_sample_in_every_store(tmp_path: Path) -> None:
    """A sample depends on the contents of the rows, and not on their store."""
    found = {}
    for kind in "parquet", "jsonl", "sqlite", "csv":
        tables = stored(tmp_path / kind, kind).db.tables()
        dataset = sample(select="t", sample_size=5)
        found[kind] = take_snapshot(dataset, Columns(("q",), "a"), tables)
        tables.close()
    assert len({snapshot.hash for snapshot in found.values()}) == 1, {k: f.cases for k, f in found.items()}


# ---------------------------------------------------------------------- scored


@pytest.mark.parametrize(
    ("metric", "target", "said", "datatype", "value"),
    [
        ("exact_match", Decimal("12.50"), "12.50", None, 1.0),
        ("exact_match", Decimal("12.50"), "12.5", None, 0.0),
        ("exact_match", Decimal("12.50"), "12.5", "float", 1.0),
        ("exact_match", [Decimal("0.1"), Decimal("7")], "0.10", "float", 1.0),
        ("exact_match", Decimal("1E+2"), "100", None, 1.0),
        ("exact_match", Decimal("1.00"), "true", "bool", 0.0),
        ("exact_match", dt.date(2024, 1, 2), "2024-01-02", None, 1.0),
        ("exact_match", UUID(int=1), str(UUID(int=1)), None, 1.0),
        ("exact_match", Number("12.50"), "12.5", None, 1.0),
        ("exact_match", Number("3.0"), "3", None, 1.0),
        ("numeric_match", Decimal("12.50"), "it is 12.5", None, 1.0),
        ("numeric_match", Decimal("12.51"), "it is 12.5", None, 0.0),
        ("contains", dt.time(1, 2), "at 01:02:00", None, 1.0),
        ("accuracy", Decimal("1.0"), "1.0", None, 1.0),
        (
            "json_fields",
            {"p": Decimal("0.10"), "d": dt.date(2024, 1, 2)},
            '{"p": 0.1, "d": "2024-01-02"}',
            None,
            1.0,
        ),
        ("exact_match", {"p": [Decimal("0.10")]}, '{"p": [0.1]}', "json", 1.0),
        ("json_valid", "x", '"text"', "json", 1.0),
        ("json_valid", "x", '"text"', None, 1.0),
        ("json_valid", "x", "text", None, 0.0),
    ],
)
def test_answers_are_compared_with_targets_of_any_type(
    make: Make,
    here: Place,
    server: ScriptedServer,
    metric: str,
    target: Any,
    said: str,
    datatype: Any,
    value: float,
) -> None:
    """A decimal is compared with a text as text, and with a number by value; a date is compared as text."""
    server.script = lambda asked: reply(said) if asked.body else None
    checked = validation([{"q": "x", "a": target}], metrics=[Metric(identifier=metric)])
    report = only(validate(make(here, datatype=datatype), checked))
    assert report.values[0].value == value


def difference(prediction: Any, target: Any) -> float:
    """A custom metric over a DECIMAL."""
    assert isinstance(target, Decimal)
    return abs(float(prediction) - float(target))


def test_a_metric_of_ones_own_gets_decimals_as_numbers(
    make: Make, here: Place, server: ScriptedServer
) -> None:
    """A custom metric can calculate with decimals."""
    server.script = lambda asked: reply("12.75") if asked.body else None
    own = Metric(identifier="off_by", object=difference, higher_is_better=False)
    checked = validation([{"q": "x", "a": Decimal("12.50")}], metrics=[own])
    assert only(validate(make(here), checked)).values[0].value == 0.25


@pytest.mark.parametrize(
    ("choices", "target", "value"),
    [
        ([Decimal("2.0"), Decimal("10.0")], Decimal("2.0"), 1.0),
        (["d", "b"], Decimal("1"), 1.0),
        ([dt.date(2024, 1, 1), dt.date(2024, 1, 2)], dt.date(2024, 1, 2), 0.0),
    ],
)
def test_choices_of_any_type_are_their_text(
    make: Make, here: Place, server: ScriptedServer, choices: list[Any], target: Any, value: float
) -> None:
    """The right choice is given as itself, or by its index, even as NUMERIC in a database."""
    server.script = letters
    assert only(validate(make(here), choosing(choices, target, delimiter=""))).values[0].value == value
    texts = {post.prompt for post in server.posts}
    assert texts == {"x", *(f"x{choice}" for choice in choices)}


JSON_OR_NEARLY = [
    *('{"a": 1}', "[1, 2", '"\\ud800"', '{"a": "\\ud800"}', "1E400", "-1e999", "NaN", "{'a': 1}", " [1] "),
    *(
        "01",
        "null",
        '"\\u00e9"',
        "9" * 400,
        "9" * 5000,
        '{"a": Infinity}',
        "1E5",
        "\ufeff{}",
        "```json\n{}\n```",
    ),
    *("", "\u00a0{}", '"a\nb"', '{"a": 1, "a": 2}', "[" * 100 + "]" * 100, "[" * 101 + "]" * 101, "{} {}"),
]


def test_json_valid_agrees_with_the_datatype(make: Make, here: Place, pupil: Pupil) -> None:
    """An answer is valid JSON exactly if a model with `datatype="json"` returns it."""
    pupil.says = {f"q{i}": text for i, text in enumerate(JSON_OR_NEARLY)}
    answers = make(here, datatype="json").predict_batches(list(pupil.says), on_error="return")
    valid = [score("json_valid", text, None) for text in JSON_OR_NEARLY]
    assert valid == [not isinstance(answer, RowError) for answer in answers]
    assert 0 < sum(valid) < len(valid)
