"""Prompt files: Jinja templates in a sandbox, with a record's fields as variables."""

from __future__ import annotations

import re
import tracemalloc
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.calls.prompting import prompter, refusal
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import Artifact, Datalayer, InvalidCall, VllmAPI
from vllm_tasks.calls import sandbox


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


class Table:
    """A value of a user's, whose methods do anything, as those of a data frame."""

    rows = 2

    def to_csv(self, path: str) -> None:
        Path(path).touch()


def test_methods_of_plain_values_alone_can_be_called(tmp_path: Path) -> None:
    """Those of numpy and of a user's classes write files, and a template may not; it may read attributes."""
    call = "{{ q.rows }}{{ q.to_csv(path) }}"
    values = {"q": Table(), "path": str(tmp_path / "evil")}
    assert "not safely callable" in refusal(prompter(file=call, signature="**kwargs")(values))
    for name, value in {"tofile": np.arange(3), "dump": np.float64(1)}.items():
        make = prompter(file=f"{{{{ q.{name}(path) }}}}", signature="**kwargs")
        assert "not safely callable" in refusal(make({**values, "q": value}))
    assert not [*tmp_path.iterdir()]
    plain = "{{ q.upper() }} {{ '{:.1f}'.format(n) }} {{ d.strftime('%Y') }} {{ '%d' % n }} {{ q ~ n }}"
    make = prompter(file=plain, signature="**kwargs")
    assert make({"q": "a", "n": 2, "d": datetime(2024, 1, 2, tzinfo=UTC)}) == "A 2.0 2024 2 a2"
    assert (
        prompter(file="{{ input | tojson }} {{ input | join('-') }} {{ input | sum }}")([1, 2])
        == "[1, 2] 1-2 3"
    )


NESTED = "{% set x = [['a' * 999] * 9999] * 9999 %}"
GROWTH = "{% set ns = namespace(x='a' * 999) %}{% for i in range(60) %}%s{% endfor %}{{ ns.x | length }}"


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * q }}",
        "{{ q * [0] }}",
        "{{ 9 ** q }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (q, 1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{n}}'.format(1, n=q) }}",
        "{{ '%1000000000d' | format(1) }}",
        *(f"{{{{ 'a' | {name}(q) | list }}}}" for name in ("center", "indent", "slice", "batch")),
        *(f"{{{{ 'a'.{name}(q) }}}}" for name in ("ljust", "rjust", "zfill", "expandtabs")),
        "{{ ['a'] | map('center', q) | list }}",
        "{{ 1.5 | round(q) }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 100000) }}",
        "{{ ('a' * 1000000).replace('a', 'b' * 100000) }}",
        "{{ (['a' * 1000000] * 1000) | join }}",
        "{{ ('a' * 1000000).join([''] * 1000) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}a long text{% endfor %}{% endfor %}",
        "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n else 'a' * 999 }}{% endmacro %}{{ m(60) }}",
        *(
            f"{NESTED}{{{{ x | {name} }}}}"
            for name in ("string", "tojson", "pprint", "upper", "replace('1', '2')")
        ),
        *(f"{NESTED}{{{{ {made} }}}}" for made in ("x ~ ''", "[x] | join", "'%s' % (x,)", "'{}'.format(x)")),
        "{{ ('{0}' * 9999).format('a' * 99999) }}",
        "{{ ('{a}' * 9999).format_map({'a': 'a' * 99999}) }}",
        "{{ ('%(a)s' * 9999) % {'a': 'a' * 99999} }}",
        "{{ ('%(a)s' * 9999) | format(a='a' * 99999) }}",
        "{{ ([[0] * 400000] * 400000) | sum(start=[]) | length }}",
        GROWTH.replace("%s", "{% set ns.x = ns.x + ns.x %}"),
        GROWTH.replace("%s", "{% set ns.x = ns.x ~ ns.x %}"),
        GROWTH.replace("%s", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    ],
)
def test_what_a_template_makes_is_bounded(text: str) -> None:
    """A row with a large number in it is an error of its row, before the memory is taken."""
    tracemalloc.start()
    said = refusal(prompter(file=f"{text}{{{{ q }}}}", signature="**kwargs", longest=2**22)({"q": 10**9}))
    assert re.search("larger than [0-9,]+, which is allowed", said)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(q) %}{% for j in range(q) %}{% endfor %}{% endfor %}",
        "{% for i in range(q) %}{% for j in range(q) if j < 0 %}{% endfor %}{% endfor %}",
        "{% for i in range(q) %}{% set x = range(q) | sum %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
        "{% for i in range(9) recursive %}{% if loop.depth < 9 %}{{ loop(range(9)) }}{% endif %}{% endfor %}",
    ],
)
def test_a_template_ends(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops in loops and macros that call themselves end after seconds of CPU, as an error of the row."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    make = prompter(file=f"{text}{{{{ q }}}}", signature="**kwargs")
    assert "took more than 0 s of CPU for this row" in refusal(make({"q": 99_999}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ " + "(" * 20_000 + "input" + ")" * 20_000 + " }}", "too deeply"),
        ("{% if 1 %}" * 3_000 + "{% endif %}" * 3_000, "too deeply"),
        ("{% if %}{{ input }}", "is not a Jinja template"),
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
