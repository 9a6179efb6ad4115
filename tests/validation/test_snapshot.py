"""The rows of a data set: samples, pinned rows, and any text and data."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.places import Place
from tests.validation.exam import COLUMNS, SOURCE, Make, Pupil, only, sample, validation
from vllm_tasks import Dataset, InvalidCall, Metric, Validation
from vllm_tasks.datalayer.selection import Tables
from vllm_tasks.validation.run import validate
from vllm_tasks.validation.snapshot import read_snapshot, take_snapshot

TEXTS = [f"{text}{i}" for i in range(50) for text in ("plain ", "größer 🙂 ", '"it\'s" \\ % :x {y}\n')]


@pytest.fixture
def home(place: Place) -> Iterator[Tables]:
    place.fill_texts(*TEXTS)
    tables = place.db.tables()
    yield tables
    tables.close()


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


def test_clusters_and_choices_may_be_null(home: Tables) -> None:
    """A set whose cluster column is NULL in all rows has no column for it, and is read without."""
    rows = [{"n": 0, "q": f"q{i}", "a": "x", "passage": None, "choices": [["a"], None][i]} for i in range(2)]
    columns = replace(COLUMNS, cluster="passage", choices="choices")
    dataset = sample(select=None, raw_data=rows, sample_size=None, pin=True)
    pinned = take_snapshot(dataset, columns, home)
    assert sorted(pinned.clusters()) == [0, 1]
    assert sorted(map(str, (case.choices for case in pinned.cases))) == ["None", "['a']"]
    assert take_snapshot(dataset, columns, home) == pinned


def test_rows_that_are_refused_are_not_pinned(make: Make, place: Place, pupil: Pupil) -> None:
    """A first call that is refused for its rows would otherwise be refused for good."""
    place.fill_texts("no number")
    number = Metric(identifier="numeric_match")

    def checked(metric: Metric) -> Validation:
        rows = Dataset(identifier="d", select="SELECT text AS q, text AS a FROM rows", pin=True)
        return validation(datasets=[rows], metrics=[metric])

    with pytest.raises(InvalidCall, match="numeric_match needs a number in the target"):
        validate(make(place), checked(number))
    place.fill_texts("q1")
    pupil.says = {"q1": "1"}
    assert only(validate(make(place), checked(number))).values[0].value == 1.0
    place.fill_texts("no number again")
    assert only(validate(make(place), checked(number))).values[0].value == 1.0, "now they are"
    with pytest.raises(
        InvalidCall, match=r"takes numbers.* \(the rows are pinned: for others drop '_dataset__"
    ):
        validate(make(place), checked(Metric(identifier="pearson")))
