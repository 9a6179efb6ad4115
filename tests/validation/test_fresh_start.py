"""Runs that were interrupted: they resume unless a fresh start is asked for, and never as another model's."""

from __future__ import annotations

import logging

import pytest

from tests.places import Place
from tests.servers.scripted_server import ScriptedServer
from tests.validation.exam import OWN, Make, Pupil, asked, broken_on, exam, only, validation, values
from vllm_tasks import Dataset, InvalidCall
from vllm_tasks.errors import ServerUnavailable
from vllm_tasks.validation.pages import markdown_of
from vllm_tasks.validation.predictions import packed, predict_id_of
from vllm_tasks.validation.run import validate


def test_a_fresh_start_processes_all_rows_and_leaves_the_interrupted_run_for_good(
    make: Make, place: Place, pupil: Pupil, server: ScriptedServer
) -> None:
    """The answers of wrong weights are in no value, neither of the fresh run nor of a later one."""
    model, checked = make(place), validation(5, metrics=[OWN])
    pupil.misses(*range(5))
    with broken_on("a1"):
        validate(model, checked)
    pupil.misses()
    fresh = only(validate(model, checked, resume=False))
    assert (fresh.processed, fresh.values[0].value, fresh.resumed_at) == (5, 1.0, None)
    later = only(validate(model, checked))
    assert (later.processed, later.values[0].value) == (5, 1.0)
    assert set(asked(server).values()) == {3}
    assert [row["value"] for row in values(place)] == [1.0, 1.0]


def test_a_fresh_start_that_is_interrupted_resumes(make: Make, here: Place, pupil: Pupil) -> None:
    model, checked = make(here), validation(5, metrics=[OWN])
    pupil.misses(*range(5))
    with broken_on("a1"):
        validate(model, checked)
    pupil.misses()
    with broken_on("a1"):
        validate(model, checked, resume=False)
    report = only(validate(model, checked))
    assert (report.processed, report.values[0].value) == (0, 1.0)


def test_a_fresh_start_that_dies_before_its_first_answer_leaves_the_run_too(
    make: Make, place: Place, pupil: Pupil, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server with the right weights was not up yet: the wrong answers stay left all the same."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0.5")
    model, checked = make(place), validation(5, metrics=[OWN])
    pupil.misses(*range(5))
    with broken_on("a1"):
        validate(model, checked)
    pupil.misses()
    server.stop()
    with pytest.raises(ServerUnavailable):
        validate(model, checked, resume=False)
    server.start()
    later = only(validate(model, checked))
    assert (later.processed, later.values[0].value) == (5, 1.0)


def test_the_log_and_the_page_show_when_a_run_began_and_was_resumed(
    make: Make, here: Place, pupil: Pupil, caplog: pytest.LogCaptureFixture
) -> None:
    model, checked = make(here), validation(5, metrics=[OWN])
    with broken_on("a1"):
        validate(model, checked)
    with caplog.at_level(logging.INFO, "vllm_tasks.validation"):
        report = only(validate(model, checked))
    assert "m on exam: resuming the run " in caplog.text
    assert "; resume=False processes all rows anew" in caplog.text
    page = markdown_of("m", report)
    assert f"**Resumed** at {report.resumed_at:%Y-%m-%d %H:%M:%S} UTC; the run began at " in page
    assert "Resumed" not in markdown_of("m", only(validate(model, checked)))


def test_a_fresh_start_cannot_score_old_answers(make: Make, here: Place) -> None:
    with pytest.raises(InvalidCall, match="resume=False processes all rows anew: give one"):
        validate(make(here), validation(5), resume=False, reuse=True)


def test_a_run_of_another_model_is_not_resumed_where_names_read_alike(
    make: Make, place: Place, pupil: Pupil
) -> None:
    """Model `a-on-b` on the set `c` and model `a` on the set `b-on-c`, with equal rows and prompts."""

    def on(dataset: str) -> Dataset:
        return Dataset(identifier=dataset, raw_data=exam(5))

    with broken_on("a1"):
        validate(make(place, identifier="a-on-b"), validation(metrics=[OWN], datasets=[on("c")]))
    other = validate(make(place, identifier="a"), validation(metrics=[OWN], datasets=[on("b-on-c")]))
    assert only(other).processed == 5


def test_names_of_outputs_are_distinct_and_plain_ones_stay_plain(make: Make, here: Place) -> None:
    decoder = packed(make(here).prepare(validate, None), "q").decoder
    pairs = [
        ("m", "c", None),
        ("a-on-b", "c", None),
        ("a", "b-on-c", None),
        ("a-on", "on-b", None),
        ("a", "on-on-b", None),
        ("m", "c-choices-1a2b3c4d", None),
        ("m", "c", "choices-1a2b3c4d"),
        ("m", "c-choices", "1a2b3c4d"),
        ("m" * 60, "c", None),
        ("m" * 61, "c", None),
    ]
    names = [predict_id_of(model, dataset, decoder, suffix) for model, dataset, suffix in pairs]
    assert names[0] == "m-on-c"
    assert len(set(names)) == len(names)
    assert all(len(name.encode()) <= 53 for name in names)


def test_the_log_names_the_set_and_not_our_query(
    make: Make, place: Place, pupil: Pupil, caplog: pytest.LogCaptureFixture
) -> None:
    """What a validation reads is a table of its own; nobody has written its SELECT."""
    with caplog.at_level(logging.INFO, "vllm_tasks"):
        validate(make(place), validation(5, metrics=[OWN]))
    assert "SELECT" not in caplog.text
