"""Records become prompts: templates, functions, signatures, context, artifacts, chat."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_tasks import VllmAPI
from vllm_tasks.calls.prompts import Prompter, call_arguments, load_artifact
from vllm_tasks.calls.template import Template
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Request, RowError

ATTACKS = [
    "{x.__class__}",
    "{context}",
    "{input}",
    "{artifacts.secret}",
    "{0}",
    "{{",
    "}}",
    "{",
    "%s %(input)s",
    "${input}",
    "{{ input }}",
    "\\N{DIGIT ZERO}",
]


def prompter(prompt: str = "{input}", **given: Any) -> Prompter:
    defaults: dict[str, Any] = {
        "prompt_func": None,
        "signature": "singleton",
        "chat": False,
        "system": None,
        "artifacts": {},
        "context": None,
    }
    return Prompter(prompt=prompt, **(defaults | given))


def refusal(made: object) -> str:
    assert isinstance(made, RowError), made
    assert made.kind == "prompt"
    assert not made.retryable
    return made.message


# ---------------------------------------------------------------------- templates


@pytest.mark.parametrize("attack", ATTACKS)
def test_data_never_acts_as_a_template(attack: str) -> None:
    """Texts in a record, the context or an artifact come out unchanged."""
    make = prompter(
        "{input}|{context}|{artifacts.secret}", context=attack, artifacts={"secret": attack, "other": "S"}
    )
    assert make(attack) == f"{attack}|{attack}|{attack}"


@given(st.text(st.characters(exclude_categories=("Cs",))), st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_passes_unchanged(value: str, context: str) -> None:
    """A prompt is its literal parts and its values, joined, for any values."""
    if value.lower() in ("nan", "nat"):
        value += "."
    assert prompter("a {input} b {context}", context=context)(value) == f"a {value} b {context}"


@pytest.mark.parametrize(
    "prompt",
    [
        "{input.__class__}",
        "{input.upper}",
        "{input[0]}",
        "{0[key]}",
        "{0.real}",
        "{input!r}",
        "{input:>10}",
        "{input:{width}}",
        "{}",
        "{!r}",
        "{ input }",
        "{-1}",
        "{²}",
        "{artifacts.}",
        "{artifacts.a.b}",
        "{artifacts.a[0]}",
        "{a-b}",
    ],
)
def test_a_field_that_is_more_than_a_key_is_refused(prompt: str) -> None:
    """Attributes, indexes, conversions, formats and empty fields are refused with the ways out."""
    with pytest.raises(ValueError, match="is not a plain key") as refused:
        Template.parse(prompt)
    assert prompt.replace(":{width}", "").strip("{}").split(":")[0] in str(refused.value)
    assert "prompt_func" in str(refused.value)
    assert "{{ }}" in str(refused.value)


@pytest.mark.parametrize("prompt", ["{", "}", "{input", "a } b", "{input!}", "{a!rb}"])
def test_an_unbalanced_template_is_refused(prompt: str) -> None:
    """The error shows a template that cannot be parsed, and how to write a literal brace."""
    with pytest.raises(ValueError, match="literal braces") as refused:
        Template.parse(prompt)
    assert repr(prompt) in str(refused.value)


def test_doubled_braces_are_literal() -> None:
    """`{{` and `}}` in a template stand for braces, and never open a field."""
    assert prompter('{{"answer": {input}}} {{input}}')(1) == '{"answer": 1} {input}'


def test_a_template_knows_its_fields() -> None:
    """Names, numbers and artifacts are fields; literal braces are not."""
    assert Template.parse("{a} {0} {artifacts.b} {{c}}").fields == {"a", "0", "artifacts.b"}


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", "text"),
        ("", ""),
        (0, "0"),
        (1.5, "1.5"),
        (True, "True"),
        (float("inf"), "inf"),
        (Decimal("1.10"), "1.10"),
        (dt.date(2026, 11, 22), "2026-11-22"),
        (dt.datetime(2026, 11, 22, 1, 2, 3), "2026-11-22 01:02:03"),
        (dt.time(1, 2), "01:02:00"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ("nan", "nan"),
    ],
)
def test_plain_values_become_text(value: object, text: str) -> None:
    """Texts, numbers, dates, times and UUIDs print as Python prints them; a text `nan` is a text."""
    assert prompter("<{input}>")(value) == f"<{text}>"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "is None"),
        (b"bytes", "a bytes"),
        (bytearray(b"x"), "a bytearray"),
        (["a"], "a list"),
        ({"a": 1}, "a dict"),
        (object(), "a object"),
        (float("nan"), "missing value"),
        (Decimal("NaN"), "missing value"),
        (Decimal("sNaN"), "missing value"),
    ],
)
def test_what_is_no_text_fails_its_row(value: object, said: str) -> None:
    """None, NaN, bytes and containers are that row's error, which names the field."""
    message = refusal(prompter()(value))
    assert said in message
    assert "'input'" in message


def test_numpy_scalars_count_as_what_they_are() -> None:
    """Numbers, booleans and dates of numpy are plain values, its NaN and NaT are missing ones."""
    np = pytest.importorskip("numpy")
    make = prompter()
    values = [np.int64(3), np.float32(0.5), np.bool_(True), np.str_("t"), np.datetime64("2026-11-22")]
    assert [make(v) for v in values] == ["3", "0.5", "True", "t", "2026-11-22"]
    for missing in (np.float32("nan"), np.float64("nan"), np.datetime64("NaT")):
        assert "missing value" in refusal(make(missing))
    assert "ndarray" in refusal(make(np.array([1])))


def test_lone_surrogates_fail_their_row() -> None:
    """Text that no UTF-8 can carry is a row error, in a text as in chat messages."""
    assert "not valid Unicode" in refusal(prompter()("a\udcffb"))
    assert "not valid Unicode" in refusal(prompter(chat=True)("a\udcffb"))
    assert prompter()("a\U0001f600b") == "a\U0001f600b"


# ---------------------------------------------------------------------- signatures


@pytest.mark.parametrize(
    ("signature", "record", "args", "kwargs"),
    [
        ("singleton", ("a", "b"), (("a", "b"),), {}),
        ("*args", ("a", "b"), ("a", "b"), {}),
        ("*args", ["a"], ("a",), {}),
        ("*args", (), (), {}),
        ("**kwargs", {"a": 1}, (), {"a": 1}),
        ("*args,**kwargs", (("a",), {"b": 1}), ("a",), {"b": 1}),
        ("*args,**kwargs", [[], {}], (), {}),
    ],
)
def test_a_signature_says_how_a_record_becomes_a_call(
    signature: Any, record: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """One value, a tuple, a dict, or a pair of both."""
    assert call_arguments(signature, record) == (args, kwargs)


@pytest.mark.parametrize(
    ("signature", "record", "said"),
    [
        ("*args", "text", "a tuple"),
        ("*args", b"bytes", "a tuple"),
        ("*args", bytearray(b"x"), "a tuple"),
        ("*args", {"a": 1}, "a tuple"),
        ("*args", 1, "a tuple"),
        ("*args", None, "a tuple"),
        ("**kwargs", ("a",), "a dict"),
        ("**kwargs", "a", "a dict"),
        ("**kwargs", None, "got None"),
        ("*args,**kwargs", {"a": 1}, "a pair"),
        ("*args,**kwargs", (("a",),), "a pair"),
        ("*args,**kwargs", ("a", {"b": 1}), "a pair"),
        ("*args,**kwargs", ({"b": 1}, ("a",)), "a pair"),
        ("*args,**kwargs", ((), {}, ()), "a pair"),
    ],
)
def test_a_record_of_another_shape_fails_its_row(signature: Any, record: Any, said: str) -> None:
    """The error names the signature, the shape that it takes, and the shape that it got."""
    message = refusal(prompter("x", signature=signature)(record))
    assert repr(signature) in message
    assert said in message


def test_templates_fill_by_position_and_by_name() -> None:
    """`{0}` counts the tuple's values, names are the dict's keys."""
    assert prompter("{1}{0}", signature="*args")(("a", "b")) == "ba"
    assert prompter("{q}? {n}", signature="**kwargs")({"q": "why", "n": 2, "spare": None}) == "why? 2"
    assert prompter("{0}{q}", signature="*args,**kwargs")((("a",), {"q": "b"})) == "ab"


def test_a_missing_field_fails_its_row_and_says_what_there_is() -> None:
    """The error lists the record's own keys, also where they cannot be sorted."""
    message = refusal(prompter("{question}", signature="**kwargs")({"quesion": 1, 2: "x"}))
    assert "no 'question'" in message
    assert "'quesion'" in message
    assert "has no '1'" in refusal(prompter("{1}", signature="*args")(("only",)))


# ---------------------------------------------------------------------- context and artifacts


def test_context_fills_its_field() -> None:
    """A text stands as it is, several texts stand under each other, an empty one is a context too."""
    assert prompter("{context}: {input}", context="C")("x") == "C: x"
    assert prompter("{context}: {input}", context=["a", "b"])("x") == "a\nb: x"
    assert prompter("{context}: {input}", context="")("x") == ": x"


def test_context_and_prompt_must_fit_together() -> None:
    """A context that nothing uses, and a prompt without its context, are refused before any row."""
    with pytest.raises(InvalidCall, match="pass context="):
        prompter("{context} {input}")
    with pytest.raises(InvalidCall, match=r"put \{context\} into the prompt"):
        prompter(context="C")
    with pytest.raises(InvalidCall, match="name it in prompt_func"):
        prompter(context="C", prompt_func=lambda x: x)
    with pytest.raises(InvalidCall, match="name it in prompt_func"):
        prompter(context="C", prompt_func=str)


@pytest.mark.parametrize("context", [1, {"a": "b"}, ["a", None], b"bytes"])
def test_a_context_that_is_no_text_is_refused(context: Any) -> None:
    """The error shows the value; a dict is not taken for the list of its keys."""
    with pytest.raises(InvalidCall, match="text or a list of texts") as refused:
        prompter("{context}", context=context)
    assert repr(context) in str(refused.value)


def test_the_calls_context_wins_over_a_column() -> None:
    """`{context}` is the call's, also when records have a field of that name."""
    make = prompter("{context} {q}", signature="**kwargs", context="call")
    assert make({"q": "x", "context": "record"}) == "call x"


def test_artifacts_fill_their_fields_and_data_cannot_replace_them() -> None:
    """`{artifacts.name}` is the artifact's text, even if a record has such a key."""
    make = prompter("{artifacts.rules} {q}", signature="**kwargs", artifacts={"rules": "R", "spare": b"x"})
    assert make({"q": "x", "artifacts.rules": "forged"}) == "R x"


@pytest.mark.parametrize("value", [b"bytes", {"a": 1}, None])
def test_an_artifact_that_is_no_text_is_refused_in_a_template(value: object) -> None:
    """An error that every row would have fails the call, with the artifact's name."""
    with pytest.raises(InvalidCall, match=r"'artifacts\.a'"):
        prompter("{artifacts.a} {input}", artifacts={"a": value})


def test_artifacts_are_read_as_their_datatype(tmp_path: Path) -> None:
    """A path gives text, JSON or bytes."""
    path = tmp_path / "a.json"
    path.write_text('{"ä": [1]}', encoding="utf-8")
    assert load_artifact(str(path), "str") == '{"ä": [1]}'
    assert load_artifact(str(path), "json") == {"ä": [1]}
    assert load_artifact(f"file://{path}", "bytes") == path.read_bytes()


def test_artifacts_come_from_any_filesystem_and_are_read_once() -> None:
    """An fsspec URI works, and a second call does not read it again."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/vllm-tasks-test/once.txt", b"first")
    try:
        assert load_artifact("memory://vllm-tasks-test/once.txt", "str") == "first"
        memory.pipe("/vllm-tasks-test/once.txt", b"second")
        assert load_artifact("memory://vllm-tasks-test/once.txt", "str") == "first"
    finally:
        memory.rm("/vllm-tasks-test", recursive=True)


def test_an_unreadable_artifact_names_itself_and_its_reason(tmp_path: Path) -> None:
    """Absent files, wrong encodings, wrong JSON and unknown protocols are the call's error."""
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff")
    for uri, kind in [
        (str(tmp_path / "absent"), "str"),
        (str(binary), "str"),
        (str(binary), "json"),
        ("nosuch://x", "str"),
    ]:
        with pytest.raises(InvalidCall, match=f"cannot be read as {kind}: .") as refused:
            load_artifact(uri, kind)
        assert repr(uri) in str(refused.value)


# ---------------------------------------------------------------------- prompt_func


def test_prompt_func_gets_the_record_as_the_signature_says() -> None:
    """One value, positions, names, or both."""
    assert prompter(prompt_func=lambda x: f"<{x}>")(1) == "<1>"
    assert prompter(prompt_func=lambda a, b: a + b, signature="*args")(("a", "b")) == "ab"
    assert prompter(prompt_func=lambda a, b: a + b, signature="**kwargs")({"b": "b", "a": "a"}) == "ab"
    both = prompter(prompt_func=lambda a, *, b: a + b, signature="*args,**kwargs")
    assert both((("a",), {"b": "b"})) == "ab"


def test_prompt_func_gets_the_context_and_artifacts_that_it_names() -> None:
    """Both come by keyword, `context` as None when the call has none."""

    def ask(x: str, *, context: str | None, artifacts: dict[str, Any]) -> str:
        return f"{x} {context} {artifacts['a']}"

    assert prompter(prompt_func=ask, context=["c", "d"], artifacts={"a": b"raw"})("x") == "x c\nd b'raw'"
    assert prompter(prompt_func=ask, artifacts={"a": 1})("x") == "x None 1"


def test_prompt_func_with_var_keywords_gets_what_it_names_only() -> None:
    """`**kwargs` takes the record's fields; a context for it must be named."""

    def ask(x: str, **others: Any) -> str:
        return f"{x} {sorted(others)}"

    assert prompter(prompt_func=ask, artifacts={"a": "b"})("x") == "x []"
    assert prompter(prompt_func=ask, signature="**kwargs")({"x": "x", "context": "c"}) == "x ['context']"
    with pytest.raises(InvalidCall, match="name it in prompt_func"):
        prompter(prompt_func=ask, context="c")


def test_a_record_may_have_a_field_called_context() -> None:
    """If the call gives no context, a function's `context` is the record's own field."""

    def ask(question: str, context: str) -> str:
        return f"{context}: {question}"

    records = {"question": "q", "context": "own"}
    assert prompter(prompt_func=ask, signature="**kwargs")(records) == "own: q"
    clash = prompter(prompt_func=ask, signature="**kwargs", context="call")(records)
    assert "multiple values for keyword argument 'context'" in refusal(clash)


def test_prompt_func_may_return_messages() -> None:
    """A list of chat messages is chat, also without `chat=True`."""
    messages = [{"role": "user", "content": "hi"}]
    assert prompter(prompt_func=lambda x: messages)("x") == messages


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "got None"),
        (1, "a int"),
        (b"x", "a bytes"),
        ([], "a list"),
        ({"role": "user", "content": "x"}, "a dict"),
        ([{"content": "no role"}], "a list"),
        (["text"], "a list"),
        ([{"role": "user", "content": b"x"}], "cannot be JSON"),
        ([{"role": "user", "content": float("nan")}], "cannot be JSON"),
        ([{"role": "user", "content": SimpleNamespace()}], "cannot be JSON"),
    ],
)
def test_what_prompt_func_may_not_return_fails_the_row(returned: object, said: str) -> None:
    """Anything but a text or chat messages that JSON can carry is that row's error."""
    assert said in refusal(prompter(prompt_func=lambda x: returned)("x"))


def test_prompt_func_that_raises_fails_its_row_only() -> None:
    """Any exception is an error of its row, with type and message, and the next row is processed."""

    def ask(x: int) -> str:
        return f"{1 / x}"

    make = prompter(prompt_func=ask)
    assert "ZeroDivisionError: division by zero" in refusal(make(0))
    assert make(1) == "1.0"


def test_prompt_func_called_wrongly_fails_the_row() -> None:
    """Arguments that do not fit the function are an error of the row that names them."""
    make = prompter(prompt_func=lambda question: question, signature="**kwargs")
    assert "unexpected keyword argument 'query'" in refusal(make({"query": "x"}))


def test_built_ins_and_unhashable_callables_serve_as_prompt_func() -> None:
    """A function without a readable signature, or without a hash, can still be called."""

    class Ask:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x: str, context: str) -> str:
            return context + x

    assert prompter(prompt_func=str)(12) == "12"
    assert prompter(prompt_func=Ask(), context="c")("x") == "cx"


# ---------------------------------------------------------------------- chat


def test_chat_makes_one_user_message_after_the_system_message() -> None:
    """A text becomes a user message; `system` comes before it."""
    user = {"role": "user", "content": "x"}
    assert prompter(chat=True)("x") == [user]
    assert prompter(chat=True, system="S")("x") == [{"role": "system", "content": "S"}, user]
    assert prompter(chat=True, system="")("x") == [{"role": "system", "content": ""}, user]


@pytest.mark.parametrize("chat", [True, False])
def test_a_list_of_messages_is_always_chat(chat: bool) -> None:
    """Messages pass as they are, images in content parts included, after the system message."""
    parts = [
        {"type": "text", "text": "What is this? {input}"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]
    messages = [{"role": "user", "content": parts}, {"role": "ipython", "content": "any role"}]
    before = json.dumps(messages)
    assert prompter(chat=chat)(messages) == messages
    assert prompter(chat=chat, system="S")(messages) == [{"role": "system", "content": "S"}, *messages]
    assert json.dumps(messages) == before


def test_messages_do_not_fit_into_a_template() -> None:
    """A template around messages would print them; that is refused per row."""
    assert "'input' is a list" in refusal(prompter("Q: {input}")([{"role": "user", "content": "x"}]))


# ---------------------------------------------------------------------- the record is in the prompt


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "Summarize this ticket in one sentence."},
        {"prompt": "Summarize: {{ input }}"},
        {"prompt": ""},
        {"prompt": "{context}"},
        {"prompt": "{artifacts.rules}", "artifacts": {"rules": {"uri": "memory://rules.txt"}}},
        {"prompt": "Summarize: {{title}}", "signature": "**kwargs"},
    ],
)
def test_a_prompt_without_its_record_is_refused(fields: dict[str, Any]) -> None:
    """All rows would get one answer; the error shows how to write a field."""
    with pytest.raises(ValueError, match="uses no field of the record"):
        VllmAPI(identifier="m", api_url="http://x", **fields)
    VllmAPI(identifier="m", api_url="http://x", **{**fields, "prompt_func": str})


@pytest.mark.parametrize(
    ("fields", "columns", "named"),
    [
        ({"signature": "**kwargs", "prompt": "{title}"}, ["title", "text"], "'text'"),
        ({"signature": "*args", "prompt": "{0}"}, ["title", "text"], "'text'"),
        ({"signature": "**kwargs", "prompt": "{a}"}, {"title": "a", "text": "b"}, "'text'"),
        ({"signature": "*args,**kwargs", "prompt": "{0} {b}"}, {"title": 0, "text": "b", "day": 1}, "'day'"),
    ],
)
def test_a_column_that_the_prompt_leaves_out_is_refused(
    fields: dict[str, Any], columns: Any, named: str
) -> None:
    """A table run refuses the column; a record of `predict` may have more fields than the prompt."""
    model = VllmAPI(identifier="m", api_url="http://x", model="x", chat=False, **fields)
    with pytest.raises(InvalidCall, match=f"never uses the columns {named} of X"):
        model.prepare(model.predict_in_db).over(columns)


def test_a_function_gets_the_keywords_that_it_names() -> None:
    """Such keywords count in the fingerprint; other keywords are sampling parameters."""

    def styled(x: str, style: str = "plain", *, context: str | None = None) -> str:
        return f"{style}: {x}"

    model = VllmAPI(identifier="m", api_url="http://x", model="x", chat=False, prompt_func=styled)
    call = model.prepare(model.predict, None, {"style": "formal", "max_tokens": 7})
    (request,) = call.requests(["hello"])
    assert isinstance(request, Request)
    assert (request.prompt, request.sampling) == ("formal: hello", {"max_tokens": 7})
    prints = {
        model.prepare(model.predict, None, given).over("x").fingerprint
        for given in ({}, {"style": "formal"}, {"style": "short"})
    }
    assert len(prints) == 3
    with pytest.raises(InvalidCall, match="did you mean 'style'"):
        model.prepare(model.predict, None, {"stile": "formal"})


def test_a_keyword_may_be_whatever_a_function_may_hold() -> None:
    """Functions as keywords have different fingerprints, and an uncertain one is refused as in a closure."""
    model = VllmAPI(
        identifier="m", api_url="http://x", model="x", chat=False, prompt_func=lambda x, style: style(x)
    )

    def printed(style: Any) -> str:
        return model.prepare(model.predict, None, {"style": style}).over("x").fingerprint

    assert printed(lambda x: x.upper()) != printed(lambda x: x.lower())
    assert printed(str.upper) == printed(str.upper)
    with pytest.raises(InvalidCall, match="the keywords of prompt_func"):
        printed(iter("ab"))


@pytest.mark.parametrize("style", ["", 0, False])
def test_a_keyword_that_is_falsy_is_given(style: Any) -> None:
    """A falsy keyword wins over a field of the record with the same name."""
    fields = {"signature": "**kwargs", "prompt_func": lambda text, style="plain": f"{style}: {text}"}
    model = VllmAPI(identifier="m", api_url="http://x", model="x", chat=False, **fields)  # type: ignore[arg-type]
    call = model.prepare(model.predict, None, {"style": style})
    with pytest.raises(InvalidCall, match="would be given twice"):
        call.over(["text", "style"])
    assert model.prepare(model.predict).requests([{"text": "a", "style": "b"}])[0] == Request("b: a", {})


def test_the_artifacts_are_the_models() -> None:
    """A keyword of that name does not replace the artifacts."""
    model = VllmAPI(identifier="m", api_url="http://x", chat=False, prompt_func=lambda x, artifacts: x)
    with pytest.raises(InvalidCall, match="artifacts"):
        model.prepare(model.predict, None, {"artifacts": {"rules": "none"}})


def test_a_keyword_is_not_both_for_the_function_and_for_vllm() -> None:
    """An ambiguous keyword is refused, but only if the call gives it."""
    model = VllmAPI(
        identifier="m", api_url="http://x", model="x", chat=False, prompt_func=lambda x, n=3: x * n
    )
    assert model.prepare(model.predict).requests(["a"])[0] == Request("aaa", {})
    with pytest.raises(InvalidCall, match="'n' is an argument of prompt_func and a sampling parameter"):
        model.prepare(model.predict, None, {"n": 2})


def test_messages_go_out_as_they_are_given() -> None:
    """No field of a message is added or changed."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":  1.50}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "name": "f", "content": [{"type": "text", "text": "x"}]},
    ]
    sent = prompter(chat=True)(messages)
    assert json.dumps(sent) == json.dumps(messages)


def test_two_system_messages_are_the_rows_error() -> None:
    """Which of them counts is not guessed."""
    rows = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
    assert "remove one of them" in refusal(prompter(chat=True, system="be long")(rows))
    assert prompter(chat=True)(rows) == rows


def test_messages_may_be_json_as_in_a_csv() -> None:
    """Messages are parsed from JSON only with the option; otherwise such a text is a text."""
    rows = [{"role": "user", "content": "hi"}]
    text = json.dumps(rows)
    assert prompter(chat=True)(text) == [{"role": "user", "content": text}]
    read = prompter(chat=True, messages_as_json=True, system="be short")
    assert read(text) == [{"role": "system", "content": "be short"}, *rows]
    assert "is not JSON" in refusal(read("hi"))
    assert "not a list of chat messages" in refusal(read('"hi"'))
    assert read.identity() != prompter(chat=True, system="be short").identity()


@pytest.mark.parametrize(
    "fields",
    [{"prompt": "Sum up: {input}"}, {"prompt_func": str}, {"signature": "**kwargs", "prompt": "{text}"}],
)
def test_messages_that_no_row_can_be_are_refused(fields: dict[str, Any]) -> None:
    """Otherwise the JSON text of the CSV would be sent as a text."""
    with pytest.raises(ValueError, match="messages_as_json=True reads a record that is chat messages"):
        VllmAPI(identifier="m", messages_as_json=True, **fields)


def test_a_column_that_the_call_fills_is_refused() -> None:
    """The column could never be in a prompt."""
    model = VllmAPI(
        identifier="m",
        model="m",
        chat=True,
        api_url="http://x",
        prompt="{context} {text}",
        signature="**kwargs",
    )
    with pytest.raises(InvalidCall, match=r"\['context'\] would be given twice, by X and by the call"):
        model.prepare(model.predict_in_db, "c").over(["context", "text"])


def test_the_first_parameter_is_the_record_whatever_its_name() -> None:
    """The record is the first parameter if a record is one value."""
    for function in (lambda context: context, lambda artifacts: artifacts):
        assert prompter(prompt_func=function)("a") == "a"
    with pytest.raises(InvalidCall, match="nothing uses it"):
        prompter(prompt_func=lambda context: context, context="c")


def test_a_prompt_that_a_function_replaces_does_not_count() -> None:
    """Such a prompt decides nothing, so it is not in the fingerprint."""
    assert prompter("a {input}", prompt_func=str).identity() == prompter(prompt_func=str).identity()
