"""What a run is compared with, and how many comparisons one verdict may have."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from benchmarks.gate import FIRST
from tests.places import Place
from tests.servers.scripted_server import ScriptedServer
from tests.validation.exam import Make, Pupil, exam, mine, only, validation
from vllm_tasks import Dataset, InvalidCall, Metric
from vllm_tasks.validation.comparison import compare
from vllm_tasks.validation.gate import against_runs, corrected, number_of_tests, power
from vllm_tasks.validation.history import Baseline, baselines
from vllm_tasks.validation.pages import markdown_of, markdown_of_comparison
from vllm_tasks.validation.report import Record, Value
from vllm_tasks.validation.run import validate


def records(*values: float, failed: tuple[int, ...] = (), **fields: Any) -> list[Record]:
    """One record for each value, the oldest first; those at the positions `failed` did not pass."""
    return [
        replace(
            FIRST,
            run=str(i),
            value=value,
            low=value - 0.05,
            high=value + 0.05,
            passed=i not in failed,
            created_at=FIRST.created_at + timedelta(days=i),
            **fields,
        )
        for i, value in enumerate(values)
    ]


def chosen(found: list[Baseline]) -> list[tuple[str, str, int]]:
    return [(one.kind, one.record.run, one.chosen_from) for one in found]


def test_the_baselines_are_the_last_run_that_passed_and_the_best() -> None:
    """With the number of runs that each was chosen from, because chance helped to choose it."""
    past = records(0.5, 0.8, 0.6, 0.9, failed=(3,))
    assert chosen(baselines(past, "best")) == [("last", "2", 2), ("best", "1", 3)]
    assert chosen(baselines(past, "last")) == [("last", "2", 2)]
    assert chosen(baselines(past, "0")) == [("last", "2", 2), ("named", "0", 1)]
    assert chosen(baselines(past[:2], "best")) == [("last", "1", 1)], "the last is the best"
    assert baselines(records(0.5, failed=(0,)), "best") == []
    seconds = records(5.0, 2.0, 3.0, higher_is_better=False)
    assert chosen(baselines(seconds, "best"))[1] == ("best", "1", 3)


def test_a_run_that_reached_its_threshold_by_luck_counts_as_chosen() -> None:
    """The threshold is within the interval of its value."""
    (clear,) = baselines(records(0.5), "last", threshold=0.44)
    (lucky,) = baselines(records(0.5), "last", threshold=0.46)
    (slow,) = baselines(records(0.5, higher_is_better=False), "last", threshold=0.54)
    assert (clear.chosen_from, lucky.chosen_from, slow.chosen_from) == (1, 2, 2)
    assert corrected(0.01, lucky, 2, 3) == pytest.approx(0.12)


def test_data_sets_and_metrics_of_load_multiply_the_tests_of_a_verdict() -> None:
    """Metrics over the same rows do not, since they are tested together."""
    sets = [Dataset(identifier=name, raw_data=exam(3)) for name in ("one", "two", "three")]
    metrics = [Metric(identifier=name) for name in ("exact_match", "contains", "latency", "output_tokens")]
    limits = {"one/exact_match": 0.0, "one/contains": 0.0, "two/exact_match": 0.0, "two/latency": 1.0}
    checked = validation(datasets=sets, metrics=metrics, max_regression=limits)
    assert [number_of_tests(checked, name) for name in ("one", "two", "three")] == [2, 4, 2]
    assert number_of_tests(validation(), "exam") == 1


def test_small_drops_add_up_against_the_best_run(make: Make, here: Place, pupil: Pupil) -> None:
    """Each night a few more rows are wrong, within the limit; the last run lets it pass for ever."""

    def nights(identifier: str, baseline: str) -> list[bool]:
        model = make(here, identifier=identifier)
        checked = validation(100, max_regression={"exact_match": 0.08}, baseline=baseline)
        found = []
        for night in range(6):
            pupil.misses(*range(7 * night))
            found.append(validate(model, checked).passed)
        return found

    assert nights("last", "last") == [True] * 6
    assert nights("best", "best") == [True, True, False, False, False, False]


def test_the_page_and_the_reason_have_the_figures_of_both_baselines(
    make: Make, here: Place, pupil: Pupil, caplog: pytest.LogCaptureFixture
) -> None:
    model, checked = make(here), validation(60, max_regression={"exact_match": 0.2})
    first = only(validate(model, checked))
    pupil.misses(*range(10))
    second = only(validate(model, checked))
    pupil.misses(*range(20))
    with caplog.at_level(logging.INFO, "vllm_tasks.validation"):
        third = only(validate(model, checked))
    (verdict,) = third.verdicts
    assert [(one.kind, one.run) for one in verdict.against] == [("last", second.run), ("best", first.run)]
    assert [round(one.paired.difference, 3) for one in verdict.against] == [-0.167, -0.333]
    assert f"0.3333 worse than in the best run {first.run}" in str(verdict.reason)
    assert second.run not in str(verdict.reason), "16.7 points are within the limit"
    page = markdown_of("m", third)
    assert "| limits | rows | against the last passed run |" in page
    assert "- exact_match against the best run: -0.333 (" in page
    assert "with these 60 rows, a drop of 0.4 is detected " in page
    assert "exact_match on exam: with these 60 rows, a drop of 0.4 is detected " in caplog.text


def test_a_named_run_is_a_baseline_and_an_unknown_one_is_refused(
    make: Make, here: Place, pupil: Pupil, server: ScriptedServer
) -> None:
    model, checked = make(here), validation(60, max_regression={"exact_match": 0.2})
    first = only(validate(model, checked))
    pupil.misses(*range(10))
    validate(model, checked)
    pupil.misses(*range(20))
    named = checked.model_copy(update={"baseline": first.run})
    assert "worse than in the run " + first.run in only(validate(model, named)).reasons[0]
    sent = len(server.posts)
    with pytest.raises(InvalidCall, match=r"baseline='nightly' is not a run of 'm' .* the latest are "):
        validate(model, checked.model_copy(update={"baseline": "nightly"}))
    assert len(server.posts) == sent


def test_a_verdict_over_many_limits_is_one_test(make: Make, here: Place, pupil: Pupil) -> None:
    """Twelve names of one metric are one test, not twelve: p stays, and so does the verdict."""
    metrics = [mine(matches)] + [Metric(identifier=f"m{i}", object=matches) for i in range(11)]
    limits = {metric.identifier: 0.0 for metric in metrics}
    pupil.misses()
    for identifier, chosen_metrics in ("one", metrics[:1]), ("twelve", metrics):
        model = make(here, identifier=identifier)
        checked = validation(
            40,
            metrics=chosen_metrics,
            max_regression={m.identifier: limits[m.identifier] for m in chosen_metrics},
        )
        pupil.misses()
        validate(model, checked)
        pupil.misses(*range(5))
        report = only(validate(model, checked))
        assert {one.p_worse for verdict in report.verdicts for one in verdict.against} == {1 / 2**5}
        assert len(report.verdicts) == len(report.reasons) == len(chosen_metrics)


def matches(prediction: str, target: str) -> float:
    return float(prediction == target)


# ---------------------------------------------------------------------- clusters


def test_rows_of_one_passage_count_as_one(make: Make, place: Place, pupil: Pupil) -> None:
    """Of 6 passages with 10 questions, one is answered wrongly: that is one observation. The column is kept
    with the rows, so that a later run reads it from the snapshot."""
    rows = [{"q": f"q{i}", "a": f"a{i}", "passage": f"p{i // 10}"} for i in range(60)]
    limit = {"exact_match": 0.0}
    plain = validation(rows, max_regression=limit)
    by_passage = validation(
        datasets=[Dataset(identifier="exam", raw_data=rows, pin=True)],
        max_regression=limit,
        cluster="passage",
    )
    passes = {}
    for identifier, checked in ("plain", plain), ("passages", by_passage):
        model = make(place, identifier=identifier)
        pupil.misses()
        validate(model, checked)
        pupil.misses(*range(10))
        report = only(validate(model, checked))
        passes[identifier] = not report.reasons
        wide = report.values[0].high - report.values[0].low
        if identifier == "passages":
            assert report.values[0].clusters == 6
            assert "60 rows in 6 clusters" in markdown_of("m", report)
            assert report.values[0].approximate == "6 independent rows are too few to be precise"
            assert wide > 0.25
    assert passes == {"plain": False, "passages": True}


def test_equal_inputs_are_one_cluster_without_being_told(make: Make, here: Place, pupil: Pupil) -> None:
    """And rows that a passage connects with them belong to it."""
    rows = [{"q": f"q{i % 4}", "a": f"a{i}", "passage": "x" if i in (3, 4) else None} for i in range(8)]
    found = only(validate(make(here), validation(rows)))
    assert found.values[0].clusters == 4
    assert only(validate(make(here), validation(rows, cluster="passage"))).values[0].clusters == 3
    with pytest.raises(InvalidCall, match="has no 'pasage'"):
        validate(make(here), validation(rows, cluster="pasage"))


# ---------------------------------------------------------------------- load


def slow(seconds: float) -> Value:
    return Value("latency", seconds, seconds, seconds, 100, 0, 0, "miss", False)


def test_a_run_is_one_observation_of_the_load() -> None:
    """Slower than all of 19 runs: 1 of 20. Ties count as slower, and so does everything in a slow run."""
    past = records(*(1 + i / 100 for i in range(19)), higher_is_better=False)
    (last,) = baselines(past, "last")
    assert against_runs(slow(2.0), last, past, 1).p_worse == pytest.approx(1 / 20)
    assert against_runs(slow(1.18), last, past, 1).p_worse == pytest.approx(2 / 20)
    assert against_runs(slow(0.5), last, past, 1).p_worse == 1.0
    assert against_runs(slow(2.0), last, past, 3).p_worse == pytest.approx(3 / 20)


def test_a_slower_server_does_not_shut_the_gate(
    make: Make, here: Place, pupil: Pupil, caplog: pytest.LogCaptureFixture
) -> None:
    """Two runs say nothing of the load; the page and the log report it."""
    checked = validation(20, metrics=[Metric(identifier="latency")], max_regression={"latency": 0.0})
    model = make(here)
    for _ in range(3):
        with caplog.at_level(logging.WARNING, "vllm_tasks.validation"):
            report = only(validate(model, checked))
        assert not report.reasons
    assert "of 19 earlier runs needed, there are 2" in caplog.text
    page = markdown_of("m", report)
    assert "of 19 earlier runs needed, there are 2" in page
    assert "is detected" not in page, "rows show no drop of a load, however many there are"


def test_models_are_compared_by_latency_without_a_p_value(make: Make, here: Place, pupil: Pupil) -> None:
    """One run each: whatever moved the load between them moved all rows."""
    checked = validation(20, metrics=[Metric(identifier="latency")])
    models = [make(here, identifier=name) for name in ("one", "two")]
    found = compare(models, checked, [validate(model, checked) for model in models])
    paired = found.standings[1].paired
    assert paired is not None
    assert math.isfinite(paired.difference)
    assert math.isnan(paired.p_different)
    assert "nan" not in str(found) + markdown_of_comparison(found)


# ---------------------------------------------------------------------- power


def test_the_page_says_how_many_rows_a_drop_takes() -> None:
    """The figure is that of the benchmark: two runs of 300 rows, 40 % right, drawn independently."""
    value = Value("exact_match", 0.4, 0.346, 0.456, 300, 0, 0, "miss", True)
    found = power(value, [], 0.0, 1)
    assert found == (
        "with these 300 rows, a drop of 0.05 is detected 35 times of 100; 90 times of 100 take 1,600 rows"
    )
    assert "0.05 is detected 16 times of 100" in str(power(value, [], 0.0, 4))
    assert power(replace(value, low=0.4, high=0.4), [], 0.0, 1) is None
    assert "take" not in str(power(replace(value, low=0.39, high=0.41, n=9_000), [], 0.0, 1))
