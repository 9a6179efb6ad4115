"""A database: keys, names, statements and URLs that are refused."""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.servers.databases import TABLE, Place, every, keys, row, selection, sqlite
from vllm_tasks.datalayer.database.database import Database
from vllm_tasks.datalayer.database.dialects import backend
from vllm_tasks.datalayer.selection import OutputColumn, OutputTable
from vllm_tasks.errors import InvalidCall, TablesUnavailable


def test_bad_keys_are_refused_with_count_and_example(place: Place) -> None:
    """Keys that are NULL, not unique or floating are refused before any work."""
    place.sql(
        "CREATE TABLE t (id INTEGER, b INTEGER, f DOUBLE PRECISION, text TEXT)",
        "INSERT INTO t VALUES (1, 1, 1, 'a'), (7, 2, 1, 'b'), (7, 2, 1, 'c'), (7, 3, 1, 'd')",
        "INSERT INTO t VALUES (NULL, 4, 1, 'e')",
    )
    db = place.open()
    with pytest.raises(InvalidCall, match=r"id is not unique: 1 keys occur in 3 rows.* id=7 in 3"):
        db.check(selection())
    with pytest.raises(InvalidCall, match=r"id, b is not unique: 1 keys occur in 2 rows.* id=7, b=2 in 2"):
        db.check(selection(key=("id", "b")))
    with pytest.raises(InvalidCall, match=r"id, b is NULL in 1 rows, for example id=None, b=4"):
        db.check(selection("SELECT * FROM t WHERE b <> 2", key=("id", "b")))
    with pytest.raises(InvalidCall, match="'f' is a floating-point number"):
        db.check(selection(key=("f",)))
    db.check(selection("SELECT * FROM t WHERE b <> 2 AND id IS NOT NULL", key=("id", "b")))


@pytest.mark.parametrize("kind", ["f", "g", "j", "a", "r", "h", "hs", "xs"])
def test_postgres_types_that_are_no_keys(pg: Place, kind: str) -> None:
    """A domain counts as its base type; a type without a hash or an equality is refused."""
    pg.sql(
        "CREATE SCHEMA x",
        "CREATE EXTENSION IF NOT EXISTS hstore",
        "CREATE DOMAIN f AS real",
        "CREATE DOMAIN x.g AS f",
        "CREATE DOMAIN h AS hstore",
        "CREATE TABLE t (f f, g x.g, j jsonb, a integer[], r int4multirange, h h, hs hstore, text TEXT)",
        "ALTER TABLE t ADD xs hstore[]",
    )
    try:
        with pytest.raises(InvalidCall, match=f"the key '{kind}' is .*identify a row"):
            pg.open().check(selection(key=(kind,)))
    finally:
        pg.sql("DROP SCHEMA x CASCADE")


def test_a_domain_may_be_a_key(pg: Place) -> None:
    """A domain over text or numbers is kept as it is."""
    pg.sql(
        'CREATE DOMAIN "My Code" AS TEXT COLLATE "C"',
        'CREATE TABLE t (id "My Code" PRIMARY KEY, text TEXT)',
        "INSERT INTO t VALUES ('a', 'x'), ('b', 'y')",
    )
    db = pg.open()
    db.check(selection())
    db.writer(selection(), TABLE).commit([row("a")], [])
    db.writer(selection(), TABLE)
    assert keys(db, selection(ids=(("a",), ("b",)))) == ["b"]


def test_boolean_keys(place: Place) -> None:
    """True and False identify rows, and may be given as ids."""
    place.sql(
        "CREATE TABLE t (id INTEGER, b BOOLEAN, text TEXT, PRIMARY KEY (id, b))",
        "INSERT INTO t VALUES (1, TRUE, 'x'), (1, FALSE, 'y'), (2, FALSE, 'z')",
    )
    db = place.open()
    chosen = selection(key=("id", "b"), ids=((1, True), (2, True), (2, False)))
    db.check(chosen)
    writer = db.writer(chosen, TABLE)
    assert keys(db, chosen) == [(1, True), (2, False)]
    writer.commit([row(1, True, names=("id", "b"))], [])
    assert keys(db, chosen) == [(2, False)]
    with pytest.raises(InvalidCall, match="ids"):
        db.check(replace(chosen, ids=((True, True),)))


def test_half_a_character(place: Place) -> None:
    """A lone surrogate, which no database takes, is refused in a select, its names and ids."""
    place.sql("CREATE TABLE t (id VARCHAR(9) NOT NULL PRIMARY KEY, text TEXT)")
    db = place.open()
    for wrong in (
        selection("\ud800"),
        selection("SELECT id, '\ud800' AS text FROM t"),
        selection(key=("\ud800",)),
        selection(ids=(("\ud800",),)),
    ):
        with pytest.raises(InvalidCall, match=r"\\ud800"):
            db.check(wrong)


def test_a_statement_is_told_from_a_name_at_once(tmp_path: Path) -> None:
    """A statement is recognised after any number of comments."""
    place = sqlite(tmp_path)
    db = place.fill(1)
    began = time.thread_time()
    for odd in ("/**/" * 5000, "/**/ " * 5000 + "/*", "-- x\n(" * 5000, "/*" * 5000):
        with pytest.raises(InvalidCall, match="nor a SELECT"):
            db.check(selection(odd + "nothing"))
    db.check(selection("/**/" * 5000 + "SELECT * FROM t"))
    assert time.thread_time() - began < 2
    with pytest.raises(InvalidCall, match="exactly one SELECT statement"):
        db.check(selection("SELECT 1; SELECT 2"))
    db.close()


def test_parameters_in_a_statement_are_refused(place: Place) -> None:
    """A driver would leave them NULL, or fill them with a value of ours; in a text they are characters."""
    db = place.fill(1)
    with pytest.raises(InvalidCall, match=r"has a parameter, such as \$1|number of bindings"):
        db.check(selection("SELECT id, $1 AS text FROM t"))
    db.check(selection("SELECT id, '$1' AS text FROM t -- $1"))
    db.close()


def test_unique_keys_cost_nothing_where_an_index_says_so(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """A primary key or a plain unique index is believed; a partial one, or one on an expression, is not."""
    caplog.set_level(logging.INFO, "vllm_tasks")
    place.sql(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, u TEXT NOT NULL UNIQUE, p TEXT, e TEXT, text TEXT)",
        "CREATE UNIQUE INDEX partial ON t (p) WHERE p <> 'x'",
        "CREATE UNIQUE INDEX expression ON t (lower(e))",
        "INSERT INTO t VALUES (1, '1', 'x', 'e', ''), (2, '2', 'y', 'f', '')",
    )
    db = place.open()
    for key in [("id",), ("u",), ("id", "e")]:
        db.check(selection(key=key))
        assert not caplog.records
    for key in [("p",), ("e",), ("p", "e")]:
        db.check(selection(key=key))
        assert "no unique index" in caplog.text
        caplog.clear()
    place.sql("CREATE TABLE n (id TEXT UNIQUE)", "INSERT INTO n VALUES ('a'), (NULL), (NULL)")
    with pytest.raises(InvalidCall, match="id is NULL in 2 rows"):
        db.check(selection("n", columns=()))
    assert not caplog.records


def test_postgres_indexes_that_promise_nothing(pg: Place) -> None:
    """An index left invalid, and one on the parent of inherited tables, are not believed."""
    pg.sql("CREATE TABLE t (id INTEGER NOT NULL, text TEXT)", "INSERT INTO t VALUES (1, ''), (1, '')")
    alone = pg.engine.execution_options(isolation_level="AUTOCOMMIT")
    with alone.connect() as connection, pytest.raises(sa.exc.IntegrityError):
        connection.exec_driver_sql("CREATE UNIQUE INDEX CONCURRENTLY bad ON t (id)")
    pg.sql("CREATE TABLE p (id INTEGER PRIMARY KEY, text TEXT)", "CREATE TABLE c () INHERITS (p)")
    pg.sql("INSERT INTO p VALUES (1, '')", "INSERT INTO c VALUES (1, '')")
    for table in ("t", "p"):
        with pytest.raises(InvalidCall, match="not unique"):
            pg.open().check(selection(table))


def test_names_that_are_not_there(place: Place) -> None:
    """An unknown table or column is refused with the nearest name and what there is."""
    db = place.fill()
    place.sql("CREATE VIEW seen AS SELECT * FROM t")
    db.check(selection("seen"))
    db.check(selection("main.t" if place.sqlite else "public.t"))
    with pytest.raises(
        InvalidCall, match=r"'sen' is neither a table .* did you mean 'seen'\?; there is .*'t'"
    ):
        db.check(selection("sen"))
    with pytest.raises(
        InvalidCall, match=r"'t' has no column 'txt'; did you mean 'text'\?; there is 'id', 'text'"
    ):
        db.check(selection(columns=("txt",)))
    if not place.sqlite:  # which calls the second `id:1`
        with pytest.raises(InvalidCall, match="more than one column 'id'"):
            db.check(selection("SELECT a.*, b.* FROM t a JOIN t b ON a.id = b.id"))
    for wrong in [
        "",
        "DELETE FROM t",
        "SELECT nope FROM t",
        "SELECT 1 AS id, '\0' AS text",
        "SELECT",
        "VALUES (1)",
        "t; DROP TABLE t",
    ]:
        with pytest.raises(InvalidCall):
            db.check(selection(wrong))


HOSTILE = [
    'a"b',
    "a'b; DROP TABLE t; --",
    "100%",
    "%s %(x)s",
    ":x ::y",
    "a b.c",
    "größe 数",
    "select",
    "\\:q [z]",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_names(place: Place, name: str) -> None:
    """Quotes, semicolons, percents, colons, spaces and words of SQL in names are quoted."""
    table, column, text = ('"' + n.replace('"', '""') + '"' for n in (f"t {name}", name, name + "2"))
    place.sql(
        f"CREATE TABLE {table} ({column} INTEGER NOT NULL PRIMARY KEY, {text} TEXT)",
        f"INSERT INTO {table} VALUES (1, 'x'), (2, 'y')",
    )
    db = place.open()
    outputs = f"_outputs__{name}"
    chosen = selection(f"t {name}", key=(name,), columns=(name + "2",), outputs=outputs, ids=((1,), (2,)))
    db.check(chosen)
    writer = db.writer(chosen, OutputTable(outputs, (OutputColumn(name + "3", "json"),)))
    assert [r.values for r in every(db, chosen)] == [("x",), ("y",)]
    made = row(1, names=(name,)) | {name + "3": {name: name}}
    del made["output"]
    writer.commit([made], [(1,)])
    assert [r.key for r in every(db, chosen)] == [(2,)]
    assert db.outputs(outputs).column_names[:2] == [name, name + "3"]


def test_a_statement_is_read_as_it_is_written(place: Place) -> None:
    """Colons, percents, backslashes, comments and a semicolon at the end reach the database unchanged."""
    db = place.fill(3)
    text = r"a:id %s 100% \:x %(y)s ::z {b} ; --"
    select = f"-- first\n/* % :x */ SELECT id, '{text}' AS text FROM t WHERE id % 2 = 0 ; \n"
    db.check(selection(select))
    assert [(r.key[0], r.values[0]) for r in every(db, selection(select))] == [(0, text), (2, text)]
    with_ = "WITH x AS (SELECT * FROM t WHERE id = 1) SELECT * FROM x -- the end"
    db.check(selection(with_))
    assert keys(db, selection(with_)) == [1]


WRITES = [
    "WITH gone AS (DELETE FROM t RETURNING *) SELECT * FROM gone",
    "SELECT * FROM t; DELETE FROM t",
    "SELECT 1 AS id, '' AS text) AS s; COMMIT; DELETE FROM t; SELECT * FROM (SELECT 1 AS id, '' AS text",
    "SELECT writes() AS id, '' AS text",
    "SELECT nextval('numbers') AS id, '' AS text",
]


@pytest.mark.parametrize("select", WRITES)
def test_a_select_that_writes_is_refused(place: Place, select: str) -> None:
    """Nothing is written by any `select`, at any stage."""
    db = place.fill(3)
    if not place.sqlite:
        place.sql(
            "CREATE SEQUENCE numbers",
            "CREATE FUNCTION writes() RETURNS BIGINT LANGUAGE sql AS 'DELETE FROM t RETURNING id'",
        )
    for step in (
        lambda: db.check(selection(select)),
        lambda: every(db, selection(select)),
        lambda: db.count(selection(select)),
    ):
        with pytest.raises(InvalidCall):
            step()
        assert place.sql("SELECT count(*) FROM t") == [(3,)]
    if not place.sqlite:
        assert place.sql("SELECT is_called FROM numbers") == [(False,)]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("postgresql://u:s3cret@h:port/d", "not a SQLAlchemy URL"),
        ("postgresql://u:s3cret@127.0.0.1:9/d?nonsense=s3cret", "nonsense"),
        ("nonsense://u:s3cret@h/d", "'nonsense' is not a dialect"),
        ("postgresql+asyncpg://u:s3cret@h/d", "needs the driver psycopg"),
        ("postgresql+psycopg2://u:s3cret@h/d", "needs the driver psycopg"),
        ("postgresql+psycopg_async://u:s3cret@h/d", "needs the driver psycopg"),
        ("mysql://u:s3cret@h/d", r"driver.*vllm-tasks\[mysql\]', and begin the url with mysql\+pymysql://"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "in memory"),
        ("sqlite:////nowhere/x.db", "there is no database '/nowhere/x.db'"),
    ],
)
def test_urls_that_cannot_be_meant(url: str, told: str) -> None:
    """A URL is refused for a reason, without its password."""
    with pytest.raises(InvalidCall, match=told) as refused:
        Database(url).check(selection())
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["mysql+pymysql://u:s3cret@h/d?local_infile=1", "mariadb+mysqlconnector://h/d?allow_local_infile=true"],
)
def test_no_server_may_ask_for_files_of_this_machine(url: str) -> None:
    """A server that a block names could read what the site does not allow (LOAD DATA LOCAL INFILE)."""
    with pytest.raises(
        InvalidCall, match="with which the server may read any file of this machine"
    ) as refused:
        backend(url)
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://h/d?passfile={}/.pgpass",
        "postgresql://h/d?sslmode=require&sslkey={}/key.pem",
        "mysql+pymysql://h/d?read_default_file={}/my.cnf",
        "mysql+pymysql://h/d?ssl_ca={}/ca.pem",
    ],
)
def test_files_of_a_url_are_in_allowed_places(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A password of such a file would be sent to the server; a socket is no such file."""
    monkeypatch.setenv("VLLM_TASKS_PLACES", f'["{tmp_path}/allowed"]')
    with pytest.raises(InvalidCall, match="outside the places that this site allows"):
        backend(url.format(tmp_path))
    backend(url.format(tmp_path / "allowed"))


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install for psycopg."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(InvalidCall, match=r"pip install 'vllm-tasks\[postgres\]'"):
        Database("postgresql://u@h/d")


def test_the_password_is_never_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither `where` nor an error shows the password; a server that is away counts as temporary."""
    db = Database("postgresql://u:s3cret@127.0.0.1:9/d?password=s3cret")
    assert db.where("x") == "table x in postgresql://u@127.0.0.1:9/d"
    with pytest.raises(TablesUnavailable) as lost:
        db.check(selection())
    error: BaseException | None = lost.value
    while error:
        assert "s3cret" not in f"{error} {error!r}"
        error = error.__cause__
    monkeypatch.chdir(tmp_path)
    Path("t.db").touch()
    relative = Database("sqlite:///t.db")
    monkeypatch.chdir("/")
    assert relative.where("x") == f"table x in sqlite:///{tmp_path}/t.db"
    with pytest.raises(InvalidCall, match="no table 'x'"):
        relative.outputs("x")
    relative.close()
    db.close()


def test_no_right_to_write(place: Place, tmp_path: Path) -> None:
    """A database that may only be read is the call's fault, and no reason to wait."""
    db = place.fill()
    if place.sqlite:
        if os.getuid() == 0:
            pytest.skip("root writes everywhere")
        (tmp_path / "t.db").chmod(0o444)
    else:
        place.sql("DO $$ BEGIN CREATE ROLE reader LOGIN; EXCEPTION WHEN duplicate_object THEN END $$")
        place.sql("GRANT SELECT ON t TO reader")
        place.url = place.url.replace("tests@", "reader@")
        db = place.open()
        assert keys(db, selection()) == list(range(10))
    with pytest.raises(InvalidCall, match=r"permission denied|readonly"):
        db.writer(selection(), TABLE)
