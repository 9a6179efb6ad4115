"""Any input from outside becomes a value, a row's error or a refused call.

Few examples, always the same, are run here; `FUZZ_EXAMPLES=5000 pytest tests/datalayer/test_fuzz.py` runs
that many new ones of each. Inputs that once broke something stay as an `@example`.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.servers.scripted_server import Reply, ScriptedServer, answer_to
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.artifacts import asset_key, cell, slug, words
from vllm_tasks.calls.answers import Decoder
from vllm_tasks.calls.prompts import Prompter
from vllm_tasks.calls.template import Template
from vllm_tasks.engines.http.urls import split_urls
from vllm_tasks.places import has_password, without_secrets
from vllm_tasks.printable import printable
from vllm_tasks.rows import Choice, Completion, RowError
from vllm_tasks.tables import predict_in_db

LONG = "FUZZ_EXAMPLES" in os.environ
HOW = {
    "deadline": None,
    "derandomize": not LONG,
    "suppress_health_check": list(HealthCheck),
    "database": None,
}


def fuzz(few: int) -> Callable[..., Any]:
    """`few` examples that are always the same, or the number of new ones that the environment gives."""
    return settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", few)), **HOW)


HUGE = "<an integer that Python refuses to write>"
any_text = st.text(st.characters(codec=None), max_size=20)
numbers = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63) - 1, 10**400, 1e308, 5e-324, -0.0])
json_values = st.recursive(
    st.none() | st.booleans() | numbers | any_text | st.just(HUGE),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)

# ---------------------------------------------------------------------- answers of servers


@pytest.fixture(scope="module")
def far_side() -> Iterator[ScriptedServer]:
    """One server for all examples."""
    with ScriptedServer() as server:
        yield server


def written(value: Any) -> bytes:
    """JSON of a value, constants that only Python knows and numbers that it does not read among it."""
    text = json.dumps(value).replace(json.dumps(HUGE), "9" * 5000)
    return text.encode("utf-8", "surrogatepass")


choices = st.fixed_dictionaries(
    {},
    optional={
        "index": numbers | st.just(0),
        "text": any_text | json_values,
        "message": json_values | st.fixed_dictionaries({"content": any_text | json_values}),
        "finish_reason": st.sampled_from(["stop", "length", None, 3]) | any_text,
        "token_ids": json_values | st.lists(numbers),
        "logprobs": json_values,
        "reasoning": json_values,
    },
)
answers = json_values | st.fixed_dictionaries(
    {},
    optional={
        "text": json_values | st.lists(any_text | any_text.map(lambda t: "P" + t), max_size=3),
        "choices": json_values | st.lists(choices, max_size=3),
        "usage": json_values
        | st.fixed_dictionaries({"prompt_tokens": numbers, "completion_tokens": numbers}),
        "model": json_values | any_text,
        "prompt_logprobs": json_values,
    },
)
bodies = st.one_of(
    answers.map(written),
    st.tuples(answers.map(written), st.integers(0, 60)).map(lambda cut: cut[0][: cut[1]]),
    st.binary(max_size=60),
    st.integers(1, 200_000).map(lambda n: b"[" * n),
    st.integers(1, 50_000).map(lambda n: b'{"choices":' * n),
    st.sampled_from(
        [b"NaN", b'{"choices": [{"text": "\\ud800"}]}', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"1e999"]
    ),
)


@fuzz(25)
@given(path=st.sampled_from(["/generate", "/v1/completions", "/v1/chat/completions"]), body=bodies)
def test_any_body_is_an_answer_or_a_row_error(far_side: ScriptedServer, path: str, body: bytes) -> None:
    """Any bytes may arrive over a real connection with status 200."""
    far_side.script = lambda asked: Reply(body) if asked.path == path else None
    model = VllmAPI(identifier="m", api_url=far_side.url + path, model="m", retries=0)
    (result,) = model.completions(["P"], on_error="return")
    assert isinstance(result, Completion) or result.kind == "response"
    if isinstance(result, Completion):
        json.dumps(result.text, ensure_ascii=False).encode()


@fuzz(10)
@given(body=bodies, status=st.sampled_from([200, 201, 204, 400, 404, 418, 500]))
def test_any_answer_to_a_control_call_is_a_name_or_a_refused_call(
    far_side: ScriptedServer, body: bytes, status: int
) -> None:
    """A server either reports its model, or the call reports that it does not."""
    assume(status < 500)
    far_side.script = lambda asked: Reply(body, status) if asked.path == "/v1/models" else None
    model = VllmAPI(identifier="m", api_url=far_side.url, retries=0, max_in_flight=1 + len(body) % 7)
    try:
        (result,) = model.completions(["P"], on_error="return")
    except InvalidCall:
        return
    finally:
        model.close()
    assert isinstance(result, Completion | RowError)


@fuzz(15)
@given(body=bodies, status=st.sampled_from([201, 204, 206, 400, 413, 422]))
def test_any_refusal_is_a_row_error(far_side: ScriptedServer, body: bytes, status: int) -> None:
    """The error may have any text."""
    far_side.script = lambda asked: Reply(body, status) if asked.path == "/v1/completions" else None
    model = VllmAPI(identifier="m", api_url=far_side.url, model="m", retries=0)
    (result,) = model.completions(["P"], on_error="return")
    assert isinstance(result, RowError)
    str(result).encode()


# ---------------------------------------------------------------------- prompts

records = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | any_text
    | st.binary(max_size=5)
    | st.decimals()
    | st.dates()
    | st.datetimes()
    | st.times()
    | st.uuids()
    | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.sampled_from(["role", "content", "a", "0", "input"]) | any_text | st.integers(),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
templates = any_text | st.lists(
    st.sampled_from(
        [
            "{input}",
            "{0}",
            "{a}",
            "{{",
            "}}",
            "{",
            "}",
            "{a!r}",
            "{a:>9}",
            "{a.b}",
            "{a[0]}",
            "{context}",
            "x",
        ]
    ),
    max_size=4,
).map("".join)


@fuzz(100)
@given(
    template=templates,
    record=records,
    chat=st.booleans(),
    signature=st.sampled_from(["singleton", "*args", "**kwargs", "*args,**kwargs"]),
)
def test_any_template_and_record_are_a_prompt_or_an_error(
    template: str, record: Any, chat: bool, signature: Any
) -> None:
    """A template is refused or filled, and its result can be sent."""
    try:
        Template.parse(template)
        make = Prompter(
            prompt=template,
            prompt_func=None,
            signature=signature,
            chat=chat,
            system=None,
            artifacts={},
            context=None,
        )
    except ValueError:  # InvalidCall among it
        return
    made = make(record)
    if isinstance(made, RowError):
        assert made.kind == "prompt"
    else:
        json.dumps(made, allow_nan=False, ensure_ascii=False).encode()


@fuzz(30)
@given(fields=st.dictionaries(st.sampled_from(sorted(VllmAPI.model_fields)), json_values, max_size=3))
def test_any_fields_are_a_model_or_a_validation_error(fields: dict[str, Any]) -> None:
    """Fields come as a form in the UI or a saved block may give them; the error can be written down."""
    try:
        VllmAPI(**{"identifier": "m", **fields})
    except ValidationError as error:
        str(error).encode("utf-8", "backslashreplace")
    except InvalidCall:
        pass


# ---------------------------------------------------------------------- what answers are decoded to

names = st.sampled_from(["a", "b", "_x", "A", "é", "a b"]) | any_text
schemas = st.deferred(
    lambda: st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(
                ["object", "array", "string", "integer", "number", "boolean", "null", "x"]
            )
            | st.lists(st.sampled_from(["string", "null", "integer"]), max_size=3),
            "properties": st.dictionaries(names, schemas, max_size=3),
            "required": st.lists(names, max_size=2),
            "additionalProperties": st.booleans() | schemas,
            "items": schemas | st.booleans(),
            "enum": st.lists(json_values, max_size=3),
            "const": json_values,
            "anyOf": st.lists(schemas, max_size=2),
            "allOf": st.lists(schemas, max_size=2),
            "oneOf": st.lists(schemas, max_size=2),
            "not": schemas,
            "$ref": st.sampled_from(["#", "#/$defs/A", "#/properties/a", "http://127.0.0.1:1/x", "x", ""]),
            "$defs": st.fixed_dictionaries({"A": schemas}),
            "$schema": st.sampled_from(["http://json-schema.org/draft-07/schema#", "x"]),
            "multipleOf": numbers,
            "maximum": numbers,
            "minLength": numbers,
            "uniqueItems": st.booleans(),
            "pattern": st.sampled_from(["^a+$", "(", ""]),
            "format": st.sampled_from(["date", "email", "ipv4", "regex", "uri", "x"]),
            "patternProperties": st.dictionaries(st.sampled_from(["^a", "("]), schemas, max_size=1),
            "if": schemas,
            "then": schemas,
        },
    )
)
columns = st.dictionaries(
    names, st.sampled_from(["str", "int", "float", "bool", "json", "bytes"]), max_size=3
)
texts = (
    json_values.map(lambda v: written(v).decode("utf-8", "surrogatepass"))
    | any_text
    | st.integers(1, 2000).map(lambda n: "[" * n + "]" * n)
    | st.sampled_from(
        ["1.0", "1e400", "-0", "NaN", "Infinity", "9" * 5000, '{"a": 1, "a": 2}', '"\\ud800"', "\ufeff1"]
    )
)


@fuzz(60)
@given(
    schema=schemas | columns,
    text=texts,
    flatten=st.booleans(),
    many=st.booleans(),
)
@example(schema={"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, text="1", flatten=False, many=False)
@example(
    schema={
        "type": "array",
        "items": {"oneOf": [{"$ref": "#/items"}, {"$ref": "#/items"}, {"type": "string"}]},
    },
    text='["a"]',
    flatten=True,
    many=False,
)
def test_any_schema_and_answer_are_values_or_an_error(
    schema: dict[str, Any], text: str, flatten: bool, many: bool
) -> None:
    """A schema is refused, or each answer is a value of it or an error of its row; rows fit the columns."""
    assume("http" not in str(schema.get("$ref")))
    try:
        decoder = Decoder.of(None, schema, flatten, many)
    except InvalidCall:
        return
    completion = Completion((Choice(text), Choice(text)) if many else (Choice(text),))
    value = decoder.values(completion)
    rows = decoder.rows(completion)
    if isinstance(value, RowError):
        assert isinstance(rows, RowError)
    elif not isinstance(rows, RowError):
        assert all(len(row) == len(decoder.columns) for row in rows)
        json.dumps(value, allow_nan=False)


@fuzz(60)
@given(
    kind=st.sampled_from(["str", "int", "float", "bool", "json", "bytes"]), text=texts, flatten=st.booleans()
)
def test_any_answer_of_a_builtin_type_is_a_value_or_an_error(kind: Any, text: str, flatten: bool) -> None:
    """Numbers of any length, half characters, depth."""
    try:
        decoder = Decoder.of(kind, None, flatten, many=False)
    except InvalidCall:
        return
    rows = decoder.rows(Completion((Choice(text),)))
    if not isinstance(rows, RowError):
        assert all(len(row) == 1 for row in rows)


# ---------------------------------------------------------------------- keys

KEYS: dict[str, tuple[Any, pa.DataType]] = {
    "text": (
        st.text(max_size=6) | st.sampled_from(["", "\0", "a\0", "é", "é", "1", " 1", "NULL", "ß", "SS"]),
        pa.string(),
    ),
    "int": (st.integers(-(2**63), 2**63 - 1), pa.int64()),
    "unsigned": (st.integers(0, 2**64 - 1), pa.uint64()),
    "decimal": (st.decimals(-(10**10), 10**10, places=3), pa.decimal128(20, 3)),
    "date": (st.dates(), pa.date32()),
    "time": (st.datetimes(), pa.timestamp("us")),
    "zoned": (st.datetimes(timezones=st.just(dt.UTC)), pa.timestamp("us", "UTC")),
    "bool": (st.booleans(), pa.bool_()),
    "bytes": (st.binary(max_size=4), pa.binary()),
    "float": (st.floats(allow_nan=True), pa.float64()),
}
typed_keys = st.sampled_from(sorted(KEYS)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(KEYS[kind][0], min_size=1, max_size=6, unique=True))
)


def asked_and_kept(far_side: ScriptedServer, db: str, texts: list[str]) -> list[dict[str, Any]] | None:
    """Run over the table `rows` twice: the outputs, or None for a refused call. The rerun sends nothing."""
    far_side.script = lambda _: None
    with VllmAPI(identifier="m", api_url=far_side.url, model="m") as model:
        try:
            first = predict_in_db(model, "text", "rows", db=db)
        except InvalidCall:
            return None
        assert first.succeeded == len(texts)
        again = predict_in_db(model, "text", "rows", db=db)
        assert again.processed == 0
    from vllm_tasks import Datalayer

    return Datalayer(url=db).outputs("m").to_pylist()


@fuzz(12)
@given(case=typed_keys)
@example(case=("text", ["é", "é", "", "\0", "a\0", "1"]))
@example(case=("time", [dt.datetime.min, dt.datetime.max]))
@example(case=("date", [dt.date.min, dt.date.max]))
@example(case=("unsigned", [0, 2**64 - 1]))
def test_keys_of_a_lake_stay_what_they_are(far_side: ScriptedServer, case: tuple[str, list[Any]]) -> None:
    """Two keys never become one, nor one two, in any type; each has the answer of its own row."""
    kind, keys = case
    texts = [f"t{i}" for i in range(len(keys))]
    with tempfile.TemporaryDirectory() as folder:
        table = pa.table({"id": pa.array(keys, KEYS[kind][1]), "text": texts})
        pq.write_table(table, Path(folder) / "rows.parquet")
        found = asked_and_kept(far_side, folder, texts)
    if found is None:
        assert kind == "float" or any("\0" in key for key in keys if isinstance(key, str)) or kind == "bytes"
        return
    expected = {(_plain(key), answer_to(text)) for key, text in zip(keys, texts, strict=True)}
    assert {(_plain(row["id"]), row["output"]) for row in found} == expected
    assert len(found) == len(keys)


def _plain(key: Any) -> Any:
    return int(key) if isinstance(key, Decimal) and key == key.to_integral_value() else key


mixed_keys = st.lists(
    st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=6)
    | st.binary(max_size=4)
    | st.sampled_from(["", "1", 1, b"1", "a\0", "é", "é", 2**53, float(2**53 + 2), "NaN", 1e308]),
    min_size=1,
    max_size=6,
)


@fuzz(15)
@given(keys=mixed_keys, declared=st.sampled_from(["", "TEXT", "INTEGER", "BLOB", "NUMERIC"]))
@example(keys=[1, "1", b"1", "é", "é", "", b"", "a\0", "a"], declared="")
def test_keys_of_sqlite_stay_what_they_are(far_side: ScriptedServer, keys: list[Any], declared: str) -> None:
    """Any value may stand in any column, and keys that SQLite distinguishes stay distinct."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.db"
        connection = sqlite3.connect(file)
        connection.execute(f"CREATE TABLE rows (id {declared} NOT NULL UNIQUE, text TEXT)")
        for i, key in enumerate(keys):
            connection.execute("INSERT OR IGNORE INTO rows VALUES (?, ?)", (key, f"t{i}"))
        connection.commit()
        there = connection.execute("SELECT typeof(id), id, text FROM rows").fetchall()
        found = asked_and_kept(far_side, f"sqlite:///{file}", [row[2] for row in there])
        if found is not None:
            kept = connection.execute('SELECT typeof(id), id, output FROM "_outputs__m"').fetchall()
            assert {(t, k, o) for t, k, o in kept} == {(t, k, answer_to(x)) for t, k, x in there}
            assert len(kept) == len(there)
        connection.close()


# ---------------------------------------------------------------------- what is shown

visible = st.text(
    st.characters(min_codepoint=33, exclude_categories=("Cs", "Zs", "Cc")), min_size=6, max_size=12
)


@fuzz(100)
@given(user=visible, password=visible, rest=st.sampled_from(["", "/x", "/x?q=1", ":80/a"]))
@example(user="u", password="a/b@c'd", rest="")
@example(user="u", password="#p?w@ss", rest="/x")
def test_no_part_of_a_password_is_shown(user: str, password: str, rest: str) -> None:
    """Raw or escaped as it should be; `/`, `@`, `#` and quotes in it do not end it."""
    assume(":" not in user and "/" not in user and "@" not in user and "?" not in user and "#" not in user)
    for secret in (password, quote(password, safe="")):
        uri = f"s3://{user}:{secret}@host{rest}"
        shown = without_secrets(f"cannot read '{uri}'")
        assert has_password(uri)
        assert not any(
            secret[i : i + 4] in shown.replace("cannot read", "") for i in range(len(secret) - 3)
        ) or any(secret[i : i + 4] in f"s3://host{rest}..." for i in range(len(secret) - 3))


@fuzz(100)
@given(text=any_text)
def test_any_name_is_shown_and_is_a_key(text: str) -> None:
    """Names of artifacts and assets can be rendered in cells and logs."""
    assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", slug(text))
    assert re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s'\"#?%<>\[\]{}|^`\\]*", asset_key(text))
    for shown in (cell(text), words(text), printable(text)):
        shown.encode()
        assert "\x1b" not in shown
        assert "\n" not in shown


@fuzz(60)
@given(url=any_text | any_text.map(lambda t: "http://" + t) | st.lists(any_text, max_size=3))
@example(url="http://[")
@example(url="http://h:99999999999")
def test_any_url_is_servers_or_a_refused_call(url: Any) -> None:
    """URLs come in one text, with commas, or in a list."""
    try:
        bases, protocol = split_urls(url)
    except InvalidCall:
        return
    assert all(str(base).startswith(("http://", "https://")) for base in bases)
    assert protocol in ("legacy", "completions", "chat", "openai")
