"""A lake on an object store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import s3fs

from tests.datalayer.lake.rivals import exactly_once, run_rivals, start_rival
from tests.datalayer.lake.rows import OUT, ROWS, TABLE, committed, keys, refusal, row, selection, write_source
from tests.servers import object_store
from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.datalayer.selection import OutputTable
from vllm_tasks.errors import InvalidCall, TablesUnavailable

# ---------------------------------------------------------------------- outputs


@pytest.mark.parametrize("sign", ["#", "?", "%41", "\n"])
def test_names_that_a_url_does_not_hold(bucket: str, sign: str) -> None:
    """A name that delta-rs would shorten on an object store, so that two tables become one, is refused."""
    lake = Lake(bucket)
    with pytest.raises(InvalidCall, match=r"a Delta table cannot be in .* give another predict_id"):
        lake.outputs(f"a{sign}1")
    lake.close()


def test_a_folder_with_files_is_not_taken_for_outputs(lake: Lake, folder: Path, bucket: str) -> None:
    """Outputs never go among files of the user's, which cleaning up would remove; nor outside the lake."""
    (folder / OUT).mkdir()
    (folder / OUT / "notes.txt").write_text("mine")
    with pytest.raises(InvalidCall, match=r"is not a Delta table but has files, for example 'notes.txt'"):
        lake.writer(selection(), TABLE)
    assert [p.name for p in (folder / OUT).iterdir()] == ["notes.txt"]
    (folder / OUT / "notes.txt").unlink()
    lake.writer(selection(), TABLE).close()
    for name in ("../x", "a/b", "a\\b", "..", ""):
        with pytest.raises(InvalidCall, match="cannot name a table"):
            lake.writer(selection(outputs=name), OutputTable(name, TABLE.columns))
        with pytest.raises(InvalidCall, match="cannot name a table"):
            lake.outputs(name)
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    fs.pipe(f"{bucket}3/t.csv", b"id,text\n1,a\n")
    fs.pipe(f"{bucket}3/{OUT}/notes.txt", b"mine")
    remote = Lake(f"{bucket}3")
    with pytest.raises(InvalidCall, match=r"has files, for example 'notes.txt'"):
        remote.writer(selection(), TABLE)
    remote.close()


# ---------------------------------------------------------------------- object stores


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of a real S3 server on loopback."""
    with object_store.running() as url:
        yield url


def test_an_object_store(bucket: str, tmp_path: Path) -> None:
    """Over S3 every format is read, and outputs are written, found, replaced and reconciled."""
    fs = s3fs.S3FileSystem(skip_instance_cache=True)
    for ending in ("parquet", "jsonl.gz", "csv"):
        write_source(tmp_path / f"x.{ending}", ROWS)
        fs.pipe(f"{bucket}/{ending[:3]} (x'.{ending}", (tmp_path / f"x.{ending}").read_bytes())
    lake = Lake(bucket)
    for select in ("par (x'", "jso (x'.jsonl.gz", "*.csv", 'SELECT * FROM "par (x\'"'):
        lake.check(selection(select))
        assert keys(lake, selection(select)) == [str(i) if "csv" in select else i for i in range(10)]
    chosen = selection("par (x'")
    writer, rival = lake.writer(chosen, TABLE), lake.writer(chosen, TABLE)
    writer.commit([row(i) for i in range(5)], [])
    rival.commit([row(4, "rival"), row(5, "rival")], [])
    writer.commit([row(5, "mine"), row(0, "redone")], [(0,)])
    assert committed(lake) == [(0, "redone"), (1, "o"), (2, "o"), (3, "o"), (4, "rival"), (5, "mine")]
    assert keys(lake, chosen) == [6, 7, 8, 9]
    assert lake.where(OUT) == f"{bucket}/{OUT}"
    assert "it has '_outputs__m', \"csv (x'\"" in refusal(lake, selection("nope"))
    with pytest.raises(InvalidCall, match="cannot read"):
        lake.check(selection("SELECT * FROM read_text('s3://other/x')"))
    writer.close()
    rival.close()
    lake.close()


def test_tables_that_are_put_on_an_object_store(bucket: str) -> None:
    """Tables are created, replaced by key, and read by name in a SELECT that filters by text."""
    lake = Lake(f"{bucket}-new")
    assert not lake.has("scores")
    for score in (0.5, 1.5):
        rows = [{"run": run, "score": score} for run in ("a", "b")]
        lake.put("scores", pa.Table.from_pylist(rows), ["run"])
    assert lake.has("scores")
    found = list(lake.read("""SELECT "score" FROM "scores" WHERE "run" = 'b'"""))
    assert found == [[{"score": 1.5}]]
    lake.close()


def test_rival_processes_on_an_object_store(bucket: str) -> None:
    """Two processes that write the same keys over S3 are reconciled, too."""
    s3fs.S3FileSystem(skip_instance_cache=True).pipe(
        f"{bucket}2/t.jsonl", "".join(f'{{"id": {i}, "text": "x"}}\n' for i in range(12)).encode()
    )
    run_rivals([start_rival(f"{bucket}2", name) for name in "ab"])
    lake = Lake(f"{bucket}2")
    exactly_once(lake, set(range(12)))
    lake.close()


def test_an_object_store_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store that does not respond counts as temporary; a missing bucket does not."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    lake = Lake("s3://bucket/lake")
    with pytest.raises(TablesUnavailable, match="cannot"):
        lake.outputs(OUT)
    with pytest.raises(TablesUnavailable, match="cannot list"):
        lake.check(selection())
    lake.close()
