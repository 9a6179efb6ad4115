"""One table of nasty keys and texts, in every format and store: from all the same prompts, keys, scores."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import deltalake
import duckdb
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from tests.beside import in_pandas
from tests.servers import mariadb
from tests.servers.postgres import Postgres
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import Datalayer, Dataset, InvalidCall, Metric, Validation, VllmAPI
from vllm_tasks.validation.run import validate

TEXTS = [
    "plain",
    "",
    "007",
    "1.50",
    "1e5",
    "0x1A",
    "yes",
    "NULL",
    "null",
    "nan",
    "true",
    "01/02/2024",
    "2024-01-03T10:00:00+02:00",
    "3.14159265358979323846",
    "12345678901234567890123",
    " blanks around ",
    "a, comma; a semicolon\ta tab",
    'a "quoted" word',
    '"',
    "two\nlines",
    "carriage\r\nreturn",
    "back\\slash \\n",
    "{braces} {{twice}}",
    "é ü 漢字 🙂",
    "e\u0301 combined",
    "\u202ebackwards",
    "'; DROP TABLE rows; --",
    '{"json": [1, 2.50]}',
    "=1+1",
    "x" * 70_000,
]
KEYS = ["007", "7", "0x1A", "1e5", "NULL", "null", " a ", "a", "A", "é", "e\u0301", "漢", "a,b", 'q"', "n\nl"]
KEYS += [f"k{i}" for i in range(len(TEXTS) - len(KEYS))]
ROWS = [{"id": k, "text": t, "answer": t[::-1]} for k, t in zip(KEYS, TEXTS, strict=True)]
TABLE = pa.Table.from_pylist(ROWS)
MESSAGES = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": t}] for t in TEXTS]


def delimited(delimiter: str) -> bytes:
    """Written as by Python's own writer, with every text in quotes, so that an empty one is not NULL."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerow(ROWS[0])
    writer.writerows(row.values() for row in ROWS)
    return text.getvalue().encode()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def iceberg(table: pa.Table, folder: Path) -> None:
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("c", uri="sqlite://", warehouse=f"file://{folder}")
    catalog.create_namespace("n")
    made = catalog.create_table("n.rows", table.schema, location=f"file://{folder}/rows")
    made.append(table.slice(0, 10))
    made.append(table.slice(10))
    catalog.engine.dispose()


FILES: dict[str, Callable[[Path], Any]] = {
    "CSV": lambda at: (at / "rows.csv").write_bytes(delimited(",")),
    "CSV, gzip": lambda at: (at / "rows.CSV.gz").write_bytes(gzip.compress(delimited(","))),
    "TSV": lambda at: (at / "rows.tsv").write_bytes(b"\xef\xbb\xbf" + delimited("\t")),
    "JSON lines": lambda at: (at / "rows.jsonl").write_bytes(lines(ROWS)),
    "JSON lines, gzip": lambda at: (at / "rows.jsonl.gz").write_bytes(gzip.compress(lines(ROWS))),
    "JSON lines, zstd": lambda at: (at / "rows.jsonl.zst").write_bytes(
        pa.compress(lines(ROWS), "zstd", asbytes=True)
    ),
    "Parquet": lambda at: pq.write_table(TABLE, at / "rows.parquet"),
    "Parquet, many row groups": lambda at: pq.write_table(TABLE, at / "rows.parquet", row_group_size=3),
    "Arrow": lambda at: arrow(TABLE, at / "rows.arrow"),
    "Feather": lambda at: pa.feather.write_feather(TABLE, at / "rows.feather", compression="zstd"),
    "Delta": lambda at: deltalake.write_deltalake(at / "rows", TABLE),
    "Iceberg": lambda at: iceberg(TABLE, at),
}


def put_into(engine: sa.Engine) -> None:
    columns = [
        sa.Column("id", sa.String(50), primary_key=True),
        sa.Column("text", LONG),
        sa.Column("answer", LONG),
    ]
    exact = {"mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}
    rows = sa.Table("rows", sa.MetaData(), *columns, **exact)
    with engine.begin() as connection:
        rows.create(connection)
        connection.execute(sa.insert(rows), ROWS)
    engine.dispose()


LONG = sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def sqlite_file(at: Path) -> str:
    url = f"sqlite:///{at}/crm.db"
    put_into(sa.create_engine(url))
    return url


def duckdb_file(at: Path) -> str:
    with duckdb.connect(f"{at}/crm.duckdb") as connection:
        connection.register("t", TABLE)
        connection.execute("CREATE TABLE rows AS FROM t")
    return f"duckdb:///{at}/crm.duckdb"


@pytest.fixture
def asked(server: ScriptedServer) -> Callable[[], list[str]]:
    """The prompts that reached the server since this was last called, in order."""
    seen = 0

    def new() -> list[str]:
        nonlocal seen
        posts = server.posts[seen:]
        seen += len(posts)
        return sorted(post.prompt for post in posts)

    return new


@pytest.fixture
def model(server: ScriptedServer) -> Iterator[VllmAPI]:
    with VllmAPI(identifier="m", api_url=server.url, retries=0) as made:
        yield made


def same_from(model: VllmAPI, asked: Callable[[], list[str]], home: Path, select: Any, **where: Any) -> None:
    """Predict and validate over the table; assert keys, prompts and scores."""
    report = model.predict_in_db("text", select, db=str(home), predict_id="p", max_failed=None, **where)
    assert (report.rows, report.succeeded, report.failed) == (len(ROWS), len(ROWS), 0), report
    assert asked() == sorted(TEXTS)
    outputs = Datalayer(url=str(home)).outputs("p").to_pylist()
    assert {row["id"]: row["output"] for row in outputs} == {r["id"]: f" {r['text']}!" for r in ROWS}
    again = model.predict_in_db("text", select, db=str(home), predict_id="p", **where)
    assert (again.processed, again.up_to_date) == (0, len(ROWS))


def scores_of(model: VllmAPI, home: Path, dataset: Dataset) -> tuple[str, float]:
    """The hash of the rows that were drawn, and the score."""
    validation = Validation(
        datasets=[dataset], metrics=[Metric(identifier="edit_similarity")], key=("text", "answer")
    )
    report = validate(model, validation, db=str(home))
    (found,) = report.datasets
    return found.dataset_hash, found.values[0].value


@pytest.mark.parametrize("kind", FILES)
def test_files(kind: str, tmp_path: Path, model: VllmAPI, asked: Callable[[], list[str]]) -> None:
    """Files in a lake are read by name and in a SELECT."""
    FILES[kind](tmp_path)
    same_from(model, asked, tmp_path, "rows")
    statement = model.predict_in_db("text", "SELECT * FROM rows", db=str(tmp_path), predict_id="s")
    assert statement.succeeded == len(ROWS)
    assert asked() == sorted(TEXTS)


@pytest.mark.parametrize("kind", ["pyarrow", "stream", "pandas", "polars", "duckdb"])
def test_frames(kind: str, tmp_path: Path, model: VllmAPI, asked: Callable[[], list[str]]) -> None:
    """Any object that supports Arrow's stream protocol is read in memory."""
    frame: Any = TABLE
    if kind == "stream":
        report = model.predict_in_db("text", TABLE.to_reader(7), db=str(tmp_path), predict_id="p")
        assert report.succeeded == len(ROWS)
        assert asked() == sorted(TEXTS)
        return
    if kind == "pandas":
        frame = in_pandas(TABLE)
    if kind == "polars":
        import polars

        frame = polars.from_arrow(TABLE)
    if kind == "duckdb":
        frame = duckdb.from_arrow(TABLE)
    same_from(model, asked, tmp_path, frame)


@pytest.mark.parametrize("kind", ["SQLite", "PostgreSQL", "MariaDB", "DuckDB"])
def test_databases_elsewhere(
    kind: str, tmp_path: Path, model: VllmAPI, asked: Callable[[], list[str]], request: pytest.FixtureRequest
) -> None:
    """Read there, written to a lake here."""
    if kind == "SQLite":
        url = sqlite_file(tmp_path)
    elif kind == "DuckDB":
        url = duckdb_file(tmp_path)
    elif kind == "PostgreSQL":
        postgres: Postgres = request.getfixturevalue("postgres")
        url = postgres.new_database()
        put_into(sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:")))
    else:
        if mariadb.binary() is None:
            pytest.skip("needs MariaDB: apt-get install mariadb-server")
        with mariadb.running() as url:
            put_into(sa.create_engine(url))
            same_from(model, asked, tmp_path / "home", "rows", source=url)
        return
    same_from(model, asked, tmp_path / "home", "rows", source=url)


def test_scores_are_the_same_from_all_stores(tmp_path: Path, model: VllmAPI) -> None:
    """A sample of the same texts is the same sample, with the same score, from each."""
    found = set()
    for kind, write in FILES.items():
        at = tmp_path / kind.replace(" ", "_")
        at.mkdir()
        write(at)
        found.add(scores_of(model, at, Dataset(identifier="v", select="rows", sample_size=12)))
    with closing(sqlite3.connect(tmp_path / "x.db")):
        url = sqlite_file(tmp_path)
    model_at = Validation(
        datasets=[Dataset(identifier="v", select="rows", sample_size=12)],
        metrics=[Metric(identifier="edit_similarity")],
        key=("text", "answer"),
    )
    (of_sqlite,) = validate(model, model_at, db=url).datasets
    found.add((of_sqlite.dataset_hash, of_sqlite.values[0].value))
    assert len(found) == 1


@pytest.mark.parametrize("kind", ["JSON lines", "Parquet", "Arrow", "Delta", "Iceberg", "polars", "DuckDB"])
def test_chat_messages(kind: str, tmp_path: Path, server: ScriptedServer, model: VllmAPI) -> None:
    """Lists of messages, in the formats that hold lists, arrive as they are."""
    rows = [{"id": i, "text": m} for i, m in enumerate(MESSAGES)]
    table = pa.Table.from_pylist(rows)
    select: Any = "rows"
    where: dict[str, Any] = {}
    if kind == "JSON lines":
        (tmp_path / "rows.jsonl").write_bytes(lines(rows))
    elif kind == "Parquet":
        pq.write_table(table, tmp_path / "rows.parquet")
    elif kind == "Arrow":
        arrow(table, tmp_path / "rows.arrow")
    elif kind == "Delta":
        deltalake.write_deltalake(tmp_path / "rows", table)
    elif kind == "Iceberg":
        iceberg(table, tmp_path)
    elif kind == "polars":
        import polars

        select = polars.from_arrow(table)
    else:
        with duckdb.connect(f"{tmp_path}/crm.duckdb") as connection:
            connection.register("t", table)
            connection.execute("CREATE TABLE rows AS FROM t")
        where = {"source": f"duckdb:///{tmp_path}/crm.duckdb"}
    report = model.predict_in_db("text", select, db=str(tmp_path), max_failed=None, **where)
    assert report.succeeded == len(rows), report
    sent = [post.body["messages"] for post in server.posts]
    assert sorted(map(json.dumps, sent)) == sorted(map(json.dumps, MESSAGES))


@pytest.mark.parametrize("select", ["rows", "rows.xlsx", "SELECT * FROM rows"])
def test_excel_is_refused_by_name(select: str, tmp_path: Path, model: VllmAPI) -> None:
    """The error names the way out, in whatever form the file is named."""
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(InvalidCall, match=r"rows\.xlsx.*pandas\.read_excel"):
        model.predict_in_db("text", select, db=str(tmp_path))


def test_outputs_beside_their_rows(tmp_path: Path, server: ScriptedServer, model: VllmAPI) -> None:
    """`outputs(source=)` has each row of the source in its order, and NULL where there is no output yet."""
    (tmp_path / "t.jsonl").write_bytes(lines([{"id": i, "text": f"t{i}", "n": [i]} for i in (3, 1, 2)]))
    model.predict_in_db("text", "t", db=str(tmp_path), predict_id="p", ids=[1, 3])
    found = Datalayer(url=str(tmp_path)).outputs("p", source="t").to_pylist()
    assert [(r["id"], r["text"], r["n"], r["output"]) for r in found] == [
        (3, "t3", [3], " t3!"),
        (1, "t1", [1], " t1!"),
        (2, "t2", [2], None),
    ]
    with pytest.raises(InvalidCall, match="both have a column 'output'"):
        Datalayer(url=str(tmp_path)).outputs("p", source="SELECT id, text AS output FROM t")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"source": 5}, "source=<int> is not a text"),
        ({"source": Datalayer(url="data")}, "source=<Datalayer> is not a text"),
        *(({"primary_id": key}, "must name one or more columns") for key in (None, 5, [], [5])),
    ],
)
def test_what_is_no_source_and_no_key_of_outputs(
    given: dict[str, Any], words: str, tmp_path: Path, model: VllmAPI
) -> None:
    """The error names the argument."""
    (tmp_path / "t.jsonl").write_bytes(lines([{"id": 1, "text": "a"}]))
    model.predict_in_db("text", "t", db=str(tmp_path), predict_id="p")
    with pytest.raises(InvalidCall, match=words):
        Datalayer(url=str(tmp_path)).outputs("p", **{"source": "t", **given})


def test_values_of_several_types_beside_their_outputs(tmp_path: Path, model: VllmAPI) -> None:
    """Such a column is JSON: a number keeps its digits, and no value becomes one of its neighbour's type."""
    said = (
        b"1.50",
        b"1e5",
        b"123456789012345678901234",
        b"true",
        '"\u00e9"'.encode(),
        b'{"a": 1.50}',
        b"[1, null]",
    )
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(b'{"id": %d, "x": %s}' % each for each in enumerate(said)))
    nanoseconds = pa.array([1, 10**18 + 1], pa.timestamp("ns"))
    pq.write_table(pa.table({"id": [0, 1], "x": nanoseconds}), tmp_path / "u.parquet")
    url = f"sqlite:///{tmp_path / 'x.db'}"
    with closing(sqlite3.connect(tmp_path / "x.db")) as con, con:
        con.execute("CREATE TABLE t (id integer PRIMARY KEY, x datetime)")
        con.execute("INSERT INTO t VALUES (0, '2024-01-02T03:04:05Z'), (1, '2024-01-02'), (2, 17), (3, NULL)")

    def beside(db: str, table: str) -> pa.ChunkedArray:
        model.predict_in_db("id", table, db=db, predict_id=table)
        return Datalayer(url=db).outputs(table, source=table)["x"]

    assert beside(str(tmp_path), "t").to_pylist() == [each.decode() for each in said]
    assert beside(str(tmp_path), "u").combine_chunks() == nanoseconds
    objects = ['{"a": [{"b": 1}]}', '{"a": [{"c": null}]}', "{}"]
    (tmp_path / "o.jsonl").write_text(
        "".join(f'{{"id": {i}, "x": {each}}}\n' for i, each in enumerate(objects))
    )
    assert beside(str(tmp_path), "o").to_pylist() == objects
    times = ['"2024-01-02 03:04:05+00:00"', '"2024-01-02 00:00:00"', "17", None]
    assert beside(url, "t").to_pylist() == times


def test_another_table_in_memory_is_told_by_its_rows(
    tmp_path: Path, model: VllmAPI, asked: Callable[[], list[str]]
) -> None:
    """A row whose key is known and whose content changed is processed again, the others are not."""
    one = pa.table({"id": [1, 2], "text": ["a", "b"]})
    other = pa.table({"id": [1, 2], "text": ["a", "other"]})
    for frame, wanted in ((one, ["a", "b"]), (one, []), (other, ["other"])):
        model.predict_in_db("text", frame, db=str(tmp_path), predict_id="p")
        assert asked() == wanted


@pytest.mark.parametrize("select", ["t", "SELECT * FROM t WHERE id IS NOT NULL"])
def test_lines_that_cannot_be_read_are_reported(select: str, tmp_path: Path, model: VllmAPI) -> None:
    """By name and in a SELECT, they are counted with file and line, and the other rows are processed."""
    good = lines([{"id": i, "text": f"t{i}"} for i in range(100)])
    (tmp_path / "t.jsonl").write_bytes(good + b'{"id": 100, "te\n' + b'{"text": "no key"}\n')
    report = model.predict_in_db("text", select, db=str(tmp_path), predict_id="p", max_failed=None)
    assert report.succeeded == 100
    assert report.unreadable == (2 if select == "t" else 1)
    assert "t.jsonl, line 101" in report.unreadable_lines[0]


UNREAD = {
    "rows.csv.bz2": r"unpack it, or pack lines of text as \.gz or \.zst",
    "rows.jsonl.xz": "unpack it",
    "rows.parquet.gz": "unpack it",
    "rows.zip": "unpack it",
    "rows.txt": r"link it as \.csv.*read=",
    "rows.XLSX": r"pandas\.read_excel",
    "rows.xml": r"pandas\.read_xml",
    "rows.ods": r"pandas\.read_excel",
    "rows.orc": r"pyarrow\.orc\.read_table",
    "rows.avro": r"polars\.read_avro",
}


@pytest.mark.parametrize("name", UNREAD)
def test_files_that_are_not_read_are_refused_by_name(name: str, tmp_path: Path, model: VllmAPI) -> None:
    """The error lists the formats that are read and the way out, in whatever form the file is named."""
    (tmp_path / name).write_bytes(b"PK")
    for select in ("rows", name, "SELECT * FROM rows", f"SELECT * FROM '{name}'"):
        with pytest.raises(InvalidCall, match=rf"{name}.*parquet, jsonl.*{UNREAD[name]}"):
            model.predict_in_db("text", select, db=str(tmp_path))


def test_rows_that_are_not_read_are_not_left_out(tmp_path: Path, model: VllmAPI) -> None:
    """A folder or a glob with one file that is not read is refused; a README beside the rows is none."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv").write_text("id,text\n1,a\n")
    (tmp_path / "rows" / "README.txt").write_text("About the rows.")
    assert model.predict_in_db("text", "rows", db=str(tmp_path)).succeeded == 1
    (tmp_path / "rows" / "b.csv.bz2").write_bytes(b"BZh")
    for select in ("rows", "rows/*", "SELECT * FROM rows"):
        with pytest.raises(InvalidCall, match=r"b\.csv\.bz2.*unpack it"):
            model.predict_in_db("text", select, db=str(tmp_path))
    assert model.predict_in_db("text", "rows/*.csv", db=str(tmp_path), same_source=True).up_to_date == 1
