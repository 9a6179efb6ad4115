"""Links in a lake are followed wherever a table is named, each file once, and only to allowed places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import Datalayer, InvalidCall, VllmAPI


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """A lake with links to a file and to a folder outside of it, and one within."""
    for folder in ("lake/years/2023", "outside/2024"):
        (tmp_path / folder).mkdir(parents=True)
    for number, path in enumerate(("lake/years/2023/a", "outside/2024/b", "outside/single")):
        pq.write_table(pa.table({"id": [number], "text": [path]}), tmp_path / f"{path}.parquet")
    lake = tmp_path / "lake"
    (lake / "single.parquet").symlink_to(tmp_path / "outside/single.parquet")
    (lake / "years/2024").symlink_to(tmp_path / "outside/2024")
    (lake / "years/latest").symlink_to(lake / "years/2023")
    (lake / "years/2023/again.parquet").symlink_to("a.parquet")
    (lake / "years/2024/loop").symlink_to(lake / "years")
    return lake


@pytest.fixture
def model(server: ScriptedServer, lake: Path) -> Iterator[VllmAPI]:
    with VllmAPI(identifier="m", api_url=server.url, db=Datalayer(url=str(lake)), retries=0) as made:
        yield made


TABLES = [
    ("single", {2}),
    ("years", {0, 1}),
    ("years/*/*.parquet", {0, 1}),
    ("years/202?/*.parquet", {0, 1}),
    ("years/**/*.parquet", {0, 1}),
    ("**/*.parquet", {0, 1, 2}),
    ("years/2024", {0, 1}),
    ("years/latest/*.parquet", {0}),
]


@pytest.mark.parametrize(("table", "ids"), TABLES)
def test_links_are_followed(model: VllmAPI, table: str, ids: set[int]) -> None:
    """Links work by name, by a glob and in a SELECT; a file with several paths is read once."""
    for number, select in enumerate((table, f'SELECT id, text FROM "{table}"')):
        shown = model.preview("text", select, n=10)
        assert sorted(row.key[0] for row in shown.rows) == sorted(ids)
        report = model.predict_in_db("text", select, predict_id=f"p{number}")
        assert (report.succeeded, report.failed) == (len(ids), 0)


def test_links_that_lead_nowhere_are_named(model: VllmAPI, lake: Path) -> None:
    (lake / "dead.parquet").symlink_to(lake / "gone.parquet")
    (lake / "years/dead.parquet").symlink_to(lake / "gone.parquet")
    for select in ("dead", "years", "SELECT id, text FROM dead"):
        with pytest.raises(InvalidCall, match=r"dead.parquet' leads to .*gone.parquet'"):
            model.predict_in_db("text", select)
    with pytest.raises(InvalidCall, match="is not a glob"):
        model.predict_in_db("text", "years/**.parquet")


def test_a_select_opens_no_other_file(model: VllmAPI, lake: Path) -> None:
    """In a SELECT a link opens the file that it leads to, and nothing else."""
    other = lake.parent / "outside/2024/b.parquet"
    for select in (
        f"SELECT id, text FROM single UNION ALL SELECT id, text FROM read_parquet('{other}')",
        f"SELECT id, text FROM read_parquet('{lake}/single.parquet')",
    ):
        with pytest.raises(InvalidCall, match="file system operations are disabled"):
            model.predict_in_db("text", select)


def test_outputs_behind_a_link(model: VllmAPI, lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are kept and found there, but not outside of the places that the site allows."""
    (lake.parent / "kept").mkdir()
    (lake / "_outputs__m").symlink_to(lake.parent / "kept")
    assert [model.predict_in_db("text", "years").processed for _ in range(2)] == [2, 0]
    assert Datalayer(url=str(lake)).outputs("m").num_rows == 2
    monkeypatch.setenv("VLLM_TASKS_PLACES", f'["{lake}"]')
    with pytest.raises(InvalidCall, match=r"outputs behind the link.*VLLM_TASKS_PLACES"):
        model.predict_in_db("text", "years/2023")
