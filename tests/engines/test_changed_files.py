"""An engine whose model's files change while it runs: its answers are those of the former contents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.places import Place
from vllm_tasks import InvalidCall, VllmModel
from vllm_tasks.engines.local import process
from vllm_tasks.errors import EngineFailed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a model."""
    folder = tmp_path / "model"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "weights.bin").write_text("old")
    return folder


@pytest.fixture
def model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmModel]:
    """A model in the folder, whose engine is the scripted host."""
    monkeypatch.setattr(process, "HOST", Path(__file__).parents[1] / "servers/scripted_host.py")
    log = {"log": f"file:{tmp_path / 'log'}"}
    model = VllmModel(identifier="scripted", model_name=str(folder), vllm_kwargs=log, chat=False)
    yield model
    model.close()


def change(folder: Path) -> None:
    (folder / "part" / "weights.bin").write_text("other")


def test_a_table_is_refused_until_the_engine_has_the_present_files(
    model: VllmModel, folder: Path, tmp_path: Path
) -> None:
    """The fingerprint is that of the files, so answers of the former ones would be recorded as theirs."""
    place = Place(str(tmp_path / "lake"))
    place.fill_texts("a", "b")
    assert model.predict_in_db("text", "rows", db=place.db).succeeded == 2
    (folder / "README.md").write_text("does not count")
    assert model.predict_in_db("text", "rows", db=place.db).up_to_date == 2
    change(folder)
    for call in (model.predict_in_db, model.preview):
        with pytest.raises(InvalidCall, match=r"files of the model .* have changed.*model\.close\(\)"):
            call("text", "rows", db=place.db)
    model.close()
    assert model.predict_in_db("text", "rows", db=place.db).succeeded == 2
    assert (tmp_path / "log").read_text().count("start\n") == 2


def test_an_engine_that_dies_is_not_restarted_with_other_files(model: VllmModel, folder: Path) -> None:
    """Rows of one call would be answered by two models; the next call starts another engine."""
    model.init()
    change(folder)
    with pytest.raises(EngineFailed, match=r"died.*not restarted, because files of the model") as failed:
        model.predict("die")
    assert failed.value.temporary
    assert model.predict("a") == "a"
