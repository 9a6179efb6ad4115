"""`serve(model)`: one server for all users of a configuration, by a stand-in for vLLM's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from prefect import flow

from tests.conftest import IN_PREFECT
from tests.eventually import eventually
from tests.scripts import running_script
from tests.serving.processes import STAND_IN, User, answers, is_alive, pids_of, port_of, told
from vllm_tasks import InvalidCall, VllmAPI, VllmModel, predict_batches, serve
from vllm_tasks.engines import loop
from vllm_tasks.engines.local.gpus import free_devices
from vllm_tasks.engines.local.model_files import stamps
from vllm_tasks.errors import EngineFailed
from vllm_tasks.serving import shared_server
from vllm_tasks.serving.api import command_line, server_arguments
from vllm_tasks.tasks import save_metric_values

# ---------------------------------------------------------------------- the model's part


def test_engine_arguments_become_a_command_line() -> None:
    """Each kind of value has vLLM's form on the command line; unset values are left to vLLM."""
    arguments = {"a_b": True, "c": False, "d": {"e": 1}, "f": [1, "x"], "g": 0.5, "h": "a b", "i": None}
    assert command_line(arguments) == [
        *("--a-b", "--no-c", '--d={"e": 1}', "--f", "1", "x", "--g=0.5", "--h=a b"),
    ]


def test_a_server_has_the_name_and_the_files_of_its_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A relative folder is found from anywhere, and the server uses the name that the model gives it."""
    (tmp_path / "my").mkdir()
    monkeypatch.chdir(tmp_path)
    found = server_arguments({"model": "my", "tokenizer": "org/other"})
    assert (found["model"], found["tokenizer"]) == (str(tmp_path / "my"), "org/other")
    assert found["served_model_name"] == "my"
    within = server_arguments(
        {
            "model": "org/x",
            "lora_modules": [{"name": "my", "path": "my"}, "my=my"],
            "speculative_config": {"model": "my", "method": "eagle"},
            "generation-config": "my",
        }
    )
    there = str(tmp_path / "my")
    assert within["lora_modules"] == [{"name": "my", "path": there}, f"my={there}"]
    assert within["speculative_config"] == {"model": there, "method": "eagle"}
    assert within["generation-config"] == there


def test_files_within_arguments_are_noticed_too(tmp_path: Path) -> None:
    """The files of adapters and of a model that drafts; a folder's name may have an equals sign."""
    (tmp_path / "step=1").mkdir()
    file = tmp_path / "step=1" / "adapter_model.safetensors"
    file.write_text("x")
    folder = str(file.parent)
    for arguments in (
        {"model": folder},
        {"model": "org/x", "lora_modules": [{"name": "a", "path": folder}]},
        {"model": "org/x", "lora-modules": [f"a={folder}"]},
        {"model": "org/x", "speculative_config": {"model": folder}},
    ):
        assert [path for path, _, _ in stamps(arguments)] == [str(file)]
    assert stamps({"model": "org/x", "tokenizer": ""}) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"on_ray": True}, "on_ray"),
        ({"replicas": 2}, "replicas"),
        ({"vllm_kwargs": {"port": 8000}}, "'port'"),
        ({"vllm_kwargs": {"api-ke": "secret"}}, "'api_key'"),
        ({"predict_kwargs": {"lora_request": {}}}, "lora_request"),
        ({"model_name": ""}, "model_name"),
    ],
)
def test_what_a_server_cannot_do_is_refused(fields: dict[str, Any], said: str) -> None:
    """Ray, reserved options of the server, and unsuitable parameters are refused before a start."""
    model = VllmModel(**{"identifier": "a", "model_name": "m", **fields})
    with pytest.raises(InvalidCall, match=said) as caught, serve(model):
        pass
    assert "secret" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_named(
    scripted: Callable[..., VllmModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """If the cache is not writable, the error names the way out."""
    (tmp_path / "record").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "record"))
    with pytest.raises(InvalidCall, match="XDG_CACHE_HOME"), serve(scripted()):
        pass


def test_the_client_asks_as_the_model_does(scripted: Callable[..., VllmModel]) -> None:
    """All fields of a request are the model's; the resources stay with the server."""
    model = scripted().model_copy(
        update={"prompt": "[{input}]", "datatype": "json", "compute_kwargs": {"work_pool": "gpus"}}
    )
    with serve(model) as served:
        assert served.predict("1") == [1]
        assert (served.uuid, served.model, served.compute_kwargs) == (model.uuid, "m", {})
        fingerprint = served.prepare(served.predict_in_db).over("x").fingerprint
        assert served.api_key is not None
        assert served.api_key.get_secret_value() not in repr(served)
        served.metric_values["d"] = {"exact_match": 1.0}  # as a validation does
    assert model.metric_values == {"d": {"exact_match": 1.0}}
    other = model.model_copy(update={"vllm_kwargs": {**model.vllm_kwargs, "dtype": "half"}})
    with serve(other) as served:
        assert served.prepare(served.predict_in_db).over("x").fingerprint != fingerprint


@IN_PREFECT[0]
def test_values_of_a_validation_go_to_the_block_of_the_model(scripted: Callable[..., VllmModel]) -> None:
    """The client of a served model is no block of its own."""
    scripted().save("served")
    try:
        with serve(VllmModel.load("served")) as served:
            save_metric_values(served, SimpleNamespace(metric_values={"d": {"exact_match": 0.5}}))
        assert VllmModel.load("served").metric_values == {"d": {"exact_match": 0.5}}
    finally:
        VllmModel.delete("served")


# ---------------------------------------------------------------------- lives of a stand-in


@IN_PREFECT[0]
@IN_PREFECT[1]
def test_all_steps_of_a_flow_share_a_server(scripted: Callable[..., VllmModel], servers: Path) -> None:
    """Tasks of a flow and a running event loop share one server, which then ends."""

    @flow
    def two_steps() -> list[Any]:
        with serve(scripted()) as served:
            return [predict_batches(served, ["a", "b"]), predict_batches(served, ["c"])]

    async def in_a_loop() -> Any:
        with serve(scripted()) as served, serve(scripted()) as again:
            return served.predict("d"), again.predict("e")

    assert two_steps() == [["a", "b"], ["c"]]
    assert asyncio.run(in_a_loop()) == ("d", "e")
    assert len(pids_of(servers.parents[1] / "record")) == 2


def test_the_last_user_waits_until_the_server_is_gone(
    scripted: Callable[..., VllmModel], servers: Path
) -> None:
    """The next program finds the memory free; a process forked meanwhile is no user."""
    with serve(scripted()):
        pids, port = told(servers)["pids"], port_of(servers)
        if not (forked := os.fork()):
            time.sleep(60)
            os._exit(0)
    try:
        assert not is_alive(pids["server"])
        assert eventually(lambda: not is_alive(pids["supervisor"]))
        assert not answers(port)
        with pytest.raises(FileNotFoundError):  # nor is the key left
            told(servers)
    finally:
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)


def test_a_start_that_fails_says_why_and_may_be_repeated(
    scripted: Callable[..., VllmModel], servers: Path
) -> None:
    """The server's own reason comes at its first failure, and another attempt is another start."""
    for tries in (1, 2):
        with (
            pytest.raises(EngineFailed, match=r"ValueError: no such weights.*/log") as caught,
            serve(scripted(refuse="no such weights")),
        ):
            pass
        assert not caught.value.temporary
        assert len(pids_of(servers.parents[1] / "record")) == tries
    assert "key" not in told(servers)


def test_a_server_holds_its_gpus_as_long_as_it_lives(
    scripted: Callable[..., VllmModel], servers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The server sees a device that no other engine has; it is free again when the server has ended."""
    monkeypatch.setattr(shared_server, "free_devices", partial(free_devices, folder=tmp_path / "gpus"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv("VLLM_TASKS_GPUS", "1")
    others = loop.run(free_devices(1, tmp_path / "gpus"))
    try:
        with serve(scripted()):
            seen = psutil.Process(told(servers)["pids"]["server"]).environ()["CUDA_VISIBLE_DEVICES"]
            assert (others.names, seen) == (("3",), "5")
            with pytest.raises(TimeoutError):
                loop.run(asyncio.wait_for(free_devices(1, tmp_path / "gpus"), 0.1))
        again = loop.run(asyncio.wait_for(free_devices(1, tmp_path / "gpus"), 5))
        assert again.names == ("5",)
        again.release()
    finally:
        others.release()


def test_a_supervisor_that_cannot_be_started_holds_no_gpus(
    scripted: Callable[..., VllmModel], servers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The reason is reported, and the next engine finds the devices free."""
    monkeypatch.setattr(shared_server, "free_devices", partial(free_devices, folder=tmp_path / "gpus"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("VLLM_TASKS_GPUS", "1")
    with serve(scripted()):
        pass
    (folder,) = servers.iterdir()
    (folder / "log.1").mkdir()
    with pytest.raises(IsADirectoryError), serve(scripted()):
        pass
    loop.run(asyncio.wait_for(free_devices(1, tmp_path / "gpus"), 5)).release()


def ask_without(killed: str, model: VllmModel, servers: Path) -> None:
    """Serve and predict after a process was killed for good."""
    with serve(model) as served:
        pids = told(servers)["pids"]
        os.kill(pids[killed], signal.SIGKILL)
        assert eventually(lambda: not any(map(is_alive, pids.values())))
        served.predict_batches(["a"])


def test_a_server_that_cannot_come_back_ends_the_call(
    scripted: Callable[..., VllmModel], servers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three failed starts the server is given up, as a temporary failure of the engine."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "1")
    with pytest.raises(EngineFailed, match="could not be restarted: ValueError: no more") as caught:
        ask_without("server", scripted(lives="1"), servers)
    assert caught.value.temporary
    assert caught.value.results == [None]
    assert len(pids_of(servers.parents[1] / "record")) == 4


@pytest.fixture
def in_folder(scripted: Callable[..., VllmModel], tmp_path: Path) -> VllmModel:
    """A model with a file, whose server is the stand-in."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").write_text("old")
    return scripted().model_copy(update={"model_name": str(tmp_path / "model"), "chat": False})


def test_a_server_with_former_files_is_not_joined(in_folder: VllmModel, tmp_path: Path) -> None:
    """The fingerprint is that of the present files; the server ends with those who use it."""
    with serve(in_folder) as served:
        (tmp_path / "model" / "weights.bin").write_text("other")
        with pytest.raises(EngineFailed, match="former contents") as caught, serve(in_folder):
            pass
        assert caught.value.temporary
        assert served.predict("a") == "a"
    with serve(in_folder) as served:
        assert served.predict("b") == "b"


def test_a_server_that_dies_is_not_restarted_with_other_files(
    in_folder: VllmModel, servers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rows of one run would be answered by two models."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "1")

    def predict_after_a_change(served: VllmAPI) -> None:
        (tmp_path / "model" / "weights.bin").write_text("other")
        os.kill(told(servers)["pids"]["server"], signal.SIGKILL)
        assert eventually(lambda: told(servers)["state"] == "failed")
        served.predict("a")

    with (
        pytest.raises(EngineFailed, match="not be restarted: files of the model have changed") as caught,
        serve(in_folder) as served,
    ):
        predict_after_a_change(served)
    assert caught.value.temporary


def test_a_killed_supervisor_takes_the_server_along(
    scripted: Callable[..., VllmModel], servers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server ends with its supervisor; its users get an error, and the next ones a new server."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "1")
    model = scripted()
    with pytest.raises(EngineFailed, match="ended from outside") as caught:
        ask_without("supervisor", model, servers)
    assert caught.value.temporary
    with serve(model) as served:
        assert served.predict("a") == "a"
        supervisor = told(servers)["pids"]["supervisor"]
        os.kill(supervisor, signal.SIGKILL)
        assert eventually(lambda: not psutil.pid_exists(supervisor))
        with serve(model) as again:  # while its server may still be ending
            assert again.predict("a") == "a"


def test_a_log_that_is_removed_ends_no_server(
    scripted: Callable[..., VllmModel], servers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large log may be removed; a server that dies then is restarted, and the last reason is reported."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "10")
    model = scripted(lives="2").model_copy(update={"chat": False})

    def ask_twice(served: VllmAPI) -> None:
        (folder,) = servers.iterdir()
        (folder / "log").unlink()
        for row in ("a", "b"):
            assert eventually(lambda: told(servers)["state"] == "ready")
            os.kill(told(servers)["pids"]["server"], signal.SIGKILL)
            assert served.predict(row) == row

    with (
        pytest.raises(EngineFailed, match="could not be restarted: ValueError: no more"),
        serve(model) as served,
    ):
        ask_twice(served)
    assert (servers.parents[1] / "record").read_text().count("\n") == 5


def test_a_user_killed_during_the_start_leaves_nothing(
    scripted: Callable[..., VllmModel], servers: Path
) -> None:
    """A server that is still starting ends when nobody waits for it any more."""
    record = servers.parents[1] / "record"
    with User(scripted(wait="120")) as user:
        assert eventually(lambda: record.exists() and pids_of(record))
        supervisor = told(servers)["pids"]["supervisor"]
        user.kill()
        assert eventually(lambda: not any(map(is_alive, [supervisor, *pids_of(record)])))


JOB = """
import sys
from pathlib import Path
from prefect import flow, task
from vllm_tasks import VllmModel, serve
from vllm_tasks.serving import shared_server

shared_server.SERVER = Path(sys.argv[1])

@task
def step():
    with serve(VllmModel(identifier="m", model_name="m", vllm_kwargs={"record": sys.argv[2], "wait": "120"})):
        pass

@flow
def job():
    step.submit().result()

job()
"""


@IN_PREFECT[0]
@pytest.mark.usefixtures("scripted")  # which looks at the record when all is over
def test_a_task_that_waits_for_its_server_ends_with_its_flow(servers: Path, tmp_path: Path) -> None:
    """SIGTERM, Prefect's way to cancel, ends the wait, however long the server takes to start."""
    record = servers.parents[1] / "record"
    with running_script(tmp_path, JOB, str(STAND_IN), str(record)) as job:
        assert eventually(lambda: record.exists() and pids_of(record))
        job.send_signal(signal.SIGTERM)
        job.wait(30)
    assert eventually(lambda: not any(map(is_alive, pids_of(record))))


RACE = """
import os, random, signal, sys, time
from pathlib import Path
from vllm_tasks import VllmModel, serve
from vllm_tasks.serving import shared_server
from vllm_tasks.engines.local.gpus import free_devices

shared_server.SERVER = Path(sys.argv[1])
model = VllmModel(identifier="race", model_name="m", vllm_kwargs={"record": sys.argv[2]})

def use(user):
    random.seed(user)
    for _ in range(4):
        with serve(model) as served:
            assert served.predict("x") == "x"
            time.sleep(random.random() / 2)
            if random.random() < 0.1:
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(random.random())

users = []
for user in range(6):
    users.append(os.fork())
    if not users[-1]:
        code = 1
        try:
            use(user)
            code = 0
        finally:
            os._exit(code)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in users])
"""


@pytest.mark.usefixtures("scripted")  # which looks at the record when all is over
def test_users_that_come_and_go_at_once_have_one_server(servers: Path) -> None:
    """All users are served, by one server at a time, however they come, leave and are killed."""
    record = servers.parents[1] / "record"
    done = subprocess.run(
        [sys.executable, "-c", RACE, str(STAND_IN), str(record)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    assert set(codes) <= {0, -signal.SIGKILL}, done.stderr
    assert eventually(lambda: not list(servers.glob("*/server.json")))
