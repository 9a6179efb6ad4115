"""Records become prompts: signatures, context, artifacts, functions, chat."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from tests.calls.prompting import prompter, refusal
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import VllmAPI
from vllm_tasks.calls.prompt_func import call_arguments
from vllm_tasks.calls.prompts import load_artifact
from vllm_tasks.errors import InvalidCall, Terminated

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


def test_artifacts_come_from_any_filesystem_and_are_read_again_when_they_changed() -> None:
    """An fsspec URI works, and a call sees what has been written since the last one."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/vllm-tasks-test/once.txt", b"first")
    try:
        assert load_artifact("memory://vllm-tasks-test/once.txt", "str") == "first"
        memory.pipe("/vllm-tasks-test/once.txt", b"second")
        assert load_artifact("memory://vllm-tasks-test/once.txt", "str") == "second"
    finally:
        memory.rm("/vllm-tasks-test", recursive=True)


def test_a_prompt_file_is_read_again_when_it_has_changed(tmp_path: Path, server: ScriptedServer) -> None:
    """Its new text is sent and counts, by the same model in the same process; also with its old time."""
    path = tmp_path / "p.j2"
    (tmp_path / "t.csv").write_text("id,text\n1,x\n")
    prints = set()
    with VllmAPI(identifier="m", api_url=server.url, prompt_file=str(path)) as model:
        for text in ("one {{ input }}", "two {{ input }}"):
            path.write_text(text)
            os.utime(path, (1_700_000_000, 1_700_000_000))
            report = model.predict_in_db("text", "t", db=str(tmp_path))
            prints.add(report.fingerprint)
            assert report.processed == 1
    assert len(prints) == 2


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


class PanicException(BaseException):
    """As a library in Rust raises it: by this name, and no `Exception`."""


@pytest.mark.parametrize("error", [SystemExit("no"), PanicException("no")])
def test_prompt_func_that_would_end_the_call_fails_its_row_only(error: BaseException) -> None:
    """`sys.exit()` in a function, and a panic of a library in Rust, are errors of their row."""

    def ask(x: str) -> str:
        if x == "bad":
            raise error
        return x

    make = prompter(prompt_func=ask)
    assert refusal(make("bad")) == f"prompt_func raised {type(error).__name__}: no"
    assert make("good") == "good"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Terminated(143), asyncio.CancelledError()])
def test_what_interrupts_prompt_func_ends_the_call(error: BaseException) -> None:
    """Ctrl-C, SIGTERM and a cancellation may arrive while the function runs."""

    def ask(x: str) -> str:
        raise error

    with pytest.raises(type(error)):
        prompter(prompt_func=ask)("x")


def test_prompt_func_that_returns_a_coroutine_is_refused() -> None:
    """It is a mistake in the call, which every row would have as its error."""

    async def ask(x: str) -> str:
        return x

    with pytest.raises(InvalidCall, match="returns a coroutine"):
        prompter(prompt_func=lambda x: ask(x))("x")


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
