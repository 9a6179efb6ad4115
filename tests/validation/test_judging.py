"""Metrics that ask a model: scores of a judge, and likelihoods of choices."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, refused
from tests.validation.exam import (
    OWN,
    Make,
    Pupil,
    asked,
    broken_on,
    choosing,
    letters,
    only,
    reply,
    validation,
    values,
)
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.errors import TooManyFailed
from vllm_tasks.validation import Metric, Validation
from vllm_tasks.validation.run import validate


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


def test_numbers_among_numbers_are_choices_or_indexes_in_all_rows(
    make: Make, here: Place, server: ScriptedServer
) -> None:
    """0 is no choice of its row, so 1 is an index too, of the less likely 2."""
    server.script = letters
    metric = Metric(identifier="multiple_choice", options={"choices": "choices", "delimiter": ""})
    rows = [{"q": q, "a": target, "choices": [1, 2]} for q, target in (("x", 0), ("y", 1))]
    assert only(validate(make(here), validation(rows, metrics=[metric]))).values[0].value == 0.5
    rows = [{"q": q, "a": target, "choices": [1, 2]} for q, target in (("x", 2), ("y", 1))]
    assert only(validate(make(here), validation(rows, metrics=[metric]))).values[0].value == 0.5


def test_likelihoods_are_of_what_the_model_is_asked(make: Make, here: Place, server: ScriptedServer) -> None:
    """Parameters that decide the prompt are sent, other sampling parameters are not."""
    server.script = letters
    model = make(here, predict_kwargs={"add_special_tokens": False, "temperature": 0.7, "max_tokens": 9})
    validate(model, choosing(["d", "b"], 1, delimiter=""))
    for post in server.posts:
        own = {name: post.body[name] for name in ("add_special_tokens", "temperature", "max_tokens")}
        assert own == {"add_special_tokens": False, "temperature": 0, "max_tokens": 1}


def test_space_at_the_end_of_a_prompt_belongs_to_the_choice(
    make: Make, here: Place, server: ScriptedServer
) -> None:
    """The prompt without it is tokenized alone, so a space that joins the choice's token changes nothing."""
    server.script = letters
    report = only(validate(make(here, prompt="{input} \n"), choosing(["d", "b"], "b", delimiter=" ")))
    assert asked(server) == Counter(["x", "x \n d", "x \n b"])
    assert report.values[0].value == 1.0


def test_only_the_texts_own_tokens_are_summed(make: Make, here: Place, server: ScriptedServer) -> None:
    """Those of the prompt have other log-probabilities in each request, as where a batch is rounded
    otherwise: in a difference of two sums, 900 of them would outweigh the text.
    """

    def script(asked: Asked) -> Reply | None:
        if not asked.body:
            return None
        own = len(asked.prompt) - 900
        logprobs = [-1.0 - 0.001 * own] * 899 + [-2.0] * own
        tokens = [{"1": {"logprob": each, "decoded_token": "x", "rank": 1}} for each in logprobs]
        return reply("", "length", prompt_logprobs=[None, *tokens])

    server.script = script
    checked = validation([{"q": "q" * 900, "a": "ab"}], metrics=[Metric(identifier="perplexity")])
    assert only(validate(make(here), checked)).values[0].value == pytest.approx(math.exp(2), rel=1e-12)


@pytest.mark.parametrize(
    ("question", "words"),
    [("x", "joins 'y' with the prompt"), (" ", "nothing stands before the text")],
)
def test_a_text_without_a_token_of_its_own_is_a_failed_row(
    make: Make, here: Place, server: ScriptedServer, question: str, words: str
) -> None:
    """If the tokenizer joins the text with the prompt, or there is no prompt, the row's error says so."""

    def joined(asked: Asked) -> Reply | None:
        return letters(replace(asked, body={"prompt": "x"})) if asked.body else None

    server.script = joined
    checked = validation([{"q": question, "a": "y"}], metrics=[Metric(identifier="perplexity")])
    with pytest.raises(InvalidCall, match=f"all 1 rows failed.*{words}"):
        validate(make(here), checked, max_failed=None)


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
