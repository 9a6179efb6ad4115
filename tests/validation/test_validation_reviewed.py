"""Mistakes in validations that reviewers found when they read and used it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import SecretStr

from tests.places import Place
from tests.servers.scripted_server import Asked, ScriptedServer, refused
from tests.validation.exam import Make, Pupil, exam, only, reply, table, validation, values
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.errors import TooManyFailed
from vllm_tasks.validation import Dataset, Metric
from vllm_tasks.validation.pages import markdown_of
from vllm_tasks.validation.run import validate

LOW, HIGH = {"rubric": "Is it right?", "scale": [1, 5]}, {"rubric": "Is it right?", "scale": [1, 10]}


def judging(model: Any, options: dict[str, Any]) -> Metric:
    return Metric(identifier="judge", options={"model": model, **options})


def test_the_key_of_a_judge_stands_nowhere(make: Make, here: Place) -> None:
    """A judge given in Python is not recorded with its secrets, and a block with it is not saved."""
    judge = VllmAPI(identifier="judge", api_key=SecretStr("sk-TOPSECRET"))
    model = VllmAPI(identifier="m", validation=validation(metrics=[judging(judge, LOW)]))
    assert "TOPSECRET" not in str(model.model_dump())
    assert "TOPSECRET" not in model.model_dump_json(context={"include_secrets": True})
    with pytest.raises(InvalidCall, match="not saved: save it"):
        model._to_block_document(name="m")
    with pytest.raises(InvalidCall, match="got a dict") as raised:
        validate(make(here), validation(metrics=[judging({"api_key": "sk-TOPSECRET"}, LOW)]))
    assert "TOPSECRET" not in str(raised.value)


@pytest.mark.parametrize("pin", [False, True])
def test_a_kill_while_rows_are_frozen_costs_nothing(
    make: Make,
    tmp_path: Path,
    server: ScriptedServer,
    pupil: Pupil,
    monkeypatch: pytest.MonkeyPatch,
    pin: bool,
) -> None:
    """A snapshot table that was created and not filled is filled by the next call."""
    place = Place(str(tmp_path / "lake"))
    dataset = Dataset(identifier="exam", raw_data=exam(5), pin=pin)
    put = Lake.put

    def killed(self: Lake, name: str, rows: pa.Table, key: list[str]) -> None:
        put(self, name, rows.slice(0, 0), key)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Lake, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            validate(make(place), validation(datasets=[dataset]))
    assert only(validate(make(place), validation(datasets=[dataset]))).values[0].value == 1.0


class Judge(Pupil):
    """Answers rightly, and as a judge always gives the best score; `fails` on judging these answers."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: set[str] = set()

    def __call__(self, asked: Asked) -> Any:
        if not asked.body or "messages" not in asked.body:
            return super().__call__(asked)
        schema = asked.body["response_format"]["json_schema"]["schema"]["properties"]["score"]
        if any(f">\n{answer}\n<" in asked.prompt for answer in self.fails):
            return refused(400, "I do not judge")
        return reply(f'{{"reason": "good", "score": {schema["maximum"]}}}', chat=True)


def test_verdicts_by_another_scale_are_not_compared(make: Make, here: Place, server: ScriptedServer) -> None:
    """Scores of an earlier judge out of 10 are not mixed with those of a judge out of 5."""
    server.script = Judge()
    judge = make(here, identifier="judge")
    for options in HIGH, LOW:
        limited = validation(6, metrics=[judging(judge, options)], max_regression={"judge": 0.0})
        report = only(validate(make(here), limited))
        assert report.values[0].value == 1.0
        assert report.reasons == []
    assert [r.compared_with for r in report.history] == [None, None]


def test_a_verdict_that_failed_is_no_miss_of_the_model(
    make: Make, here: Place, server: ScriptedServer
) -> None:
    """Rows on which the judge failed are left out, counted and shown."""
    server.script = script = Judge()
    script.fails = {"a0", "a1"}
    judge = make(here, identifier="judge")
    report = only(validate(make(here), validation(8, metrics=[judging(judge, LOW)]), max_failed=None))
    (value,) = report.values
    assert (value.value, value.n, value.failed) == (1.0, 6, 2)
    assert (report.failed, report.truncated) == (0, 0), "of the model itself"
    assert "6 (2 failed)" in markdown_of("m", report)


@pytest.mark.parametrize(
    ("metric", "options", "words"),
    [
        ("numeric_match", {}, "needs a number in the target"),
        ("numeric_match", {"tolerance": -1}, "tolerance"),
        ("exact_match", {"normalize": ["lowr"]}, "lowr"),
        ("regex_match", {"pattern": "("}, "pattern"),
        ("rouge", {"kind": "rouge3"}, "rouge3"),
        ("accuracy", {"labels": ["x", "y"]}, "labels"),
        ("bleu", {"tokenize": "13b"}, "13b"),
        ("pearson", {}, "pearson takes numbers as targets"),
        ("spearman", {}, "spearman takes numbers as targets"),
    ],
)
def test_options_and_targets_are_refused_before_anything_is_asked(
    make: Make, here: Place, server: ScriptedServer, metric: str, options: dict[str, Any], words: str
) -> None:
    """Options and targets that no answer could be scored with are refused at once, even in the last set."""
    rows = [{"q": "q", "a": "no number"}]
    sets = [
        Dataset(identifier="good", raw_data=[{"q": "q1", "a": "x" if metric == "accuracy" else "1"}]),
        Dataset(identifier="bad", raw_data=rows),
    ]
    wrong = Metric(identifier=metric, options=options)
    with pytest.raises(InvalidCall, match=words):
        validate(make(here), validation(datasets=sets, metrics=[wrong]))
    assert server.posts == []


@pytest.mark.parametrize("metric", ["bleu", "macro_f1"])
def test_answers_that_a_metric_cannot_score_are_refused_before_anything_is_asked(
    make: Make, here: Place, server: ScriptedServer, metric: str
) -> None:
    """Metrics of texts score no data."""
    model = make(here, output_schema={"city": "str"})
    checked = validation([{"q": "q", "a": "x"}], metrics=[Metric(identifier=metric)])
    with pytest.raises(InvalidCall, match=f"{metric} compares texts, and the model's answers are data"):
        validate(model, checked)
    assert server.posts == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"identifier": "multiple_choice"}, "needs options={'choices'"),
        ({"identifier": "judge", "options": {"rubric": "r"}}, "needs options={'model'"),
        ({"identifier": "contains", "higher_is_better": False}, "only for your own function"),
        ({"identifier": "contains", "options": {"target": 3}}, "no option 'target'"),
        ({"identifier": "m", "object": pow, "options": {"mod": 3, "nod": 3}}, "no option 'nod'"),
        ({"identifier": "m", "object": lambda p, t, *, needed: 1.0}, "needed"),
    ],
)
def test_a_metric_that_could_not_be_called_is_refused_when_made(fields: dict[str, Any], words: str) -> None:
    """Options that are missing, unknown or without effect are refused at once."""
    with pytest.raises(ValueError, match=words):
        Metric(**fields)


@pytest.mark.parametrize(("metric", "value"), [("exact_match", 60.0), ("bleu", -1.0)])
def test_a_threshold_that_is_no_value_of_its_metric_is_refused(metric: str, value: float) -> None:
    """A threshold of 60 for a fraction of 1 may be meant as a percentage."""
    with pytest.raises(ValueError, match="its values are 0 to"):
        validation(metrics=[Metric(identifier=metric)], thresholds={metric: value})


def test_a_baseline_that_cannot_be_scored_locks_nobody_out(
    make: Make, here: Place, pupil: Pupil, caplog: pytest.LogCaptureFixture
) -> None:
    """If all rows of the baseline failed, it cannot be scored: this is logged, and the next run passes."""
    pupil.refuses = {f"q{i}" for i in range(4)}
    validate(make(here), validation(4), max_failed=None)
    pupil.refuses = set()
    report = only(
        validate(make(here), validation(4, on_error="exclude", max_regression={"exact_match": 0.0}))
    )
    assert (report.values[0].value, report.reasons) == (1.0, [])
    assert "cannot be scored" in caplog.text


def test_scores_kept_by_row_are_those_of_the_value(
    make: Make, here: Place, pupil: Pupil, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that died between its scores and its values leaves no scores that its values do not cover."""
    pupil.refuses = {"q0"}

    def killed(_: object) -> None:
        raise KeyboardInterrupt  # the scores are written, and the values are about to be

    with monkeypatch.context() as patch:
        patch.setattr("vllm_tasks.validation.history.fields", killed)
        with pytest.raises(KeyboardInterrupt):
            validate(make(here), validation(), max_failed=None)
    report = only(validate(make(here), validation(on_error="exclude"), max_failed=None))
    assert report.processed == 0
    scores = {row["row"]: row["score"] for row in table(here, "_metric_scores") if row["run"] == report.run}
    counted = [score for score in scores.values() if score is not None]
    assert (len(scores), len(counted)) == (10, 9)
    assert report.values[0].value == sum(counted) / len(counted) == 1.0


def test_a_limit_that_could_not_be_tested_is_told(
    make: Make, here: Place, pupil: Pupil, caplog: pytest.LogCaptureFixture
) -> None:
    """If the rows have changed, a regression cannot be seen, and the page reports that."""
    limited = {"max_regression": {"exact_match": 0.0}}
    validate(make(here), validation(10, **limited))
    caplog.clear()
    pupil.misses(*range(11))
    with caplog.at_level(logging.WARNING):
        report = only(validate(make(here), validation(11, **limited)))
    assert report.verdicts[0].untested
    assert "was not tested" in caplog.text
    assert "not tested" in markdown_of("m", report)


def test_counts_that_happen_to_be_one_have_no_interval_of_shares(
    make: Make, here: Place, pupil: Pupil
) -> None:
    """Scores that all happen to be 1 get no interval of fractions if they are counts."""
    ones = Metric(identifier="ones", object=lambda prediction, target: 1.0)
    tokens = Metric(identifier="output_tokens")
    share, count = only(validate(make(here), validation(20, metrics=[ones, tokens]))).values
    assert share.low < 1.0 == share.high
    assert (count.low, count.value, count.high) == (5.0, 5.0, 5.0)


def test_an_interval_that_is_not_known_loses_no_run(make: Make, here: Place, pupil: Pupil) -> None:
    """A metric of the set that is defined only for all rows together has a value, and is recorded."""

    def whole(predictions: list[Any], targets: list[Any]) -> float:
        if len(set(targets)) < 3:
            raise ValueError("too few classes")
        return 0.5

    one = Metric(identifier="whole", object=whole, over="set")
    report = only(validate(make(here), validation(3, metrics=[one])))
    assert report.values[0].value == 0.5
    assert [row["value"] for row in values(here)] == [0.5]
    assert report.values[0].low < 0.5 < report.values[0].high


@pytest.mark.parametrize("name", ["macro_f1", "chrf"])
def test_a_single_row_has_a_value_without_an_interval(
    make: Make, here: Place, pupil: Pupil, name: str
) -> None:
    """There is nothing to calculate it from by a function of sums; SQLite could not keep a nan."""
    checked = validation(1, metrics=[Metric(identifier=name)])
    (value,) = only(validate(make(here), checked)).values
    assert (value.value > 0, value.low, value.high) == (True, -math.inf, math.inf)
    assert value.approximate == "1 independent rows are too few to be precise"


def test_too_many_failed_says_of_how_many(make: Make, here: Place, pupil: Pupil) -> None:
    """The error gives the limit as a number of rows."""
    pupil.refuses = {"q3"}
    with pytest.raises(TooManyFailed, match="0 of 10 rows may fail; a larger max_failed"):
        validate(make(here), validation())


def test_a_first_run_shows_what_went_wrong(make: Make, here: Place, pupil: Pupil) -> None:
    """Without an earlier run, the page has the worst rows, failed ones with their reason, no right ones."""
    pupil.misses(1, 2)
    pupil.refuses = {"q3"}
    report = only(validate(make(here), validation(10), max_failed=1))
    worst = [(row.row, row.metric, row.score, row.inputs, row.target) for row in report.worst]
    assert sorted(row[3:] for row in worst) == [(["q1"], "a1"), (["q2"], "a2"), (["q3"], "a3")]
    assert worst == sorted(worst)
    page = markdown_of("m", report)
    assert "Worst rows in exact" in page
    assert "I refuse" in page
    assert "no idea" in page
    assert "q4" not in page
    few = only(validate(make(here), validation(10, rows_shown=1), max_failed=1))
    assert len(few.worst) == 1
    assert only(validate(make(here), validation(10, rows_shown=0), max_failed=1)).worst == ()


def test_the_slowest_rows_are_the_worst_of_a_latency(make: Make, here: Place, pupil: Pupil) -> None:
    """If less is better, the largest scores come first."""
    report = only(validate(make(here), validation(10, metrics=[Metric(identifier="latency")], rows_shown=9)))
    scores = [row.score for row in report.worst]
    assert len(scores) == 9
    assert scores == sorted(scores, reverse=True)
