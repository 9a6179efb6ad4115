"""The Python environment that has vLLM may be another one than the flow's."""

from __future__ import annotations

import os
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from vllm_tasks import VllmModel
from vllm_tasks.calls.sampling import known_names
from vllm_tasks.engines.local import process
from vllm_tasks.engines.local.python import environment, interpreter, source_of_vllm
from vllm_tasks.errors import EngineFailed
from vllm_tasks.serving.shared_server import folder_of

FIELDS = "class SamplingParams:\n    temperature: float = 1.0\n    sorcery: int = 0\n"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment without packages."""
    folder = tmp_path_factory.mktemp("other")
    venv.create(folder, symlinks=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment whose vLLM has one more sampling parameter."""
    folder = tmp_path_factory.mktemp("newer")
    venv.create(folder, symlinks=True)
    (vllm,) = (site / "vllm" for site in folder.glob("lib/python*/site-packages"))
    vllm.mkdir()
    (vllm / "__init__.py").touch()
    (vllm / "sampling_params.py").write_text(FIELDS)
    return folder / "bin" / "python"


def test_the_flows_own_python_is_the_default() -> None:
    assert interpreter("") == sys.executable
    assert environment(sys.executable) == os.environ


def test_an_interpreter_keeps_its_link_since_that_makes_it_an_environment(other: Path) -> None:
    assert other.is_symlink()
    assert interpreter(str(other)) == str(other)


def test_programs_of_that_environment_are_found_first(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", sys.prefix)
    given = environment(str(other))
    assert given["PATH"].split(os.pathsep)[0] == str(other.parent)
    assert "PYTHONHOME" not in given


@pytest.mark.parametrize("name", ["absent", "not_executable"])
def test_what_is_no_program_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "not_executable").touch()
    model = VllmModel(identifier="m", model_name="tiny", engine_python=str(tmp_path / name))
    with pytest.raises(EngineFailed, match=f"{name}' is not a program on this machine: give the path of"):
        model.predict("Hello")


@pytest.mark.engine  # its model is made with vLLM's libraries
def test_an_environment_without_vllm_is_named(other: Path, tiny_model: Path) -> None:
    model = VllmModel(identifier="m", model_name=str(tiny_model), engine_python=str(other))
    with pytest.raises(EngineFailed, match=f"the environment of {other} has no vLLM: install it there"):
        model.predict("Hello")


def test_the_setting_counts_for_models_that_name_none(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TASKS_ENGINE_PYTHON", str(other))
    assert VllmModel(identifier="m", model_name="tiny").engine_config().python == str(other)
    own = VllmModel(identifier="m", model_name="tiny", engine_python="/opt/vllm/bin/python", on_ray=True)
    assert own.engine_config().python == "/opt/vllm/bin/python"


def test_sampling_parameters_are_those_of_that_vllm(newer: Path, other: Path) -> None:
    assert source_of_vllm(str(newer)) is not None
    assert source_of_vllm(str(other)) is None
    known = VllmModel(
        identifier="m", model_name="tiny", engine_python=str(newer), predict_kwargs={"sorcery": 1}
    )
    assert "sorcery" in known.sampling_names()
    with pytest.raises(ValueError, match="does not know the sampling parameter 'sorcery'"):
        VllmModel(identifier="m", model_name="tiny", engine_python=str(other), predict_kwargs={"sorcery": 1})


def test_an_interpreter_that_is_on_another_machine_leaves_the_table() -> None:
    assert known_names("local", "/opt/elsewhere/bin/python") >= {"temperature", "max_tokens"}


def test_where_the_engine_runs_is_not_part_of_its_answers(other: Path) -> None:
    models = (
        VllmModel(identifier="m", model_name="tiny", chat=False, engine_python=python)
        for python in (None, str(other))
    )
    first, second = (model.prepare(model.predict_in_db).over("question").fingerprint for model in models)
    assert first == second


def test_engines_of_two_environments_are_not_shared(other: Path) -> None:
    here = VllmModel(identifier="m", model_name="tiny").engine_config()
    there = VllmModel(identifier="m", model_name="tiny", engine_python=str(other)).engine_config()
    assert here != there
    assert folder_of(sys.executable, ["--model=tiny"]) != folder_of(str(other), ["--model=tiny"])


def test_a_site_that_runs_no_foreign_code_runs_no_program_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TASKS_TRUST_REMOTE_CODE", "false")
    named = {"identifier": "m", "model_name": "tiny", "trust_remote_code": False}
    with pytest.raises(ValueError, match="engine_python='/tmp/x', and this site runs no program"):
        VllmModel(**named, engine_python="/tmp/x")
    monkeypatch.setenv("VLLM_TASKS_ENGINE_PYTHON", "/tmp/x")
    assert VllmModel(**named, engine_python="/tmp/x").engine_config().python == "/tmp/x"


def test_a_site_may_list_the_programs_that_models_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With or without the code of models; another one is not run, not even to look at its vLLM."""
    evil = tmp_path / "python"
    evil.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    evil.chmod(0o755)
    monkeypatch.setenv("VLLM_TASKS_ENGINE_PYTHONS", '["/opt/a/bin/python"]')
    for trusted in ("true", "false"):
        monkeypatch.setenv("VLLM_TASKS_TRUST_REMOTE_CODE", trusted)
        named: dict[str, Any] = {"identifier": "m", "model_name": "tiny", "trust_remote_code": False}
        for path in (str(evil), "/opt/a/bin/../bin/python", "/opt/a/bin/python "):
            with pytest.raises(ValueError, match="have the site add it to VLLM_TASKS_ENGINE_PYTHONS"):
                VllmModel(**named, engine_python=path, predict_kwargs={"seed": 1})
        listed = VllmModel(**named, engine_python="/opt/a/bin/python", predict_kwargs={"seed": 1})
        assert listed.engine_config().python == "/opt/a/bin/python"
        assert VllmModel(**named).engine_config().python == ""
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("version", "is_told"),
    [("0.25.1", True), ("0.26.0", False), ("0.33.1rc1.dev3+g1", False), ("0.34.0", True), ("dev", False)],
)
def test_a_vllm_outside_of_the_range_is_told_and_not_refused(
    version: str, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    process.warn_of_version(version)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * is_told
    assert not is_told or f"vLLM {version} is untested" in caplog.text
