"""Classes with probabilities: the requests, the values, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.calls.decoding import columns, decoder
from tests.lettered import LETTERS, lettered
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import Classes, InvalidCall, RowError, VllmAPI, VllmModel
from vllm_tasks.calls.classes import LAST_LINE
from vllm_tasks.engines import wire
from vllm_tasks.results import Choice, Completion
from vllm_tasks.rows import Request, TokenLogprob

TICKETS = Classes({"bug": "something is broken", "feature": "a wish"})
LINES = f"A: bug - something is broken\nB: feature - a wish\n{LAST_LINE}"


def model(server: ScriptedServer, **fields: Any) -> VllmAPI:
    return VllmAPI(**{"identifier": "m", "api_url": server.url, "datatype": TICKETS, "retries": 0, **fields})


def answered(text: str, *top: tuple[str, float]) -> Completion:
    token = TokenLogprob(text, dict(top).get(text, math.nan), list(top))
    return Completion((Choice(text, "stop", logprobs=[token]),))


# ---------------------------------------------------------------------- the classes


def test_a_list_and_a_mapping_name_classes() -> None:
    """They keep their order, also as JSON, in which blocks are stored."""
    plain = Classes(["b", "a"])
    assert plain.names == ["b", "a"]
    assert plain.lines.splitlines() == ["A: b", "B: a", LAST_LINE]
    assert TICKETS.lines == LINES
    for classes in (plain, TICKETS, Classes({"x": None, "y": "z"}, review_below=0.8)):
        assert Classes.model_validate_json(classes.model_dump_json()) == classes


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["one"], "at least 2"),
        ([str(i) for i in range(27)], "27 classes.*26 letters.*two steps"),
        (["bug", "Bug "], "'bug' and 'Bug ' are one"),
        (["bug", "bug"], "'bug' and 'bug' are one"),
        (["bug", " "], "blank"),
        (["bug", "a\nb"], "line end"),
        ("bug", "is a str: give a list"),
        (None, "is a NoneType: give a list"),
    ],
)
def test_what_cannot_be_classes_is_refused(classes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Classes(classes)


@pytest.mark.parametrize("threshold", [0, 1.1, -1])
def test_a_threshold_is_a_probability(threshold: float) -> None:
    with pytest.raises(ValueError, match="review_below"):
        Classes(["a", "b"], review_below=threshold)


# ---------------------------------------------------------------------- requests


def test_a_text_ends_with_the_classes(server: ScriptedServer) -> None:
    """One token among the letters is asked for, with the log-probabilities of all of them."""
    server.script = lettered(lambda _: [0.9, 0.1])
    found = model(server, chat=False).predict("it crashes")
    assert found == {
        "label": "bug",
        "probability": pytest.approx(0.9),
        "probabilities": {"bug": pytest.approx(0.9), "feature": pytest.approx(0.1)},
    }
    body = server.posts[0].body
    assert body["prompt"] == f"it crashes\n\n{LINES}"
    assert (body["max_tokens"], body["temperature"], body["logprobs"]) == (1, 0, 2)
    assert body["structured_outputs"] == {"choice": ["A", "B"]}
    assert "chat_template_kwargs" not in body


def test_a_chat_ends_with_the_classes_and_does_not_think(server: ScriptedServer) -> None:
    """The lines are in the last user message; a template's option is added to those of the call."""
    server.script = lettered(lambda _: [0.2, 0.8])
    asked = model(server, chat=True, system="S", predict_kwargs={"chat_template_kwargs": {"tone": "dry"}})
    assert asked.predict("I wish")["label"] == "feature"
    body = server.posts[0].body
    assert [m["content"] for m in body["messages"]] == ["S", f"I wish\n\n{LINES}"]
    assert body["chat_template_kwargs"] == {"enable_thinking": False, "tone": "dry"}
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)


def test_messages_end_with_the_classes(server: ScriptedServer) -> None:
    """The last user message gets them, as a part if it has parts; the caller's messages stay as they are."""
    parts = [{"type": "text", "text": "p"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    made = model(server).prepare(model(server).predict).prompter(messages)
    assert isinstance(made, list)
    assert made[0]["content"] == [*parts, {"type": "text", "text": LINES}]
    assert made[1] == messages[1]
    assert len(parts) == 1
    alone = model(server).prepare(model(server).predict).prompter([{"role": "system", "content": "s"}])
    assert isinstance(alone, RowError)
    assert "no user message" in alone.message


def test_more_classes_than_log_probabilities(server: ScriptedServer) -> None:
    """A server gives 20 at most: the least likely of 26 classes have the probability 0."""
    weights = [(i + 1) / 351 for i in range(26)]
    server.script = lettered(lambda _: weights)
    found = model(server, datatype=Classes([f"class {i}" for i in range(26)]), chat=True).predict("x")
    assert server.posts[0].body["top_logprobs"] == 20
    assert found["label"] == "class 25"
    assert math.fsum(found["probabilities"].values()) == pytest.approx(1)
    assert [p > 0 for p in found["probabilities"].values()] == [False] * 6 + [True] * 20


@pytest.mark.parametrize(
    "fields",
    [
        {"predict_kwargs": {"max_tokens": 5}},
        {"predict_kwargs": {"temperature": 0.7}},
        {"predict_kwargs": {"n": 2}},
        {"predict_kwargs": {"structured_outputs": {"choice": ["yes"]}}},
        {"predict_kwargs": {"stop": ["\n"]}},
        {"output_schema": {"a": "int"}},
    ],
    ids=str,
)
def test_what_does_not_go_with_classes_is_refused(server: ScriptedServer, fields: dict[str, Any]) -> None:
    """It is named, as a field and as an argument of a call; what says the same is accepted."""
    name = next(iter(fields.get("predict_kwargs", fields)))
    with pytest.raises(ValueError, match=name):
        model(server, **fields)
    if "predict_kwargs" in fields:
        with pytest.raises(InvalidCall, match=f"{name}=.* does not go with datatype=Classes"):
            model(server).predict("x", **fields["predict_kwargs"])
    model(server, predict_kwargs={"n": 1, "temperature": 0, "max_tokens": 1, "seed": 1})


def test_lists_and_the_legacy_format_are_refused(server: ScriptedServer) -> None:
    with pytest.raises(InvalidCall, match="'Classes' are not lists"):
        model(server, flatten=True).predict("x")
    with pytest.raises(ValueError, match="/generate does not return"):
        model(server, api_url=f"{server.url}/generate")


# ---------------------------------------------------------------------- answers


def test_probabilities_are_normalized_over_the_letters() -> None:
    """Other tokens have no part; of tokens that read alike the likeliest counts; an absent letter has 0."""
    made = decoder(Classes(["a", "b", "c"]))
    top = [("B", math.log(0.3)), (" B", math.log(0.1)), ("A", math.log(0.1)), ("The", math.log(0.5))]
    found = made.values(answered("B", *top))
    assert found["probabilities"] == {"a": pytest.approx(0.25), "b": pytest.approx(0.75), "c": 0}
    assert made.rows(answered("B", *top)) == [("b", found["probability"], found["probabilities"])]
    assert columns(made) == {"label": "str", "probability": "float", "probabilities": "json"}


@pytest.mark.parametrize(("probability", "review"), [(0.79, True), (0.81, False)])
def test_rows_below_the_threshold_are_marked(probability: float, review: bool) -> None:
    made = decoder(Classes(["a", "b"], review_below=0.8))
    found = answered("A", ("A", math.log(probability)), ("B", math.log(1 - probability)))
    value = made.values(found)
    assert (value["label"], value["_review"]) == ("a", review)
    assert columns(made)["_review"] == "bool"
    (row,) = made.rows(found)  # type: ignore[misc]
    assert row[3] is value["_review"]


@pytest.mark.parametrize(
    ("completion", "words"),
    [
        (answered("The", ("The", -0.1), ("A", -3)), "none of the letters A to B.*structured_outputs"),
        (answered("C", ("C", -0.1)), "none of the letters A to B"),
        (Completion((Choice("A"),)), "without top_logprobs.*vLLM server"),
        (answered("A"), "without top_logprobs"),
        (answered("A", ("x", -1)), "none of the letters, so no class"),
        (answered("A", ("A", math.nan), ("B", -2)), "of A that is not a finite number"),
        (answered("A", ("A", math.inf), ("B", -2)), "of A that is not a finite number"),
        (answered("A", ("B", -2)), "of A that is not a finite number"),
        (Completion((Choice("", reasoning="hm"),)), "only reasoning"),
    ],
)
def test_an_answer_without_a_letter_or_probabilities_is_an_error(completion: Completion, words: str) -> None:
    """The error of the row says what is missing."""
    found = decoder(Classes(["a", "b"])).values(completion)
    assert isinstance(found, RowError)
    assert found.kind == "output"
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(found.message)


def test_a_choice_at_max_tokens_is_complete() -> None:
    """vLLM reports `length`, but a choice that no other one continues is not truncated."""

    def reason(text: str, **sampling: Any) -> str | None:
        answer = {"choices": [{"text": text, "finish_reason": "length", "index": 0}]}
        return wire.parse("/v1/completions", Request("p", sampling), answer).choices[0].finish_reason

    assert reason("A", structured_outputs={"choice": ["A", "B"]}) == "stop"
    assert reason("A", structured_outputs={"choice": ["A", "AB"]}) == "length"
    assert reason("x", structured_outputs={"choice": ["A"]}) == "length"
    assert reason("A") == reason("A", structured_outputs={"regex": "A+"}) == "length"


# ---------------------------------------------------------------------- fingerprint


def test_classes_count_in_the_fingerprint(server: ScriptedServer) -> None:
    """Names, their order, descriptions and the threshold decide what is stored."""
    kinds = [
        Classes(["a", "b"]),
        Classes(["b", "a"]),
        Classes({"a": "x", "b": ""}),
        Classes(["a", "b"], review_below=0.5),
        "str",
    ]
    made = [model(server, datatype=kind, chat=False, model="x") for kind in kinds]
    prints = [each.prepare(each.predict).over("text").fingerprint for each in made]
    assert len(set(prints)) == len(kinds)
    assert len({each.identity() for each in made}) == len(kinds)


@pytest.mark.engine
def test_the_real_engine_gives_letters_probabilities(local_model: VllmModel) -> None:
    """As chat, as text and with 26 classes: the letters have all of the probability, and nothing is
    truncated."""
    classes = Classes({"bug": "broken", "feature": "a wish", "other": None}, review_below=1)
    asked = local_model.model_copy(update={"datatype": classes, "predict_kwargs": {}})
    for chat in (True, False):
        model = asked.model_copy(update={"chat": chat})
        (completion,) = model.completions(["it crashes"])
        assert isinstance(completion, Completion)
        (choice,) = completion.choices
        assert choice.finish_reason == "stop"
        assert choice.logprobs
        assert math.fsum(math.exp(p) for _, p in choice.logprobs[0].top) == pytest.approx(1, abs=1e-3)
        found = model.predict("it crashes")
        assert found["label"] == classes.names[LETTERS.index(choice.text)]
        assert (
            found["probability"]
            == max(found["probabilities"].values())
            == pytest.approx(math.exp(choice.logprobs[0].logprob), abs=1e-3)
        )
        assert found["_review"] is True
    many = asked.model_copy(update={"datatype": Classes([f"class {i}" for i in range(26)])})
    found = many.predict("x")
    assert sum(p > 0 for p in found["probabilities"].values()) == 20
