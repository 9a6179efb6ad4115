"""Text files as sources: cells and JSON values come as in the file; a bad line affects only itself."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import math
import random
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.sources import PART_BYTES, Unreadable
from vllm_tasks.datalayer.sources.csv import Csv
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.jsonl import JsonLines
from vllm_tasks.datalayer.sources.read_options import ReadOptions, read_options
from vllm_tasks.datalayer.sources.stream import Stream
from vllm_tasks.errors import InvalidCall, TablesUnavailable

Write = Callable[..., DataFile]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Makes a data file of this name and content."""

    def made(name: str, content: str | bytes) -> DataFile:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        file = DataFile.of(LocalFileSystem(), str(path), name)
        assert file is not None
        return file

    return made


def read(
    source: Csv | JsonLines, columns: Sequence[str] = ("text",), key: pa.Schema | str = "id"
) -> tuple[dict[Any, Any], dict[Any, str], Unreadable]:
    """Values by key, errors by key, and unreadable lines; a single column or key is not a tuple."""
    if isinstance(key, str):
        key = pa.schema([(key, source.key_types([key])[0])])
    found, errors, unreadable = {}, {}, Unreadable()
    for part in source.parts(key, columns, unreadable):
        keys = [k[0] if len(k) == 1 else k for k in zip(*part.keys.to_pydict().values(), strict=True)]
        lists = list(part.values(range(len(keys))))
        values = [row for rows in lists for row in rows]
        assert len(values) == len(keys)
        for i, (k, row) in enumerate(zip(keys, values, strict=True)):
            assert k not in found
            if i in part.errors:
                errors[k] = part.errors[i]
                assert row == ()
            else:
                found[k] = row[0] if len(columns) == 1 else row
    return found, errors, unreadable


def sql(source: Csv | JsonLines, columns: Sequence[str], query: str) -> list[Any]:
    with duckdb.connect() as db:
        db.register("t", Stream(source, columns))
        return db.execute(query).fetchall()


def lines(rows: Sequence[Any]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


LOOKS = [
    *(
        "yes",
        "TRUE",
        "01/02/2024",
        "1.50",
        "3.14159265358979323846",
        "0xFF",
        "1e5",
        "007",
        " 7 ",
        "NaN",
        "NULL",
    ),
    *("None", "2024-01-03T10:00:00+02:00", "-0", "a\tb", "\u00a0", "é 漢 🎉", "\\N", "'q'", "#x"),
]


# --- CSV ---


def test_cells_are_the_text_in_the_file(write: Write) -> None:
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["id", "text"], *enumerate(LOOKS)])
    assert read(Csv([write("t.csv", file.getvalue())]))[0] == {str(i): t for i, t in enumerate(LOOKS)}


def test_an_empty_cell_is_null_and_an_empty_text_stands_in_quotes(write: Write) -> None:
    source = Csv([write("t.csv", 'id,text\n1,\n2,""\n3," "\n,no key\n"",a key\n')])
    found, errors, unreadable = read(source)
    assert (found, errors) == ({"1": None, "2": "", "3": " ", "": "a key"}, {})
    assert unreadable == Unreadable(1, ["t.csv, record 5: NULL for the key id"])
    keys = pa.concat_tables(source.keys(pa.schema([("id", pa.string())])))
    assert keys["id"].to_pylist() == ["1", "2", "3", ""]


@pytest.mark.parametrize("late", ["late, but fine", "two\nlines", 'a "quote"', "letters", "b" * 3_000_000])
def test_what_comes_late_changes_nothing(write: Write, late: str) -> None:
    texts = [str(i) for i in range(20_600)] + [late, "after"]
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    found, errors, unreadable = read(Csv([write("t.csv", file.getvalue())]))
    assert list(found.values()) == texts
    assert not errors
    assert not unreadable.count


def test_a_cell_of_100_mb_among_bad_records(write: Write) -> None:
    """A pass with larger blocks reports nothing twice."""
    rows = "".join(f"{i},t{i}\n" + f"x{i},a,b\n" * (i % 40_000 == 7) for i in range(100_000))
    found, errors, unreadable = read(
        Csv(
            [
                write(
                    "t.csv", "id,text\n" + rows + "big," + "z" * 100_000_000 + "\n" + "late,a,b\nlast,1\n,2\n"
                )
            ]
        )
    )
    assert len(found) == 100_002
    assert len(found["big"]) == 100_000_000
    assert found["last"] == "1"
    assert sorted(errors) == ["late", "x40007", "x7", "x80007"]
    assert errors["late"] == "the record 100006 has 3 cells, where the header has 2"
    assert unreadable.examples == ["t.csv, record 100008: NULL for the key id"]


def test_records_with_too_many_or_few_cells_are_errors_of_their_rows(write: Write) -> None:
    file = write("t.csv", b'id,text,more\n1,a,b\n2,"x,\ny",c,d\n\n3\n,d\n"4",e,f\n5,\xff,g,h\n')
    found, errors, unreadable = read(Csv([file]), ["text", "more"])
    assert found == {"1": ("a", "b"), "4": ("e", "f")}
    assert errors == {
        "2": "the record 3 has 4 cells, where the header has 3",
        "3": "the record 4 has 1 cells, where the header has 3",
        "5": "the record 7 has 4 cells, where the header has 3",
    }
    assert unreadable == Unreadable(1, ["t.csv, record 5: the record 5 has 2 cells, where the header has 3"])
    late_key = read(Csv([file]), ["text"], key="more")
    assert late_key[1].keys() == {"c", "g"}
    assert late_key[2].count == 2


def test_lines_of_a_text_without_quotes_take_no_other_record_along(write: Write) -> None:
    """`Regards` stands twice in the place of a key, and a line looks like a second row with the key 2."""
    content = "id,text\n1,hello\nRegards\n2\n2,x\nRegards\nBye\n3,a,b\n3,y\n"
    source = Csv([write("t.csv", content)])
    found, errors, unreadable = read(source)
    assert found == {"1": "hello", "2": "x", "3": "y"}
    assert errors == {"Bye": "the record 7 has 1 cells, where the header has 2"}
    assert unreadable.count == 4
    assert unreadable.examples[0] == "t.csv, record 3: the record 3 has 1 cells, where the header has 2"
    keys = pa.concat_tables(source.keys(pa.schema([("id", pa.string())])))
    assert keys["id"].to_pylist() == ["1", "2", "3", "Bye"]
    both = pa.schema([("id", pa.string()), ("text", pa.string())])
    assert [t.num_rows for t in source.keys(both)] == [3, 1]  # of the short records no whole key is known


def test_a_key_of_bad_records_is_looked_for_in_all_blocks_and_files(write: Write) -> None:
    late = "".join(f"{i},{'x' * 100}\n" for i in range(30_000))
    files = [
        write("a.csv", "id,text\n29999,a,b\nonly,a,b\n7,a,b\n" + late),
        write("b.csv", "id,text\nonly,b\n"),
    ]
    found, errors, unreadable = read(Csv(files), [])
    assert (len(found), errors, unreadable.count) == (30_001, {}, 3)


@pytest.mark.parametrize("size", [0, 3_000_000])
@pytest.mark.parametrize(
    "last", ['3,"open', '3,"open\n4,x\n5,y\n', '3,x,"open\n4,x\n', '"3\n', '3,x "quoted" "\n']
)
def test_a_quote_that_is_never_closed_costs_the_rest_and_is_told(write: Write, last: str, size: int) -> None:
    file = write("t.csv", "id,text\n1,a\n2,b\n" + last + "z" * size)
    found, errors, unreadable = read(Csv([file]))
    assert found.pop("3", None) in (None, 'x "quoted" "', 'x "quoted" "' + "z")
    assert found == {"1": "a", "2": "b"} or size
    if last.startswith("3,x "):  # quotes within a cell are signs like others
        assert not unreadable.count
    else:
        assert not errors
        assert unreadable.count == 1
        assert unreadable.examples[0].startswith("t.csv, record 4: a quote opens in this record")


def test_the_only_column_with_an_open_quote(write: Write) -> None:
    assert read(Csv([write("t.csv", "id\n1\n2\n")]), [])[0].keys() == {"1", "2"}
    found, _, unreadable = read(Csv([write("t.csv", 'id\n1\n"2\n3\n')]), ["id"])
    assert found == {"1": "1"}
    assert unreadable.count == 1


def test_an_open_quote_in_a_column_that_nobody_reads(write: Write) -> None:
    found, _, unreadable = read(Csv([write("t.csv", 'id,text,note\n1,a,x\n2,b,"open\n3,c,y\n')]))
    assert found == {"1": "a"}
    assert unreadable.count == 1


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_empty_files_have_no_columns(write: Write, content: bytes) -> None:
    source = Csv([write("t.csv", content)])
    assert source.columns() == []
    assert read(source)[0] == {}


def test_a_header_alone_and_odd_headers(write: Write) -> None:
    assert Csv([write("t.csv", "id,text")]).columns() == ["id", "text"]
    assert read(Csv([write("t.csv", "id,text")]))[0] == {}
    source = Csv([write("t.csv", b'\xef\xbb\xbf\r\n"id"," text ","two\nlines",,007\r\n1,a,b,c,d\r\n')])
    assert source.columns() == ["id", " text ", "two\nlines", "", "007"]
    assert read(source, [" text ", "two\nlines", "", "007"])[0] == {"1": ("a", "b", "c", "d")}
    with pytest.raises(InvalidCall, match=r"first record of 't\.csv' cannot be read"):
        Csv([write("t.csv", '"id,text\n1,a\n')]).columns()


def test_a_doubled_name_matters_where_it_is_wanted(write: Write) -> None:
    source = Csv([write("t.csv", "id,x,text,x\n1,a,b,c\n")])
    assert source.columns() == ["id", "x", "text"]
    assert read(source)[0] == {"1": "b"}
    with pytest.raises(InvalidCall, match="2 columns named 'x'"):
        read(source, ["x"])


def test_line_ends_blank_lines_and_nul(write: Write) -> None:
    found, _, unreadable = read(Csv([write("t.csv", "id,text\r\n\r\n1,a\0b\r\n\n2,c\n3,d")]))
    assert (found, unreadable.count) == ({"1": "a\0b", "2": "c", "3": "d"}, 0)
    assert read(Csv([write("t.csv", "id,text\r1,a\r2,b\r")]))[0] == {"1": "a", "2": "b"}


def test_wrong_bytes_fail_the_text_that_has_them(write: Write) -> None:
    content = b"id,text,more\n1,a,b\n2,\xff\xfe,b\n\xff,c,d\n4,e,\xff\n5,\xff,b,c\n6,z,z\n"
    found, errors, unreadable = read(Csv([write("t.csv", content)]))
    assert found == {"1": "a", "2": "\udcff\udcfe", "4": "e", "6": "z"}
    assert errors.keys() == {"5"}
    assert unreadable.count == 1
    assert "record 4" in unreadable.examples[0]
    source = Csv([write("t.csv", content)])
    rows = sql(source, ["id", "text"], "SELECT id, text FROM t ORDER BY id")
    assert rows == [("1", "a"), ("4", "e"), ("6", "z")]
    assert source.left_out.count == 3


def test_files_of_a_folder_may_differ(write: Write) -> None:
    source = Csv(
        [
            write("0.csv", "id,text\n1,a\n"),
            write("1.csv", "lang,text,id\nde,b,2\n"),
            write("2.csv", "id,lang\n3,en\n"),
            write("3.csv", "text\nno key\n"),
            write("4.tsv", "id\ttext\n4\ta,b\n"),
            write("5.csv", ""),
        ]
    )
    assert source.columns() == ["id", "text", "lang"]
    found, _, unreadable = read(source, ["text", "lang"])
    assert found == {"1": ("a", None), "2": ("b", "de"), "3": (None, "en"), "4": ("a,b", None)}
    assert unreadable.examples == ["3.csv, record 2: NULL for the key id"]
    assert sql(source, ["lang", "id"], "SELECT count(*), count(id), count(lang) FROM t") == [(5, 4, 2)]


def test_keys_take_the_types_of_outputs_that_are_there(write: Write) -> None:
    source = Csv([write("t.csv", "id,text\n1,a\n2,b\nx,c\n")])
    found, _, unreadable = read(source, key=pa.schema([("id", pa.int64())]))
    assert found == {1: "a", 2: "b"}
    assert unreadable.count == 1
    assert unreadable.examples[0].startswith("t.csv, record 4: id=x")


@pytest.mark.parametrize(
    ("options", "content"),
    [
        ({"delimiter": ";"}, "id;text\n1;é,b\n"),
        ({"delimiter": "|", "quote": "'"}, "id|text\n1|'é,b'\n"),
        ({"quote": "", "delimiter": ";"}, "id;text\n1;é,b\n"),
        ({"escape": "\\"}, "id,text\n1,é\\,b\n"),
        ({"header": ["id", "text"]}, '1,"é,b"\n'),
        ({"encoding": "latin-1"}, 'id,text\n1,"é,b"\n'),
        ({"encoding": "utf-16"}, 'id,text\n1,"é,b"\n'),
        ({"encoding": "UTF-8"}, 'id,text\n1,"é,b"\n'),
    ],
)
def test_options_of_csv(write: Write, options: dict[str, Any], content: str) -> None:
    file = write("t.csv", content.encode(options.get("encoding", "utf-8")))
    assert read(Csv([file], read_options("t", options)))[0] == {"1": "é,b"}


def test_more_options_of_csv(write: Write) -> None:
    found = read(
        Csv([write("t.csv", "1,a\n2,b\n")], read_options("t", {"header": False})), ["column1"], "column0"
    )
    assert found[0] == {"1": "a", "2": "b"}
    options = read_options("t", {"null_values": ["", "NA"]})
    assert read(Csv([write("t.csv", 'id,text\n1,NA\n2,"NA"\n3,\n')], options))[0] == {
        "1": None,
        "2": "NA",
        "3": None,
    }
    wrong = read(
        Csv(
            [write("t.csv", "id,text\n1,é\n2,b\n".encode("utf-16") + b"3")],
            read_options("t", {"encoding": "utf-16"}),
        )
    )
    assert wrong[0] == {"1": "é", "2": "b"}
    # Bytes that no UTF-16 has: the half of a pair in the first row.
    content = "id,text\n1,?\n2,b\n".encode("utf-16-le").replace(b"?\0", b"\x3d\xd8")
    found = read(Csv([write("t.csv", content)], read_options("t", {"encoding": "utf-16-le"})))
    assert found[0]["2"] == "b"
    with pytest.raises(UnicodeEncodeError):
        found[0]["1"].encode()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(write: Write, encoding: str) -> None:
    options = read_options("t", {"encoding": encoding})
    content = "\ufeffid,text\n1,\ufeffä\n".encode(encoding)
    assert read(Csv([write("t.csv", content)], options))[0] == {"1": "\ufeffä"}
    content = '\ufeff{"id": 1, "text": "ä"}\n'.encode(encoding)
    assert read(JsonLines([write("t.jsonl", content)], options))[0] == {1: "ä"}


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("kind", ["gz", "zst", "bz2", "xz", "xlsx", "parquet", "arrow"])
def test_what_is_no_text_is_refused_by_what_it_is(write: Write, ending: str, kind: str) -> None:
    table, sink = pa.table({"id": [1], "text": ["a"]}), io.BytesIO()
    if kind == "parquet":
        pa.parquet.write_table(table, sink)
    elif kind == "arrow":
        pa.feather.write_feather(table, sink)
    elif kind == "xlsx":
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr("xl/workbook.xml", "<x/>")
    text = b'{"id": 1, "text": "a"}\n'
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    content = sink.getvalue() or (packers[kind](text) if kind in packers else packed(kind, text))
    file = write(f"t.{ending}", content)
    source = Csv([file]) if ending in ("csv", "tsv") else JsonLines([file])
    with pytest.raises(InvalidCall, match=f"not {ending} as its name says; (rename|decompress|extract)"):
        source.columns()


def test_a_first_record_of_any_width_counts_the_columns(write: Write) -> None:
    file = write("t.csv", f"1,{'a' * 200_000}\n2,b\n")
    source = Csv([file], read_options("t", {"header": False}))
    assert read(source, ["column1"], "column0")[0] == {"1": "a" * 200_000, "2": "b"}


def test_utf16_that_nobody_announced_is_refused(write: Write) -> None:
    for file in (
        write("t.csv", "id\n1\n".encode("utf-16")),
        write("t.jsonl", '{"id": 1}\n'.encode("utf-16")),
    ):
        with pytest.raises(InvalidCall, match="utf-16"):
            (Csv if file.kind == "csv" else JsonLines)([file]).columns()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"delimeter": ";"}, "did you mean 'delimiter'"),
        ({"delimiter": ";;"}, "delimiter=';;': must be one ASCII character"),
        ({"delimiter": ""}, "leave it out"),
        ({"delimiter": "é"}, "one ASCII character"),
        ({"quote": "a"}, "no letter"),
        ({"delimiter": '"'}, "different characters"),
        ({"encoding": "latin1000"}, "encoding='latin1000'"),
        ({"encoding": "base64"}, "encoding"),
        ({"header": []}, "at least one name"),
        ({"header": ["a", "a"]}, "none twice"),
        ({"header": "a"}, "header='a'"),
        ({"delimiter": 1}, "delimiter=1"),
        ([], "read={'t': ...}"),
    ],
)
def test_wrong_options_are_refused_by_name(given: Any, said: str) -> None:
    with pytest.raises(InvalidCall) as refused:
        read_options("t", given)
    assert said in str(refused.value)


def test_options_are_plain_data() -> None:
    options = read_options("t", {"delimiter": ";", "header": ["a"]})
    assert ReadOptions.model_validate_json(options.model_dump_json()) == options
    with pytest.raises(InvalidCall, match="JSON has no delimiter"):
        JsonLines([], options)


# --- JSON ---


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


# --- both: streams, compression, remote files, memory ---


def test_sql_gives_the_values_that_reading_gives(write: Write) -> None:
    rows = [
        '{"id": 1, "whole": 1, "mixed": 1, "float": 0.5, "digits": 1.50, "text": "a", "flag": true,'
        ' "deep": {"a": 1.50}}',
        '{"id": 2, "whole": 9007199254740993, "mixed": "1", "float": 1e16, "digits": 2, "text": "",'
        ' "flag": false, "deep": [1, {"b" : "\\ud83d"}], "late": "x"}',
        '{"id": 3, "whole": null, "mixed": {"x": [ 1,2 ]}, "deep": "text"}',
        "no JSON",
    ]
    source = JsonLines([write("t.jsonl", lines(rows))])
    columns = list(source.columns())
    stream = Stream(source, columns)
    kinds = {field.name: getattr(field.type, "extension_name", str(field.type)) for field in stream.schema}
    assert kinds == {
        "id": "int64", "whole": "int64", "mixed": "arrow.json", "float": "double", "digits": "double",
        "text": "string", "flag": "bool", "deep": "arrow.json", "late": "string",
    }  # fmt: skip
    with duckdb.connect() as db:
        db.register("t", stream)
        for _ in range(2):  # a fresh pass each time
            assert db.execute("SELECT whole FROM t ORDER BY id").fetchall() == [
                (1,),
                (9007199254740993,),
                (None,),
            ]
            assert source.left_out.count == 1
        table = db.sql("SELECT deep, mixed, digits FROM t ORDER BY id").to_arrow_table()
    assert table["deep"].to_pylist() == ['{"a": 1.50}', '[1, {"b" : "\\ud83d"}]', '"text"']
    assert table["mixed"].to_pylist() == ["1", '"1"', '{"x": [ 1,2 ]}']
    # Numbers that are not all whole are compared as numbers, so their spelling is the table's alone.
    assert table["digits"].to_pylist() == [1.5, 2.0, None]


def test_floats_that_print_alike_are_floats_in_sql(write: Write) -> None:
    source = JsonLines([write("t.jsonl", '{"id": 1, "x": 0.1}\n{"id": 2, "x": 2.5}\n')])
    assert sql(source, ["x"], "SELECT sum(x * 2) FROM t") == [(5.2,)]
    csv_source = Csv([write("t.csv", "id,x\n1,0.10\n")])
    assert sql(csv_source, ["x"], "SELECT x, CAST(x AS DOUBLE) FROM t") == [("0.10", 0.1)]
    with pytest.raises(InvalidCall, match="did you mean 'x'"):
        Stream(csv_source, ["X"])


def packed(kind: str, content: bytes) -> bytes:
    return gzip.compress(content) if kind == "gz" else pa.compress(content, "zstd", asbytes=True)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_files_and_their_truncated_ends(write: Write, kind: str) -> None:
    rows = [(i, f"t{i * 7919 % 100_003}") for i in range(5_000 if kind == "gz" else 20_000)]
    contents = {
        "csv": "id,text\n" + "".join(f"{i},{t}\n" for i, t in rows),
        "JSONL": lines([{"id": str(i), "text": t} for i, t in rows]),
    }
    for ending, content in contents.items():
        make = Csv if ending == "csv" else JsonLines
        whole = packed(kind, content.encode())
        wanted = {str(i): t for i, t in rows}
        assert read(make([write(f"t.{ending}.{kind}", whole)]))[0] == wanted
        two = packed(kind, content[:1000].encode()) + packed(kind, content[1000:].encode())
        assert read(make([write(f"t.{ending}.{kind}", two)]))[0] == wanted  # one behind the other
        for cut in (len(whole) - 3, len(whole) * 2 // 3):
            found, errors, unreadable = read(make([write(f"t.{ending}.{kind}", whole[:cut])]))
            assert found.items() <= wanted.items()
            assert list(found) == list(wanted)[: len(found)]
            assert len(found) > (4_990 if kind == "gz" and cut == len(whole) - 3 else 5)
            assert not errors
            assert unreadable.count == 1
            assert "damaged" in unreadable.examples[0]
        with pytest.raises(InvalidCall, match="is not compressed with"):
            make([write(f"t.{ending}.{kind}", content)]).columns()


class Lost(MemoryFileSystem):
    """A filesystem whose connection ends behind a number of bytes, and whose files cannot seek."""

    limit = 10**9
    open_files: list[Any] = []
    cachable = False

    def _open(self, path: str, mode: str = "rb", **given: Any) -> Any:
        content = super()._open(path, mode, **given).read() if mode == "rb" else None
        if content is None:
            return super()._open(path, mode, **given)
        file = Dropping(content, self.limit)
        self.open_files.append(file)
        return file


class Dropping(io.RawIOBase):
    def __init__(self, content: bytes, limit: int) -> None:
        self.content, self.limit, self.at = content, limit, 0

    def read(self, size: int = -1) -> bytes:
        if self.at >= self.limit:
            raise OSError("connection reset")
        some = self.content[self.at : self.at + min(size, 100_000)]
        self.at += len(some)
        return some


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.csv.gz", "t.jsonl.zst"])
def test_a_connection_lost_in_the_middle_may_pass(name: str) -> None:
    rows = [(i, hashlib.sha256(b"%d" % i).hexdigest()) for i in range(40_000)]
    content = "id,text\n" + "".join(f"{i},{t}\n" for i, t in rows)
    if "jsonl" in name:
        content = lines([{"id": str(i), "text": t} for i, t in rows])
    raw = content.encode()
    packing = name.rpartition(".")[2]
    fs = Lost()
    fs.pipe(f"/lost/{name}", packed(packing, raw) if packing in ("gz", "zst") else raw)
    file = DataFile.of(fs, f"/lost/{name}", name)
    assert file is not None
    source = Csv([file]) if "csv" in name else JsonLines([file])
    try:
        assert len(read(source)[0]) == 40_000
        fs.limit = 100_000
        with pytest.raises(TablesUnavailable, match="connection reset"):
            list(source.parts(pa.schema([("id", pa.string())]), ["text"], Unreadable()))
        fs.limit = 10**9
        assert len(read(source)[0]) == 40_000
        assert all(each.closed for each in fs.open_files)
    finally:
        fs.rm("/lost", recursive=True)
        fs.open_files.clear()


def test_a_file_that_is_gone_may_come_back(write: Write, tmp_path: Path) -> None:
    file = write("t.jsonl", "{}\n")
    (tmp_path / "t.jsonl").unlink()
    with pytest.raises(TablesUnavailable, match=r"t\.jsonl"):
        JsonLines([file]).columns()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_parts_are_bounded_and_closing_closes_the_files(kind: str) -> None:
    fs = Lost()
    rows = [(i, "x" * 50_000) for i in range(1000)]
    content = "id,text\n" + "".join(f"{i},{t}\n" for i, t in rows)
    if kind == "jsonl":
        content = lines([{"id": str(i), "text": t} for i, t in rows])
    fs.pipe(f"/bounded/t.{kind}", content.encode())
    file = DataFile.of(fs, f"/bounded/t.{kind}", "t")
    assert file is not None
    source = Csv([file]) if kind == "csv" else JsonLines([file])
    try:
        parts = source.parts(pa.schema([("id", pa.string())]), ["text"], Unreadable())
        first = next(parts)
        assert first.keys.num_rows * 50_000 <= PART_BYTES
        time.sleep(0.2)  # nothing is read ahead while nobody asks
        assert sum(each.at for each in fs.open_files[-1:]) <= 3 * PART_BYTES // 2
        before = threading.active_count()
        parts.close()
        assert all(each.closed for each in fs.open_files)
        assert threading.active_count() <= before
    finally:
        fs.rm("/bounded", recursive=True)
        fs.open_files.clear()


def test_endings_in_any_case_of_letters(write: Write) -> None:
    assert read(Csv([write("T.TSV", "id\ttext\n1\ta\n")]))[0] == {"1": "a"}
    assert read(JsonLines([write("t.NDJSON.GZ", gzip.compress(b'{"id": 1, "text": "a"}\n'))]))[0] == {1: "a"}
    assert fsspec  # the files are those of fsspec's filesystems


@pytest.mark.parametrize("block", [8, 64, 1000])
def test_blocks_of_any_size_give_the_same_records(
    write: Write, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """Cells of odd signs and lengths, bad records and wrong bytes between them."""
    monkeypatch.setattr("vllm_tasks.datalayer.sources.csv_file.BLOCK", block)
    rng = random.Random(block)
    signs = ["a", ",", '"', "\n", "\r\n", "é", "🎉", " ", "\0", "x" * 50]
    wanted, bad, numbers = {}, {}, []
    file = io.BytesIO()
    file.write(b"id,text\n")
    for i in range(300):
        text = "".join(rng.choices(signs, k=rng.randrange(8)))
        kind = rng.randrange(10)
        quoted = '"' + text.replace('"', '""') + '"'
        if kind == 0:
            bad[str(i)] = f"the record {i + 2} has 3 cells, where the header has 2"
            file.write(f"{i},{quoted},\n".encode())
        elif kind == 1:
            numbers.append(i + 2)
            file.write(b',\xff,"\xfe,\n"\n')
        else:
            wanted[str(i)] = text
            file.write(f"{i},{quoted}\n".encode())
    source = Csv([write("t.csv", file.getvalue())])
    found, errors, unreadable = read(source)
    assert (found, errors) == (wanted, bad)
    assert unreadable.count == len(numbers)
    assert [e.split(": ")[0] for e in unreadable.examples] == [f"t.csv, record {n}" for n in numbers[:20]]
    assert len(sql(source, ["id"], "SELECT id FROM t")) == len(wanted)


def test_lines_of_a_txt(tmp_path: Path) -> None:
    """The way in docs/how-to/sources.md: linked as a CSV, with a delimiter that no line contains."""
    (tmp_path / "lines.txt").write_text('a, "b"\n c\n')
    (tmp_path / "lines.csv").symlink_to(tmp_path / "lines.txt")
    options = {"header": ["text"], "quote": "", "delimiter": "\x01"}
    with closing(Datalayer(url=str(tmp_path), read={"lines": options}).tables()) as tables:
        assert list(tables.read("lines")) == [[{"text": 'a, "b"'}, {"text": " c"}]]
