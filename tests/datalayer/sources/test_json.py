"""JSON as a source: values come as in the file; a bad line affects only itself."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from tests.datalayer.sources.text_files import Write, lines, read, sql
from vllm_tasks.datalayer.sources.jsonl import JsonLines
from vllm_tasks.datalayer.sources.read_options import read_options
from vllm_tasks.errors import InvalidCall


def test_values_are_those_of_their_line(write: Write) -> None:
    rows = [
        '{"id": 1, "x": 12.50, "d": "2024-01-01"}',
        '{"id": 2, "x": 123456789012345678901234567890, "d": "01/02/2024"}',
        '{"id": 3, "x": [{"a": 1}, {"b": null}]}',
        '{"id": 4, "x": {"z": 1, "a": 3.14159265358979323846}, "late": true}',
        '{"id": 5, "x": "6ba7b810-9dad-11d1-80b4-00c04fd430c8"}',
        '{"id": 6, "x": NaN}',
        '{"id": 7, "x": 1, "x": 1e5}',
        '{"id": 8, "x": null}',
    ]
    source = JsonLines([write("t.jsonl", lines(rows))])
    assert source.columns() == ["id", "x", "d", "late"]
    found = read(source, ["x", "d", "late"])[0]
    texts = {k: str(v[0]) for k, v in found.items()}
    assert texts[1] == "12.50"
    assert texts[2] == "123456789012345678901234567890"
    assert found[3] == ([{"a": 1}, {"b": None}], None, None)
    assert list(found[4][0]) == ["z", "a"]
    assert str(found[4][0]["a"]) == "3.14159265358979323846"
    assert found[4][2] is True
    assert texts[5] == "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    assert math.isnan(found[6][0])
    assert texts[7] == "1e5"
    assert found[8][0] is None
    assert found[2][1] == "01/02/2024"


BAD = {
    "cut": '{"id": 7, "text": "cu',
    "no object": "[1, 2]",
    "a number": "7",
    "two": '{"id": 7} {"id": 8}',
    "deep": '{"id": 7, "text": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "no key": '{"text": "x"}',
    "null key": '{"id": null, "text": "x"}',
    "text as key": '{"id": "7", "text": "x"}',
    "float as key": '{"id": 7.0, "text": "x"}',
    "bool as key": '{"id": true, "text": "x"}',
    "list as key": '{"id": [7], "text": "x"}',
    "digits": '{"id": ' + "7" * 50 + ', "text": "x"}',
    "too many digits for Python": '{"id": ' + "7" * 5000 + ', "text": "x"}',
    "control character": '{"id": 7, "text": "a\x01b"}',
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_costs_itself(write: Write, bad: str) -> None:
    rows = [{"id": i, "text": f"t{i}"} for i in range(21_000)]
    content = lines([*rows[:20_600], BAD[bad], *rows[20_601:]])
    source = JsonLines([write("t.jsonl", content)])
    found, errors, unreadable = read(source)
    assert found.keys() == set(range(21_000)) - {20_600}
    assert found[20_999] == "t20999"
    assert not errors
    assert unreadable.count == 1
    assert unreadable.examples[0].startswith("t.jsonl, line 20601: ")
    assert len(unreadable.examples[0]) < 250
    if "as key" in bad:
        assert "CAST(" in unreadable.examples[0]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_numbers_of_any_length_are_kept(write: Write, name: str) -> None:
    """Python converts no more than 4,300 digits; a longer number costs no row."""
    long = "7" * 5000
    objects = [f'{{"id": 1, "x": {long}}}', f'{{"id": 2, "x": "b", "y": {long}}}', '{"id": 3, "x": "c"}']
    source = JsonLines([write(name, "\n".join(objects) if name == "t.jsonl" else f"[{','.join(objects)}]")])
    found, _, unreadable = read(source, ["x"])
    assert {key: str(value) for key, value in found.items()} == {1: long, 2: "b", 3: "c"}
    assert unreadable.count == 0
    assert sql(source, ["id", "x"], "SELECT CAST(x.other AS VARCHAR) FROM t WHERE id = 1") == [(long,)]


def test_half_a_character_and_wrong_bytes_stay_in_their_row(write: Write) -> None:
    content = b'{"id": "1", "text": "cut \\ud83d"}\n{"id": "2", "text": "\xff"}\n{"id": "3", "text": "c"}\n'
    content += b'{"id": "4\\ud83d", "text": "d"}\n{"id": "\xff", "text": "d"}\n'
    source = JsonLines([write("t.jsonl", content)])
    found, _, unreadable = read(source)
    assert found == {"1": "cut \ud83d", "2": "\udcff", "3": "c"}
    assert [e.split(":")[0] for e in unreadable.examples] == ["t.jsonl, line 4", "t.jsonl, line 5"]
    assert sql(source, ["text"], "SELECT text FROM t ORDER BY text") == [("c",), ("d",), ("d",)]
    assert source.left_out.count == 2


def test_bom_blank_lines_and_line_ends(write: Write) -> None:
    content = b'\xef\xbb\xbf{"id": 1, "text": "a"}\r\n\r\n  \n{"id": 2, "text": "\xe2\x80\xa8b"}'
    content += b'\n{"id": 3, "text": "c"}'
    found, _, unreadable = read(JsonLines([write("t.jsonl", content)]))
    assert (found, unreadable.count) == ({1: "a", 2: "\u2028b", 3: "c"}, 0)
    assert JsonLines([write("t.jsonl", "")]).columns() == []


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-8-sig", "utf-16-be"])
def test_encodings_of_json(write: Write, encoding: str) -> None:
    file = write("t.jsonl", '{"id": 1, "text": "é"}\n{"id": 2, "text": "b"}\n'.encode(encoding))
    assert read(JsonLines([file], read_options("t", {"encoding": encoding})))[0] == {1: "é", 2: "b"}


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([1, 2], pa.int64()),
        ([2**63 - 1, -(2**63)], pa.int64()),
        ([1, 2**63], pa.decimal128(38, 0)),
        ([10**38 - 1], pa.decimal128(38, 0)),
        (["1", 2], pa.string()),
        ([None, "a", 1], pa.string()),
        ([True, False], pa.bool_()),
        ([None], pa.string()),
    ],
)
def test_the_first_row_says_what_keys_are(write: Write, rows: list[Any], kind: pa.DataType) -> None:
    source = JsonLines([write("t.jsonl", lines([{"x": 0}, *({"id": v} for v in rows)]))])
    assert source.key_types(["id"]) == [kind]
    key = pa.schema([("id", kind)])
    keys = pa.concat_tables(source.keys(key))["id"].to_pylist()
    wanted = (str,) if kind == pa.string() else (bool,) if kind == pa.bool_() else (int,)
    assert keys == [v for v in rows if type(v) in wanted]


@pytest.mark.parametrize("value", ["1.5", "1e3", "-0", "NaN", "[1]", '{"a": 1}', "1.0"])
def test_keys_that_identify_no_row_are_refused(write: Write, value: str) -> None:
    source = JsonLines([write("t.jsonl", f'{{"id": {value}}}\n{{"id": 1}}\n')])
    with pytest.raises(InvalidCall, match="CAST it to VARCHAR"):
        source.key_types(["id"])


def test_keys_of_outputs_that_are_there(write: Write) -> None:
    source = JsonLines([write("t.jsonl", lines([{"id": 1}, {"id": "2024-01-02"}, {"id": 2**63}]))])
    assert read(source, [], pa.schema([("id", pa.int64())]))[0].keys() == {1}
    assert len(read(source, [], pa.schema([("id", pa.decimal128(20, 0))]))[0]) == 2
    assert len(read(source, [], pa.schema([("id", pa.date32())]))[0]) == 1


def test_json_lines_that_differ_by_file(write: Write) -> None:
    source = JsonLines(
        [write("0.jsonl", lines([{"id": 1, "a": 1}])), write("1.jsonl", lines([{"b": 2, "id": 2}]))]
    )
    assert source.columns() == ["id", "a", "b"]
    assert read(source, ["a", "b"])[0] == {1: (1, None), 2: (None, 2)}


ROWS = [
    {"id": 1, "text": "a]},{"},
    {"id": 2, "text": 'q"\\', "x": [{"id": 9}]},
    {"id": 3, "text": "c" * 3_000_000},
]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n\n" + json.dumps(ROWS, indent=0),
        "".join(json.dumps(row) for row in ROWS),
        "\n".join(json.dumps(row, indent=4) for row in ROWS),
        lines(ROWS),
        "\n \n" + lines(ROWS),
        json.dumps(ROWS[:2]) + json.dumps(ROWS[2:]),
    ],
)
def test_json_documents(write: Write, content: str) -> None:
    source = JsonLines([write("t.json", content)])
    found, _, unreadable = read(source)
    assert found == {row["id"]: row["text"] for row in ROWS}
    assert unreadable.count == 0


def test_faults_of_json_documents(write: Write) -> None:
    def got(content: str) -> tuple[set[int], list[str]]:
        found, _, unreadable = read(
            JsonLines([write("t.json", content)]), [], pa.schema([("id", pa.int64())])
        )
        return set(found), unreadable.examples

    assert got("[]") == (set(), [])
    assert got("") == (set(), [])
    keys, told = got('[\n{"id": 1},\n{"id": 2},\n{"id": 3, x},\n{"id": 4}]')
    assert (keys, len(told)) == ({1, 2}, 1)
    assert told[0].startswith("t.json, line 4: no JSON")
    for cut in ('[{"id": 1},\n{"id": 2', '[{"id": 1},\n{"id": 2, "text": "cu', '[{"id": 1},\n', '[{"id": 1}'):
        keys, told = got(cut)
        assert (keys, len(told)) == ({1}, 1)
    keys, told = got('[{"id": 1}, 5, [{"id": 6}], {"id": 2}]')
    assert (keys, len(told)) == ({1, 2}, 2)
    # Lines, when the first one is an object: each costs itself.
    keys, told = got('{"id": 1}\n{"id": 2, \n{"id": 3}\n')
    assert (keys, told[0][:15], len(told)) == ({1, 3}, "t.json, line 2:", 1)


def test_a_whole_number_that_sql_would_round_is_no_row_of_a_select(write: Write) -> None:
    """The column has other numbers with a fraction, so that it is a DOUBLE in SQL."""
    big = 2**60 + 1
    source = JsonLines([write("t.jsonl", lines([{"x": 1}, {"x": big}, {"x": 0.5}]))])
    assert sql(source, ["x"], "FROM t") == [(1.0,), (0.5,)]
    assert source.left_out.count == 1
    assert f"'x' is {big}, which a SELECT would round" in source.left_out.examples[0]
