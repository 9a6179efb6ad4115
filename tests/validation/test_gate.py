"""The gate: limits, drops, and models compared row by row."""

from __future__ import annotations

from typing import Any

import pytest

from tests.places import Place
from tests.servers.scripted_server import ScriptedServer
from tests.validation.exam import Make, Pupil, exam, mine, only, validation, values
from vllm_tasks import InvalidCall
from vllm_tasks.validation import Dataset, Metric
from vllm_tasks.validation.comparison import compare
from vllm_tasks.validation.gate import verdict
from vllm_tasks.validation.report import Against, Value
from vllm_tasks.validation.run import validate
from vllm_tasks.validation.statistics import Paired

# ---------------------------------------------------------------------- the gate


def value_of(value: float, *, higher_is_better: bool = True) -> Value:
    return Value("exact_match", value, value - 0.1, value + 0.1, 100, 0, 0, "miss", higher_is_better)


def change(difference: float, p_worse: float) -> list[Against]:
    paired = Paired(difference, difference - 0.05, difference + 0.05, p_worse, p_worse, 100)
    return [Against("last", "run-1", paired, p_worse)]


@pytest.mark.parametrize(
    ("value", "higher_is_better", "passes"),
    [(0.5, True, True), (0.49, True, False), (0.5, False, True), (0.51, False, False), (0.49, False, True)],
)
def test_a_threshold_is_on_the_side_that_is_worse(value: float, higher_is_better: bool, passes: bool) -> None:
    """A value on the threshold passes; a worse value does not."""
    checked = validation(thresholds={"exact_match": 0.5})
    found = verdict(checked, "exam", value_of(value, higher_is_better=higher_is_better))
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
    found = verdict(checked, "exam", value, change(difference, p_worse))
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
    assert reason.endswith(", n=10, approximate), above its threshold of 2.9")
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
    wrong: Any = one
    with pytest.raises(InvalidCall, match="models is a VllmAPI: give a list"):
        compare(wrong, checked, [first])
    with pytest.raises(InvalidCall, match="in their order"):
        compare([one, two], checked, [second, first])
    with pytest.raises(InvalidCall, match="in their order"):
        compare([one, two], checked, [first])
    with pytest.raises(InvalidCall, match="not validated on the same rows of 'exam'"):
        compare([one, two], checked, [first, validate(two, validation(6))])
    other = validation(datasets=[Dataset(identifier="more", raw_data=exam(3))])
    with pytest.raises(InvalidCall, match="'one' was not validated on 'more'"):
        compare([one, two], other, [first, second])
    anything: Any = None
    with pytest.raises(InvalidCall, match="validation is a NoneType"):
        compare([one, two], anything, [first, second])
    for reports in (None, first, ["one", "two"], {"one": first, "two": second}):
        anything = reports
        with pytest.raises(InvalidCall, match="give a list of what validate returned"):
            compare([one, two], checked, anything)


@pytest.mark.parametrize(
    "changed",
    [
        {"on_error": "exclude"},
        {"metrics": [Metric(identifier="exact_match", options={"normalize": ["lower"]})]},
    ],
)
def test_another_validation_is_not_compared(
    changed: dict[str, Any], make: Make, here: Place, pupil: Pupil
) -> None:
    """Values of the reports beside differences by other options would contradict each other."""
    pupil.says["q0"] = "A0"
    pupil.refuses.add("q1")
    one, two = make(here, identifier="one"), make(here, identifier="two")
    reports = [validate(model, validation(5), max_failed=None) for model in (one, two)]
    with pytest.raises(InvalidCall, match=r"'exact_match' of 'one' is 0\.6 .*by this validation"):
        compare([one, two], validation(5, **changed), reports)
