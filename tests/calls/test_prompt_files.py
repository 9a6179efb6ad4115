"""Prompt files: Jinja templates in a sandbox, with a record's fields as variables."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.calls.prompting import prompter, refusal
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import Artifact, Datalayer, InvalidCall, VllmAPI


def test_fields_are_variables_and_values_have_their_usual_text() -> None:
    """Loops and conditions work, a number has all its digits, and nothing is escaped."""
    goods = "{% for item in goods %}{{ loop.index }}. {{ item }}{{ '\\n' }}{% endfor %}"
    text = goods + "{% if price > 1 %}{{ price }}{% endif %}"
    make = prompter(file=text, signature="**kwargs")
    assert make({"goods": ["a & b", "<c>"], "price": Decimal("12.50")}) == "1. a & b\n2. <c>\n12.50"
    assert prompter(file="Say {{ input }}\n")("x") == "Say x"


def test_context_and_artifacts_are_variables() -> None:
    """An artifact is its value, so a list can be walked."""
    text = "{{ context }}:{% for rule in artifacts.rules %} {{ rule }}{% endfor %} {{ input }}"
    make = prompter(file=text, context="C", artifacts={"rules": ["r", "s"]})
    assert make("x") == "C: r s x"


@pytest.mark.parametrize(
    ("text", "record", "said"),
    [
        ("{{ q }}{{ w }}", {"q": "x"}, "UndefinedError: 'w' is undefined"),
        ("{{ q }}", {"q": None}, "is None, not a text"),
        ("{{ q.a.b }}", {"q": {}}, "has no attribute 'a'"),
        ("{{ q.__class__.__mro__ }}", {"q": "x"}, "SecurityError: access to attribute '__class__'"),
        ("{{ q.append(1) }}", {"q": []}, "SecurityError"),
        ("{{ 1 / q }}", {"q": 0}, "ZeroDivisionError"),
    ],
)
def test_what_cannot_be_filled_is_an_error_of_its_row(text: str, record: Any, said: str) -> None:
    """A missing field, a value without a text, and whatever leads out of the sandbox."""
    assert said in refusal(prompter(file=text, signature="**kwargs")(record))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% if %}{{ input }}", "is no Jinja template"),
        ("Say something", "uses no field of the record"),
        ("{{ range(3) | list }}{{ context }}", "uses no field of the record"),
        ("{{ input }}{{ title }}", "uses ['title'], but with signature='singleton'"),
        ("{% include 'other.j2' %}{{ input }}", "includes, imports or extends another file"),
        ("{{ artifacts.rules }}{{ input }}", "uses artifacts ['rules'], but artifacts has []"),
        ("{{ [1, 2] | random }}{{ input }}", "No filter named 'random'"),
    ],
)
def test_what_fits_no_row_is_refused(text: str, said: str) -> None:
    """Before any row is sent, with the way out."""
    with pytest.raises(InvalidCall, match=re.escape(said)):
        prompter(file=text, context="C" if "context" in text else None)


def test_the_columns_of_a_table_are_its_variables() -> None:
    """One that the file does not use, or does not get, is refused."""
    make = prompter(file="{{ a }}{% if b is defined %}{{ b }}{% endif %}", signature="**kwargs")
    make.check_fields({"a": "a", "b": "b"})
    with pytest.raises(InvalidCall, match=re.escape("the prompt uses {{ b }}, and X does not give it")):
        make.check_fields({"a": "a"})
    with pytest.raises(InvalidCall, match=re.escape("the prompt file never uses the columns 'c' of X")):
        make.check_fields({"a": "a", "b": "b", "c": "c"})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "Say {input}"}, "takes the place of prompt"),
        ({"prompt_func": str.upper}, "takes the place of prompt"),
        ({"messages_as_json": True}, "takes the place of prompt"),
        ({"signature": "*args"}, "have names"),
        ({"prompt_file": "s3://user:secret@bucket/p.j2"}, "has a password"),
    ],
)
def test_fields_that_exclude_each_other_are_refused(fields: dict[str, Any], said: str) -> None:
    """When the model is made."""
    with pytest.raises(ValidationError, match=said) as refused:
        VllmAPI(**{"identifier": "m", "prompt_file": "p.j2", **fields})
    assert "secret" not in str(refused.value)


def test_a_file_counts_by_its_contents(tmp_path: Path, server: ScriptedServer) -> None:
    """Another place of the same file reruns nothing, another text every row."""
    (tmp_path / "rows.csv").write_text("id,text\n1,a\n2,b\n")
    for name, text in (("p.j2", "Say {{ text }}"), ("same.j2", "Say {{ text }}"), ("other.j2", "{{ text }}")):
        (tmp_path / name).write_text(text)
    db = Datalayer(url=str(tmp_path))

    def processed(name: str, **options: Any) -> int:
        model = VllmAPI(
            identifier="m", api_url=server.url, prompt_file=str(tmp_path / name), signature="**kwargs"
        )
        return model.predict_in_db("text", "rows", db=db, **options).processed

    assert [processed("p.j2"), processed("same.j2"), processed("other.j2")] == [2, 0, 2]
    assert sorted(asked.prompt for asked in server.posts) == ["Say a", "Say b", "a", "b"]


def test_a_file_must_be_in_an_allowed_place(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As artifacts must; a missing one is reported by its name."""
    (tmp_path / "p.j2").write_text("{{ input }}{{ artifacts.a }}")
    (tmp_path / "a.txt").write_text("A")
    fields: dict[str, Any] = {
        "identifier": "m",
        "api_url": server.url,
        "artifacts": {"a": Artifact(uri=str(tmp_path / "a.txt"))},
    }
    missing = VllmAPI(prompt_file=str(tmp_path / "none.j2"), **fields)
    with pytest.raises(InvalidCall, match=r"prompt_file '.*none.j2' cannot be read"):
        missing.predict("x")
    model = VllmAPI(prompt_file=str(tmp_path / "p.j2"), **fields)
    with model:
        assert model.predict("x") == " xA!"
    monkeypatch.setenv("VLLM_TASKS_PLACES", '["/nowhere"]')
    with pytest.raises(InvalidCall, match="outside the places"):
        VllmAPI(prompt_file=str(tmp_path / "p.j2"), **{**fields, "artifacts": {}}).predict("x")
