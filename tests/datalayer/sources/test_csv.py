"""CSV as a source: cells come as in the file; a bad record affects only itself."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import zipfile
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.datalayer.sources.text_files import Write, packed, read, sql
from vllm_tasks import Datalayer
from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.sources.csv import Csv
from vllm_tasks.datalayer.sources.csv_quotes import STRAY, Quotes
from vllm_tasks.datalayer.sources.jsonl import JsonLines
from vllm_tasks.datalayer.sources.read_options import ReadOptions, read_options
from vllm_tasks.errors import InvalidCall

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


def test_text_behind_a_closing_quote_is_an_error_of_its_row(write: Write) -> None:
    """A quote that a backslash escapes seems to close; one within a cell without quotes is its text."""
    content = (
        b'id,text,more\n1,"say \\"hi\\"",a\n2,"say ""hi""","\n"\n3,5" pipe,\xff\n'
        b'"a"b,"x" y,c\n4,"\\"hi\\", he",b\n'
    )
    found, errors, unreadable = read(Csv([write("t.csv", content)]), ["text"])
    assert found == {"2": 'say "hi"', "3": '5" pipe'}
    assert errors.keys() == {"1", "4"}
    assert errors["1"] == (
        "the record 2 has text behind a closing quote; if backslashes escape quotes, say so: "
        'read={table: {"escape": "\\\\"}}'
    )
    assert unreadable.count == 1  # its key is no text of the file
    escaped = read(Csv([write("t.csv", content)], read_options("t", {"escape": "\\"})))
    assert escaped[0]["1"] == 'say "hi"'


CSV_PIECES = ['"', '""', ",", "\n", "\r\n", "a", "\\", '",', '\n"']


@given(
    pieces=st.lists(st.sampled_from(CSV_PIECES), max_size=30),
    cuts=st.lists(st.integers(0, 40), max_size=5),
)
def test_marks_stand_behind_the_quotes_that_end_too_early(pieces: list[str], cuts: list[int]) -> None:
    """In blocks of any size, exactly where a walk sign by sign finds them."""
    text = "".join(pieces) + "\nend\n"
    edges = [0, *sorted(min(cut, len(text) - 1) for cut in cuts), len(text)]
    quotes = Quotes('"', ",", 2)
    blocks = [text[start:end].encode() for start, end in pairwise(edges)]
    marked = b"".join(map(quotes.marked, blocks)).decode()

    walked, inside, at = "", False, 0
    while at < len(text):
        before, sign, after = text[at - 1 : at] or "\n", text[at], text[at + 1 : at + 2]
        walked += sign
        if sign == '"' and inside and after == '"':
            walked += after
            at += 1
        elif sign == '"' and inside:
            inside = False
            walked += "" if after in ",\r\n" else f",,,{STRAY}"
        elif sign == '"' and before in ",\r\n":
            inside = True
        at += 1
    assert marked == walked


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


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.json", "t.parquet", "t.arrow"])
def test_a_file_that_git_has_not_downloaded_is_named(tmp_path: Path, name: str) -> None:
    """A pointer of Git LFS looks like a damaged file, or a CSV with one odd column."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    for select in ("t", "SELECT * FROM t"):
        with pytest.raises(InvalidCall, match=rf"{name}' is a pointer of Git LFS.*git lfs pull"):
            read_all(tmp_path, select)


def test_cells_that_another_character_separates_name_the_option(tmp_path: Path) -> None:
    """German Excel writes semicolons, and sometimes a first line of its own."""
    for text, delimiter in (("id;text\n1;a\n", ";"), ("id\ttext\n1\ta\n", "\t"), ("id|text\n1|a\n", "|")):
        (tmp_path / "t.csv").write_text(text)
        hint = f"read={{'t': {{\"delimiter\": {delimiter!r}}}}}"
        with pytest.raises(InvalidCall, match=re.escape(hint)):
            read_all(tmp_path, "t")
        assert read_all(tmp_path, "t", read={"t": {"delimiter": delimiter}}) == [("1", "a")]
    (tmp_path / "t.csv").write_text("sep=;\nid;text\n1;a\n")
    with pytest.raises(InvalidCall, match=r"remove its first line and give it as an option"):
        read_all(tmp_path, "t")


def read_all(lake: Path, select: str, **options: Any) -> list[tuple[Any, ...]]:
    with closing(Datalayer(url=str(lake), **options).tables()) as tables:
        return [tuple(row.values()) for page in tables.read(select, ("id", "text")) for row in page]


def test_a_first_record_of_any_width_counts_the_columns(write: Write) -> None:
    file = write("t.csv", f"1,{'a' * 200_000}\n2,b\n")
    source = Csv([file], read_options("t", {"header": False}))
    assert read(source, ["column1"], "column0")[0] == {"1": "a" * 200_000, "2": "b"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_characters_that_nobody_announced_are_refused(write: Write, encoding: str) -> None:
    """With and without a byte order mark; the encoding that the message names reads the file."""
    content = {"t.csv": "id,text\n1,a\n", "t.jsonl": '{"id": "1", "text": "a"}\n'}
    for name, text in content.items():
        file, kind = write(name, text.encode(encoding)), Csv if name == "t.csv" else JsonLines
        with pytest.raises(InvalidCall, match=f'"encoding": "{encoding}"'):
            kind([file]).columns()
        assert read(kind([file], read_options("t", {"encoding": encoding})))[0] == {"1": "a"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"delimeter": ";"}, "did you mean 'delimiter'"),
        ({"delimiter": ";;"}, "delimiter=';;': must be one ASCII character"),
        ({"delimiter": ""}, "leave it out"),
        ({"delimiter": "é"}, "one ASCII character"),
        ({"quote": "a"}, "not a letter"),
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
