"""`extract`: the text that a metric scores of an answer, as the filters of lm-evaluation-harness make it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tests.places import Place
from tests.servers.scripted_server import MODEL, Asked, Reply, ScriptedServer
from tests.validation.exam import Make, Pupil, only, own, validation
from vllm_tasks import InvalidCall
from vllm_tasks.metrics.extraction import extraction
from vllm_tasks.validation import Metric
from vllm_tasks.validation.run import validate

LETTER = {"regex": r"(\([A-Z]\))", "match": -1, "choices": "c", "normalize": ["lower", "unicode_punctuation"]}
DATES = ["03/04/2001", "The 5th of March.", "none"]


@pytest.mark.parametrize(
    ("steps", "answer", "found"),
    [
        ([], "  A b ", "  A b "),
        (["strip", "lower"], "  A b ", "a b"),
        (["punctuation", "articles", "strip"], "the-end", "theend"),
        (["articles", "punctuation", "strip"], "the-end", "end"),
        ([{"remove": "[,$]"}, {"remove": r"\.$"}], "$1,234.", "1234"),
        ([{"regex": r"\d+"}], "1 or 22", "1"),
        ([{"regex": r"\d+", "match": -1}], "1 or 22", "22"),
        ([{"regex": r"\d+", "match": 1}], "1 or 22", "22"),
        ([{"regex": r"\d+", "match": 2}], "1 or 22", None),
        ([{"regex": r"\d+", "match": -3, "fallback": "?"}], "1 or 22", "?"),
        ([{"regex": r"is( \w*)"}], "it is so", "so"),
        ([{"regex": "is(x?)"}], "it is so", ""),
        ([{"regex": "(x?)is( s)"}], "it is so", "s"),
        ([{"regex": "(x?)is(y?)"}], "it is so", None),
        ([{"regex": "(x?)is(y?)", "fallback": "[invalid]"}], "it is so", "[invalid]"),
        ([{"regex": "X"}, "lower"], "x", None),
        (["lower", {"regex": "x"}], "X", "x"),
        ([{"regex": "X"}, {"regex": "Y", "fallback": "z"}], "xY", "z"),
        ([{"map": {"yes": "1", "no": "0"}}], "no", "0"),
        ([{"map": {"yes": "1"}}], "no", None),
        ([{"map": {"yes": "1"}, "default": "2"}], "no", "2"),
        ([{"regex": "X"}, {"map": {}, "default": "2"}], "x", "2"),
        (["first"], ["a", "b", "b"], "a"),
        (["last"], ["a", "b", "c"], "c"),
        (["majority"], ["a", "b", "b"], "b"),
        (["majority"], ["b", "a", "a", "b"], "b"),
        ([{"take": 2}, "majority"], ["a", "b", "b"], "a"),
        ([{"regex": r"\d"}, "majority"], ["no", "no", "it is 7"], "7"),
        ([{"regex": r"\d", "fallback": "?"}, "majority"], ["no", "no", "it is 7"], "?"),
        ([{"regex": r"\d"}, "majority"], ["no", "no"], None),
        ([LETTER], "(A), or rather (C)", "(C)"),
        ([LETTER], "THE 5TH OF MARCH", "(B)"),
        ([LETTER], "not 03/04/2001 but the 5th of March", "(B)"),
        ([LETTER], "Answer: B", "(B)"),
        ([LETTER], "Answer: D", None),
        ([LETTER], "B", None),
        (["first"], 7.0, "7"),
    ],
)
def test_a_chain_makes_one_text_of_an_answer(steps: list[Any], answer: Any, found: str | None) -> None:
    """Steps apply in their order, to each of several answers until one is chosen."""
    assert extraction(steps)(answer, DATES, "exact_match") == found


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"extract": ["lowr"]}, "'lowr'; did you mean 'lower'"),
        ({"extract": ["frist"]}, "did you mean 'first'"),
        ({"extract": [{}]}, "is not a step"),
        ({"extract": [{"rgex": "a"}]}, "is not a step"),
        ({"extract": [{"regex": "(a"}]}, "is not a pattern"),
        ({"extract": [{"regex": "a", "group": 1}]}, "no option 'group'; it has match, fallback"),
        ({"extract": [{"regex": "a", "match": "last"}]}, "not the number of a match"),
        ({"extract": [{"regex": "a", "fallback": 1}]}, "fallback=1 is not a text"),
        ({"extract": [{"map": {"a": 1}}]}, "map takes texts by text"),
        ({"extract": [{"map": {}, "default": 1}]}, "default=1 is not a text"),
        ({"extract": [{"take": 0}]}, "take=0 is not a number"),
        ({"extract": [{"regex": "a", "choices": "c"}, {"regex": "a", "choices": "d"}]}, "several columns"),
        ({"identifier": "latency", "extract": ["strip"]}, "scores no text of the answer"),
        ({"identifier": "perplexity", "extract": ["strip"]}, "scores no text of the answer"),
        (
            {"identifier": "mine", "object": own, "higher_is_better": False, "extract": [{"regex": "a"}]},
            "a fallback",
        ),
        ({"identifier": "log_loss", "extract": [{"regex": "a", "fallback": None}]}, "a fallback"),
        ({"identifier": "log_loss", "extract": [{"map": {}, "default": None}]}, "a default"),
        (
            {
                "identifier": "regex_match",
                "options": {"pattern": "a", "choices": "c"},
                "extract": [{"regex": "a", "choices": "d"}],
            },
            "'c' and 'd'",
        ),
    ],
)
def test_a_mistake_in_a_chain_names_the_way_out(fields: dict[str, Any], told: str) -> None:
    """A chain is checked when the metric is made."""
    with pytest.raises(ValidationError, match=told):
        Metric(**{"identifier": "exact_match", **fields})


@pytest.mark.parametrize(
    ("steps", "answer", "told"),
    [
        (["lower"], ["a", "b"], "leaves 2 answers: add the step 'first'"),
        ([{"take": 3}], ["a", "b"], "takes 3 answers, and a row has 2: ask for them with n=3"),
        (["lower"], {"a": 1}, "compares texts"),
    ],
)
def test_answers_that_a_chain_cannot_take_are_refused(steps: list[Any], answer: Any, told: str) -> None:
    """The error says what the chain or the model lacks."""
    with pytest.raises(InvalidCall, match=told):
        extraction(steps)(answer, None, "exact_match")


def several(texts: list[str]) -> Reply:
    choices = [{"index": i, "finish_reason": "stop", "text": text} for i, text in enumerate(texts)]
    return Reply({"model": MODEL, "choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 5}})


def test_several_chains_score_one_answer(make: Make, here: Place, server: ScriptedServer) -> None:
    """One request of a row is scored by the first of its answers and by the majority of them; a row in which
    nothing is found is a miss and did not fail.
    """
    says = {
        "q0": ["It is 1", "It is 0", "It is 0"],
        "q1": ["It is 1", "so", "well"],
        "q2": ["no", "no", "no"],
    }

    def script(asked: Asked) -> Reply | None:
        return several(says[asked.prompt]) if asked.body else None

    server.script = script
    number = {"regex": r"is (\d)"}
    checked = validation(
        [{"q": f"q{i}", "a": str(i)} for i in range(3)],
        metrics=[
            Metric(identifier="first", object="exact_match", extract=[number, "first"]),
            Metric(identifier="majority", object="exact_match", extract=[number, "majority"]),
            Metric(identifier="classes", object="macro_f1", extract=[number, "majority"]),
            Metric(identifier="mine", object=own, extract=["first", {"regex": r"\d", "fallback": "2"}]),
        ],
    )
    report = only(validate(make(here, predict_kwargs={"n": 3}), checked))
    first, majority, classes, mine = report.values
    assert (first.value, majority.value, mine.value) == (1 / 3, 2 / 3, 2 / 3)
    assert classes.value == pytest.approx(2 / 3)
    assert [(value.n, value.failed) for value in report.values] == [(3, 0)] * 4
    assert len(server.posts) == 3


def test_choices_are_those_of_the_row(make: Make, here: Place, pupil: Pupil, server: ScriptedServer) -> None:
    """`regex_match` and `extract` find the letter of a choice by its text, from the row's own list."""
    pupil.says = {"q0": "I take the red one.", "q1": "I take the red one.", "q2": "I take: B"}
    rows = [
        {"q": "q0", "a": "(A)", "c": ["red", "blue"]},
        {"q": "q1", "a": "(B)", "c": ["blue", "Red"]},
        {"q": "q2", "a": "(A)", "c": ["green", 7]},
    ]
    metrics = [
        Metric(
            identifier="regex_match",
            options={"pattern": r"\([A-Z]\)", "choices": "c", "normalize": ["lower", "punctuation"]},
        ),
        Metric(identifier="e", object="exact_match", extract=[{"regex": r"\([A-Z]\)", "choices": "c"}]),
    ]
    matched, extracted = only(validate(make(here), validation(rows, metrics=metrics))).values
    assert (matched.value, extracted.value) == (2 / 3, 1 / 3)
    rows[1]["c"] = None
    before = len(server.posts)
    for metric in metrics:
        with pytest.raises(InvalidCall, match=f"{metric.identifier} needs a list of choices"):
            validate(make(here), validation(rows, metrics=[metric]))
    assert len(server.posts) == before
