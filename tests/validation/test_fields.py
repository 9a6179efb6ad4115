"""A validation's fields, and calls that are refused before a row is sent."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from tests.places import Place
from tests.servers.scripted_server import ScriptedServer
from tests.validation.exam import Make, validation
from vllm_tasks import InvalidCall, VllmModel
from vllm_tasks.validation.run import validate


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"datasets": [{"identifier": "d"}]}, "exactly one of select, raw_data and reference"),
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
        ({"validation": {"datasets": []}}, "validation is a dict"),
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
