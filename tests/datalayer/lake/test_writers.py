"""A lake holds each key exactly once: concurrent writers, crashes, full disks, compaction."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from deltalake.table import TableOptimizer

from tests.datalayer.lake.rivals import exactly_once, go, run_rivals, start_rival
from tests.datalayer.lake.rows import FLAT, OUT, ROWS, TABLE, committed, jsonl, keys, row, selection
from vllm_tasks.datalayer.lake import delta_writer
from vllm_tasks.datalayer.lake.lake import Lake
from vllm_tasks.datalayer.selection import OutputTable
from vllm_tasks.errors import TablesUnavailable


@pytest.mark.parametrize("ids", [(0, 0), (0, 1)])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_rival_beside_a_compaction(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, moment: str, ids: tuple[int, int]
) -> None:
    """A concurrent commit right before or after a compaction, of one file or of two, is replaced."""
    writer, rival = lake.writer(selection(), TABLE), lake.writer(selection(), TABLE)
    compact = TableOptimizer.compact

    def beside(self: TableOptimizer, **given: Any) -> Any:
        if moment == "before":
            rival.commit([row(100, "rival")], [])
        done = compact(self, **given)
        if moment == "after":
            rival.commit([row(100, "rival")], [])
            self.table.update_incremental()  # the last that `compact` does itself
        return done

    with monkeypatch.context() as patch:
        patch.setattr(delta_writer, "COMPACT_EVERY", 2)
        patch.setattr(delta_writer, "SMALL_FILES", 1)
        patch.setattr(TableOptimizer, "compact", beside)
        for i in ids:
            writer.commit([row(i)], [])
    writer.commit([row(100, "mine")], [])
    assert committed(lake) == [*((i, "o") for i in sorted(set(ids))), (100, "mine")]
    writer.close()
    rival.close()


def test_keys_that_a_rival_wrote_are_replaced_however_long_ago(lake: Lake) -> None:
    """The last commit wins completely, also if this writer has committed other keys since the other one's."""
    writer, rival = lake.writer(selection(), TABLE), lake.writer(selection(), TABLE)
    rival.commit([row(1, "rival"), row(2, "rival")], [])
    writer.commit([row(5, "mine")], [])
    writer.commit([row(6, "mine")], [])
    writer.commit([row(1, "mine")], [])
    rival.commit([row(5, "rival"), row(1, "rival again")], [(1,)])
    writer.commit([row(2, "mine")], [])
    assert committed(lake) == [(1, "rival again"), (2, "mine"), (5, "rival"), (6, "mine")]
    writer.close()
    rival.close()


def test_a_commit_repeated_after_a_lost_acknowledgement(lake: Lake) -> None:
    """The same call again, from a writer that does not know of its success, changes nothing."""
    writer = lake.writer(selection(), FLAT)
    blind = lake.writer(selection(), FLAT)
    call = ([row(1, "a", _position=0), row(1, "b", _position=1), row(2, "c", _position=0)], [])
    writer.commit(*call)
    blind.commit(*call)
    assert committed(lake) == [(1, "a"), (1, "b"), (2, "c")]
    writer.close()
    blind.close()


@pytest.mark.parametrize("table", [TABLE, FLAT])
def test_one_writer_that_commits_a_key_again(lake: Lake, table: OutputTable) -> None:
    """A commit repeated on the same writer, now or much later, replaces itself for any `redo`."""
    writer = lake.writer(selection(), table)
    positions = (0, 1) if table.flatten else (None,)

    def call(*ids: int, text: str = "o") -> list[dict[str, Any]]:
        return [row(i, text) | ({"_position": p} if table.flatten else {}) for i in ids for p in positions]

    for _ in range(3):
        writer.commit(call(1, 2), [])
    writer.commit(call(3), [(3,)])
    writer.commit(call(3), [(3,)])
    writer.commit(call(1, 4, text="again"), [])
    wanted = [(1, "again"), (2, "o"), (3, "o"), (4, "again")]
    assert committed(lake) == sorted(wanted * len(positions))
    writer.close()


def test_a_key_twice_in_one_commit(lake: Lake) -> None:
    """If a source gives a key twice, its later output is kept completely."""
    writer = lake.writer(selection(), TABLE)
    writer.commit([row(1, "a"), row(2, "b"), row(1, "c")], [])
    writer.commit([row(2, "d"), row(2, "e"), row(3, "f")], [(2,)])
    assert committed(lake) == [(1, "c"), (2, "e"), (3, "f")]
    writer.close()
    flat = lake.writer(selection(outputs="flat"), OutputTable("flat", FLAT.columns, flatten=True))
    flat.commit([row(1, f"a{p}", _position=p) for p in (0, 1, 2)] + [row(1, "b", _position=None)], [])
    assert lake.outputs("flat").select(["id", "output"]).to_pylist() == [{"id": 1, "output": "b"}]
    flat.close()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_around_the_write(lake: Lake, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Ctrl-C right before or after rows are written: the same call again leaves each key once."""
    writer = lake.writer(selection(), TABLE)
    write = delta_writer.write_deltalake

    def interrupted(*given: Any, **named: Any) -> None:
        if moment == "after":
            write(*given, **named)
        raise KeyboardInterrupt

    for ids in ((1, 2), (3,)):
        with monkeypatch.context() as patch:
            patch.setattr(delta_writer, "write_deltalake", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.commit([row(i) for i in ids], [])
        writer.commit([row(i, "again") for i in ids], [])
    assert committed(lake) == [(1, "again"), (2, "again"), (3, "again")]
    writer.close()


def test_a_compaction_that_fails(
    lake: Lake, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that are written stay acknowledged when tidying up fails, in a commit and at the end."""
    monkeypatch.setattr(delta_writer, "COMPACT_EVERY", 3)
    monkeypatch.setattr(delta_writer, "SMALL_FILES", 2)

    def fails(self: Any, **_: Any) -> None:
        raise OSError("No space left on device")

    writer = lake.writer(selection(), TABLE)
    with monkeypatch.context() as patch, caplog.at_level("WARNING"):
        patch.setattr(TableOptimizer, "compact", fails)
        for i in range(3):
            writer.commit([row(i)], [])
        assert "were not compacted: No space left" in caplog.text
        caplog.clear()
        writer.close()
        assert "were not compacted: No space left" in caplog.text
    writer = lake.writer(selection(), TABLE)
    writer.commit([row(3)], [])
    with monkeypatch.context() as patch, caplog.at_level("WARNING"):
        patch.setattr(DeltaTable, "vacuum", fails)
        writer.close()
    assert "were not removed: No space left" in caplog.text
    assert committed(lake) == [(i, "o") for i in range(4)]


def test_four_processes_that_write_the_same_keys(lake: Lake, folder: Path) -> None:
    """Every key is there exactly once, with all positions of one writer, and no writer fails."""
    jsonl(folder / "t.jsonl", [{"id": i, "text": ""} for i in range(60)])
    run_rivals([start_rival(str(folder), name) for name in "abcd"])
    exactly_once(lake, set(range(60)))


def test_a_killed_writer_loses_nothing_committed(lake: Lake, folder: Path) -> None:
    """SIGKILL at any moment leaves complete commits; the next writers resume, and each key is there once."""
    jsonl(folder / "t.jsonl", [{"id": i, "text": ""} for i in range(120)])
    acknowledged: set[int] = set()
    *killed, last = [start_rival(str(folder), "f") for _ in range(4)]
    for process in killed:
        go([process])
        time.sleep(random.uniform(0.05, 0.5))
        process.kill()
        lines, _ = process.communicate()
        acknowledged |= {int(word) for word in lines.split()}
        there = set(lake.outputs(OUT)["id"].to_pylist())
        assert acknowledged <= there
        exactly_once(lake, there)
        assert set(keys(lake, selection())) == set(range(120)) - there
    run_rivals([last])
    exactly_once(lake, set(range(120)))


def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is `TablesUnavailable`, nothing partial is visible, and later the same call succeeds."""
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)],
            capture_output=True,
            check=False,
        ).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    lake = Lake(str(tmp_path))
    try:
        jsonl(tmp_path / "t.jsonl", ROWS)
        writer = lake.writer(selection(), TABLE)
        writer.commit([row(1)], [])
        filler = tmp_path / "filler"
        filler.write_bytes(b"0" * 300_000)
        noise = random.Random(1).randbytes(60_000).hex()
        for redo in ([], [(1,)]):
            with pytest.raises(TablesUnavailable, match="No space left"):
                writer.commit([row(1 if redo else 2, noise)], redo)
            assert committed(lake) == [(1, "o")]
        filler.unlink()
        for orphan in Path(lake.where(OUT)).glob("*.tmp"):
            orphan.unlink()
        writer.commit([row(1, noise), row(2, "two")], [(1,)])
        assert committed(lake) == [(1, noise), (2, "two")]
        writer.commit([row(3, "three")], [])
        monkeypatch.setattr(delta_writer, "SMALL_FILES", 1)
        free = os.statvfs(tmp_path)
        filler.write_bytes(b"0" * (free.f_bavail * free.f_frsize - 30_000))
        writer.close()
        assert "were not compacted" in caplog.text
        assert committed(lake) == [(1, noise), (2, "two"), (3, "three")]
    finally:
        lake.close()
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_compaction_keeps_contents_and_rivals_go_on(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small files become few next to a concurrent writer and a reader; nothing is lost or doubled."""
    monkeypatch.setattr(delta_writer, "COMPACT_EVERY", 30)
    monkeypatch.setattr(delta_writer, "SMALL_FILES", 20)
    writer, rival = lake.writer(selection(), TABLE), lake.writer(selection(), TABLE)
    rival.commit([row(1000, "rival")], [])
    for i in range(95):
        writer.commit([row(i, f"o{i}")], [])
        if i == 50:
            snapshot = DeltaTable(lake.where(OUT)).to_pyarrow_dataset()
    rival.commit([row(3, "rival"), row(1001, "rival")], [])
    writer.commit([row(1000, "mine")], [])
    writer.close()
    rival.close()
    files = DeltaTable(lake.where(OUT)).file_uris()
    assert len(files) < 25
    mine = {i: f"o{i}" for i in range(95)}
    assert dict(committed(lake)) == mine | {3: "rival", 1000: "mine", 1001: "rival"}
    assert lake.outputs(OUT).num_rows == 97
    assert snapshot.count_rows() == 52
    assert any(Path(lake.where(OUT), "_delta_log").glob("*.json"))


def test_the_temporary_folder_goes_with_the_lake(folder: Path, tmp_path: Path) -> None:
    """Closing leaves no file where queries spill to."""
    lake = Lake(str(folder))
    spill = lake.workspace._folder.path
    lake.check(selection("SELECT id, text FROM (SELECT hash(x) AS id, x AS text FROM range(12000000) r(x))"))
    assert any(spill.iterdir())
    lake.close()
    assert not spill.exists()
    with pytest.raises(TablesUnavailable, match="was closed"):
        lake.check(selection())
