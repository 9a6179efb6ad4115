"""Lines of text files that are no rows, as a run reports them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.errors import TooManyFailed
from vllm_tasks.validation import Dataset, Metric, Validation
from vllm_tasks.validation.run import validate


@pytest.fixture
def model(server: ScriptedServer, tmp_path: Path) -> Iterator[VllmAPI]:
    with VllmAPI(identifier="m", api_url=server.url, db=str(tmp_path), retries=0) as model:
        yield model


@pytest.mark.parametrize("select", ["t", "SELECT id, text FROM t", "SELECT * FROM t"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_a_file_without_any_good_line_is_no_empty_table(
    model: VllmAPI, tmp_path: Path, name: str, select: str
) -> None:
    """A file that ends its lines with CR alone, or is no JSON at all: its lines are counted."""
    lines = {"t.jsonl": '{"id": 1, "text": "a"}\r{"id": 2, "text": "b"}\r', "t.json": "x"}
    (tmp_path / name).write_text(lines[name])
    if select.startswith("SELECT *"):
        with pytest.raises(InvalidCall, match=r"'t' has no columns.*no JSON"):
            model.predict_in_db("text", select, max_failed=None)
        return
    report = model.predict_in_db("text", select, max_failed=None)
    assert (report.rows, report.unreadable) == (0, 1)
    assert "no JSON" in report.unreadable_lines[0]
    with pytest.raises(TooManyFailed, match="could not be read"):
        model.predict_in_db("text", select, max_failed=0)


def test_unreadable_lines_are_reported_with_a_limit(model: VllmAPI, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('x\ny\n{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    report = model.predict_in_db("text", "t", max_failed=None, limit=1)
    assert (report.succeeded, report.unreadable) == (1, 2)


def test_fragments_of_a_text_without_quotes_end_no_run(model: VllmAPI, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,text\n1,hello\nRegards\n2,x\nRegards\n3,y\n")
    report = model.predict_in_db("text", "t", max_failed=None)
    assert (report.succeeded, report.failed, report.unreadable) == (3, 0, 2)


def test_a_validation_of_no_good_line_says_so(model: VllmAPI, tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text("x\n")
    sets = [Dataset(identifier="v", select="v")]
    metrics = [Metric(identifier="exact_match")]
    with pytest.raises(InvalidCall, match=r"1 rows of 'v' cannot be read: .*line 1: no JSON"):
        validate(model, Validation(datasets=sets, metrics=metrics, key=("q", "a")))


# --- a SELECT: a row depends on itself, and on the columns that are named ---


def answered(model: VllmAPI, select: str, column: str = "text") -> dict[object, str]:
    """Prompts by key."""
    return {row.key[0]: row.prompt or str(row.error) for row in model.preview(column, select, n=50).rows}


def test_columns_that_a_select_does_not_name_cost_it_no_row(model: VllmAPI, tmp_path: Path) -> None:
    """Bytes that are no text, half a character in a value or a name, a name that is there twice."""
    (tmp_path / "c.csv").write_bytes(b"id,text,gr\xf6,,\n1,a,b,,\n2,b,\xff,,\n")
    (tmp_path / "j.jsonl").write_text(
        '{"id":"1","text":"a","x":"\\ud83d"}\n{"id":"2","text":"b","\\ud83d":1}\n'
    )
    for table in ("c", "j"):
        for select in (
            f"SELECT id, text FROM {table}",
            f"WITH x AS (SELECT id, text FROM {table}) SELECT x.id, x.text FROM x",
            f"SELECT a.id, b.text FROM {table} a JOIN {table} b USING (id)",
        ):
            assert answered(model, select) == {"1": "a", "2": "b"}
    assert answered(model, "SELECT * FROM j") == {"2": "b"}
    with pytest.raises(InvalidCall, match=r"2 columns named ''.*'header'"):
        answered(model, "SELECT * FROM c")


def test_a_whole_row_and_all_columns_of_a_select(model: VllmAPI, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,text,x\n1,a,b\n")
    assert answered(model, "SELECT t.id, t.x AS text FROM t") == {"1": "b"}
    assert answered(model, "SELECT id, CAST(t AS VARCHAR) AS text FROM t") == {
        "1": "{'id': 1, 'text': a, 'x': b}"
    }
    assert answered(model, "SELECT count(*)::VARCHAR AS text, 1 AS id FROM t") == {1: "1"}
    assert answered(model, "SELECT u.id, u.text FROM (SELECT COLUMNS('id|text') FROM t) u") == {"1": "a"}
    assert answered(model, "SELECT ID AS id, TEXT AS text FROM t") == {"1": "a"}
    assert answered(model, "SELECT id, text FROM t NATURAL JOIN (SELECT '1' AS id, 'b' AS x)") == {"1": "a"}


def test_two_names_that_are_one_in_sql(model: VllmAPI, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,Text,text\n1,a,b\n")
    with pytest.raises(InvalidCall, match="'Text' and 'text', which are one in SQL"):
        answered(model, "SELECT id, text AS input FROM t", "input")
    assert answered(model, "SELECT id FROM t", "id") == {"1": "1"}


def test_an_empty_file_in_a_select(model: VllmAPI, tmp_path: Path) -> None:
    for name in ("c.csv", "j.jsonl", "d.json"):
        (tmp_path / name).write_text("")
        report = model.predict_in_db("text", f"SELECT t.id, text FROM '{name}' t WHERE text <> ''")
        assert report.rows == 0
        with pytest.raises(InvalidCall, match="has no columns: it is empty"):
            model.predict_in_db("text", f"SELECT * FROM '{name}'")


def test_a_late_number_changes_no_text_before(model: VllmAPI, tmp_path: Path) -> None:
    """Texts beside numbers and bools: compared, joined and cast as they are alone."""
    alone = '{"id": "b", "lang": "de", "text": "x"}\n'
    late = '{"id": 5, "lang": 7, "text": 12.50}\n{"id": true, "lang": null, "text": null}\n'
    cast = "SELECT CAST(id AS VARCHAR) AS id, text FROM t"
    for content in (alone, alone + late):
        (tmp_path / "t.jsonl").write_text(content)
        assert answered(model, f"{cast} WHERE lang = 'de'") == {"b": "x"}
        assert answered(model, f"{cast} WHERE lang IN ('de', 'fr') AND lang || '' = 'de'") == {"b": "x"}
    assert {key: text[:5] for key, text in answered(model, cast).items()} == {
        "b": "x", "5": "12.50", "true": "promp",
    }  # fmt: skip
    assert answered(model, f"{cast} WHERE lang IS NULL").keys() == {"true"}
    with pytest.raises(InvalidCall, match=r"'id' has texts and other values.*CAST\(\"id\" AS VARCHAR\)"):
        answered(model, "SELECT id, text FROM t")


def test_numbers_of_several_kinds_are_compared_as_numbers(tmp_path: Path, model: VllmAPI) -> None:
    """In a SELECT over JSON lines 9.25 is more than 9, even next to whole numbers."""
    (tmp_path / "t.jsonl").write_text('{"id": 1, "n": 10}\n{"id": 2, "n": 9.25}\n{"id": 3, "n": 8.50}\n')
    report = model.predict_in_db("id", "SELECT id, n FROM t WHERE n > 9", db=str(tmp_path))
    assert report.succeeded == 2
