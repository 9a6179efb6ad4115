"""Tables of databases whose keys are read first: every type of key, with done rows among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.datalayer.sources.test_sql_source import maria, run  # noqa: F401 - a fixture
from tests.servers.databases import OUT, Place, selection
from vllm_tasks.datalayer.elsewhere import Elsewhere
from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.datalayer.selection import OWN_COLUMNS, OutputColumn, OutputTable, SourceRow
from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.sources.sql import SqlSource
from vllm_tasks.datalayer.spool import Spool, spools

ROWS = 300
NASTY = [
    "",
    " ",
    "a ",
    "NULL",
    '"',
    "\\",
    "\\N",
    "a\tb\nc\r",
    "😀",
    "'; --",
    "%s :x {}",
    "ß",
    "\xe9",
    "e\u0301",
]
TEXTS = [*NASTY, *(f"k{i}" for i in range(ROWS - len(NASTY)))]


def quoted(text: str, url: str) -> str:
    """The value as an SQL literal that passes the driver."""
    if url.startswith("mysql"):
        text = text.replace("\\", "\\\\")
    found = "'" + text.replace("'", "''") + "'"
    return found if url.startswith("sqlite") else found.replace("%", "%%")


def binary(url: str, raw: bytes) -> str:
    return f"'\\x{raw.hex()}'" if url.startswith("postgres") else f"x'{raw.hex()}'"


POSTGRES: dict[str, tuple[str, Callable[[int, str], str]]] = {
    "smallint": ("SMALLINT", lambda i, _: str(i - 150)),
    "bigint": ("BIGINT", lambda i, _: str((i - 150) * 2**55)),
    "text": ("TEXT", lambda i, url: quoted(TEXTS[i], url)),
    "collated": ('VARCHAR(20) COLLATE "en-x-icu"', lambda i, url: quoted(TEXTS[i], url)),
    "uuid": ("UUID", lambda i, _: f"md5('{i}')::uuid"),
    "numeric": ("NUMERIC", lambda i, _: f"{i}.{i:0{i % 30 + 3}d}"),
    "date": ("DATE", lambda i, _: f"DATE '0001-01-01' + {i * 9000}"),
    "timestamp": ("TIMESTAMP", lambda i, _: f"TIMESTAMP '1899-12-31 23:59:59.999999' + '{i} ms'::interval"),
    "timestamptz": ("TIMESTAMPTZ", lambda i, _: f"TIMESTAMPTZ '1899-12-31 23:59:59+05' + '{i} ms'::interval"),
    "bytea": ("BYTEA", lambda i, url: binary(url, bytes([i % 256, i // 256, 0]))),
    "inet": ("INET", lambda i, _: f"'10.0.{i // 256}.{i % 256}/8'"),
    "char": ("CHAR(9)", lambda i, _: f"'k{i} '"),
}
MARIADB: dict[str, tuple[str, Callable[[int, str], str]]] = {
    "bigint": ("BIGINT", lambda i, _: str((i - 150) * 2**55)),
    "unsigned": ("BIGINT UNSIGNED", lambda i, _: str(2**64 - 1 - i)),
    "text": ("VARCHAR(20) COLLATE utf8mb4_nopad_bin", lambda i, url: quoted(TEXTS[i], url)),
    "latin": ("VARCHAR(20) CHARACTER SET latin1", lambda i, _: f"'é{i}'"),
    "decimal": ("DECIMAL(30, 10)", lambda i, _: f"{i}.{i:07d}"),
    "date": ("DATE", lambda i, _: f"DATE '1901-01-01' + INTERVAL {i} DAY"),
    "datetime": ("DATETIME(6)", lambda i, _: f"TIMESTAMP '1999-12-31 23:59:59.999999' + INTERVAL {i} SECOND"),
    "binary": ("VARBINARY(9)", lambda i, url: binary(url, bytes([i % 256, i // 256, 0]))),
    "time": ("TIME", lambda i, _: f"SEC_TO_TIME({i - 150})"),
}
SQLITE: dict[str, tuple[str, Callable[[int, str], str]]] = {
    "integer": ("INTEGER", lambda i, _: str((i - 150) * 2**55)),
    "text": ("TEXT", lambda i, url: quoted(TEXTS[i], url)),
    "blob": ("BLOB", lambda i, url: binary(url, bytes([i % 256, i // 256, 0]))),
    "nocase": ("TEXT COLLATE NOCASE", lambda i, _: f"'K{i}'"),
    "datetime": ("DATETIME", lambda i, _: f"'2026-11-22 05:{i // 60:02d}:{i % 60:02d}'"),
    "mixed": ("", lambda i, _: str(i) if i % 3 else f"'x{i}'"),
}
KINDS = {"sqlite": SQLITE, "postgres": POSTGRES, "mysql": MARIADB}
CASES = [(db, kind) for db, kinds in KINDS.items() for kind in kinds]


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of the kind that the parameter names."""
    if request.param == "postgres":
        found: Place = request.getfixturevalue("pg")
        return found.url
    if request.param == "sqlite":
        (tmp_path / "t.db").touch()
        return f"sqlite:///{tmp_path}/t.db"
    server: str = request.getfixturevalue("maria")
    run(server, "DROP DATABASE tests", "CREATE DATABASE tests")
    return server


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small limits, so that few rows make many pages, parts and lists."""
    for name, value in {"PAGE": 7, "FIRST": 16, "TEXTS": 32, "PART_ROWS": 100}.items():
        monkeypatch.setattr(f"vllm_tasks.datalayer.sources.sql_keys.{name}", value)
    monkeypatch.setattr("vllm_tasks.datalayer.sources.sql_values.LISTED", 11)
    monkeypatch.setattr("vllm_tasks.datalayer.spool.LIMIT", 5)


def lake_of(source: SqlSource, key: tuple[str, ...], folder: Path, done: range) -> Elsewhere:
    """A lake with the outputs of the rows of these numbers."""
    folder.mkdir()
    here = Elsewhere(source, Lake(str(folder)), "rows there")
    chosen = selection(key=key, columns=("n", "text"))
    here.check(chosen)
    writer = here.writer(chosen, OutputTable(OUT, (OutputColumn("output", "str"),)))
    own = dict.fromkeys(OWN_COLUMNS) | {"_fingerprint": "f", "_input_hash": "h"}
    rows = [dict(zip(key, r.key, strict=True)) for r in found(here, key) if r.values[0] in done]
    writer.commit([row | {"output": "o"} | own for row in rows], [])
    writer.close()
    return here


def found(here: Elsewhere, key: tuple[str, ...]) -> list[SourceRow]:
    chosen = selection(key=key, columns=("n", "text"))
    rows = [row for page in here.rows(chosen, 50) for row in page]
    assert here.count(chosen) == (ROWS, len(rows))
    assert not here.unreadable().count
    assert all(row.error is None and row.values[1] == f"text {row.values[0]}" for row in rows)
    return rows


@pytest.mark.parametrize(("place", "kind"), CASES, indirect=["place"])
@pytest.mark.parametrize("done", [range(250), range(0, ROWS, 2)], ids=str)
@pytest.mark.parametrize("indexed", [True, False], ids=["index", "none"])
def test_each_row_is_found_once(place: str, kind: str, done: range, indexed: bool, tmp_path: Path) -> None:
    """Rows that are not done are read once with their own values, for any type of key and any distance
    between them.
    """
    name = "postgres" if place.startswith("postgres") else place.partition(":")[0].partition("+")[0]
    spec, value = KINDS[name][kind]
    primary = " NOT NULL PRIMARY KEY" if indexed else ""
    run(
        place,
        f"CREATE TABLE t (id {spec}{primary}, n INTEGER, text VARCHAR(20))",
        "INSERT INTO t VALUES " + ", ".join(f"({value(i, place)}, {i}, 'text {i}')" for i in range(ROWS)),
    )
    with closing(lake_of(SqlSource(place, "t"), ("id",), tmp_path / "lake", done)) as here:
        rows = found(here, ("id",))
        assert sorted(row.values[0] for row in rows) == [i for i in range(ROWS) if i not in done]


@pytest.mark.parametrize("place", list(KINDS), indirect=True)
@pytest.mark.parametrize("done", [range(0, ROWS, 7), range(290)], ids=str)
@pytest.mark.parametrize("index", ["PRIMARY KEY (b, a)", "UNIQUE (n)", ""])
def test_keys_of_several_columns(place: str, done: range, index: str, tmp_path: Path) -> None:
    """Keys are read by an index of all their columns, of some, in another order, or without an index."""
    run(
        place,
        "CREATE TABLE t (a VARCHAR(20) NOT NULL, b INTEGER NOT NULL, n INTEGER NOT NULL, text VARCHAR(20)"
        f"{', ' + index if index else ''})",
        "INSERT INTO t VALUES " + ", ".join(f"('k{i % 7}', {i // 7}, {i}, 'text {i}')" for i in range(ROWS)),
    )
    key = ("a", "n", "b") if "n" in index else ("a", "b")
    with closing(lake_of(SqlSource(place, "t"), key, tmp_path / "lake", done)) as here:
        assert sorted(row.values[0] for row in found(here, key)) == [i for i in range(ROWS) if i not in done]


@pytest.mark.parametrize("place", list(KINDS), indirect=True)
@pytest.mark.parametrize("key", [("id",), ("word",)])
def test_rows_that_change_while_they_are_read(place: str, key: tuple[str, ...]) -> None:
    """A row that is deleted after its key was read is left out, and its neighbours keep their values; a row
    that is new does not stand in for it."""
    run(
        place,
        "CREATE TABLE t (id INTEGER PRIMARY KEY, word VARCHAR(9) NOT NULL UNIQUE, text TEXT)",
        "INSERT INTO t VALUES " + ", ".join(f"({2 * i}, 'w{2 * i:03d}', 'text {2 * i}')" for i in range(100)),
    )
    source = SqlSource(place, "t")
    schema = pa.schema(list(zip(key, source.key_types(key), strict=True)))
    gone: list[int] = []
    with closing(source), closing(source.parts(schema, ("id", "text"), Unreadable())) as parts:
        part = next(parts)
        run(
            place,
            "DELETE FROM t WHERE id IN (0, 20, 22, 198)",
            "INSERT INTO t VALUES (21, 'w021', 'text 21'), (1, 'w001', 'text 1')",
            "UPDATE t SET text = 'new' WHERE id = 30",
        )
        values = [row for page in part.values(range(part.count)) for row in page]
        assert len(values) == part.count
        for i, row in enumerate(values):
            if row is None:
                gone.append(2 * i)
            else:
                assert tuple(row) == (2 * i, "new" if i == 15 else f"text {2 * i}")
    assert gone == [i for i in (0, 20, 22, 198) if i < 2 * part.count]


@pytest.mark.parametrize("place", list(KINDS), indirect=True)
def test_values_of_done_rows_stay_where_they_are(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If 3 of 300 rows are wanted, at most one page of values is read for each."""
    run(
        place,
        "CREATE TABLE t (id INTEGER PRIMARY KEY, text TEXT)",
        "INSERT INTO t VALUES " + ", ".join(f"({i}, 'text {i}')" for i in range(ROWS)),
    )
    read: list[int] = []

    def counted(*given: Any) -> Iterator[Spool]:
        for spool in spools(*given):
            read.append(spool.rows)
            yield spool

    monkeypatch.setattr("vllm_tasks.datalayer.sources.sql_values.spools", counted)
    monkeypatch.setattr("vllm_tasks.datalayer.sources.sql_keys.PART_ROWS", 10**6)
    with closing(SqlSource(place, "t")) as source:
        (part,) = source.parts(pa.schema([("id", pa.int64())]), ("text",), Unreadable())
        assert part.count == ROWS
        values = [row for page in part.values([5, 150, 299]) for row in page]
    assert values == [("text 5",), ("text 150",), ("text 299",)]
    assert 3 <= sum(read) <= 3 * 7
