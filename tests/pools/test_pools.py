"""`python -m vllm_tasks.pools` against a real server: what it creates; a second call changes nothing."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.conftest import IN_PREFECT
from tests.servers.scripted_server import ScriptedServer, refused
from vllm_tasks import InvalidCall
from vllm_tasks.engines.local import process
from vllm_tasks.errors import ServerUnavailable
from vllm_tasks.models.hints import HINTS
from vllm_tasks.models.resources import HONOURED, Resources, check_declared
from vllm_tasks.pools import POOL_TYPES, Pool, PoolType, make, template
from vllm_tasks.pools.__main__ import main

pytestmark = IN_PREFECT


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def name(client: SyncPrefectClient) -> Iterator[str]:
    """A name for pools; everything created under it, also with `-gpu` added, is deleted."""
    name = f"test-{os.urandom(4).hex()}"
    yield name
    for pool in (name, f"{name}-gpu"):
        for automation in client.read_automations_by_name(f"{pool}: runs whose process died are Crashed"):
            assert automation.id is not None
            client.delete_automation(automation.id)
        for delete in (
            lambda pool=pool: client.delete_deployment(
                client.read_deployment_by_name(f"vllm-step/{pool}").id
            ),
            lambda pool=pool: client.delete_global_concurrency_limit_by_name(f"vllm-gpus:{pool}"),
            lambda pool=pool: client.delete_work_pool(pool),
        ):
            try:
                delete()
            except ObjectNotFound:
                continue


def command(name: str, *more: str) -> None:
    main(["--pool", name, "--gpu-pool", f"{name}-gpu", *more])


def all_of(client: SyncPrefectClient, name: str) -> list[dict[str, Any]]:
    """Everything that the server has of it, without the times of the last change."""
    gpu = f"{name}-gpu"
    (one,) = client.read_automations_by_name(f"{name}: runs whose process died are Crashed")
    (other,) = client.read_automations_by_name(f"{gpu}: runs whose process died are Crashed")
    found: list[Any] = [
        client.read_work_pool(name),
        client.read_work_pool(gpu),
        client.read_global_concurrency_limit_by_name(f"vllm-gpus:{gpu}"),
        client.read_deployment_by_name(f"vllm-step/{name}"),
        client.read_deployment_by_name(f"vllm-step/{gpu}"),
        client.read_block_type_by_slug("vllm-model"),
        one,
        other,
    ]
    # No pull steps are an empty list at first, and none after an update.
    return [thing.model_dump(exclude={"updated", "pull_steps"}) for thing in found]


def test_a_second_call_changes_nothing(
    name: str, client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    """All objects are found again by name, and the next commands are printed."""
    command(name, "--gpus", "4")
    made = all_of(client, name)
    command(name, "--gpus", "4")
    assert all_of(client, name) == made
    said = capsys.readouterr().out
    assert f"prefect worker start --pool {name}-gpu" in said
    assert "vllm-model" in said


def test_what_appears_meanwhile_is_taken_as_it_is(
    name: str, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect's client repeats a request that took too long, and the server may have done it at first."""

    def repeated(method: str) -> Callable[..., Any]:
        create = getattr(SyncPrefectClient, method)
        return lambda self, wanted: (create(self, wanted), create(self, wanted))

    with monkeypatch.context() as patch:
        for method in ("create_work_pool", "create_global_concurrency_limit"):
            patch.setattr(SyncPrefectClient, method, repeated(method))
        command(name, "--gpus", "4")
        made = all_of(client, name)
    command(name, "--gpus", "4")
    assert all_of(client, name) == made


def test_what_belongs_to_a_pool(name: str, client: SyncPrefectClient) -> None:
    """Slots, the environment of its runs, the step from the installed package, an end for dead runs."""
    command(name, "--gpus", "4")
    pool, gpu_pool, limit, _, step, _, _, automation = all_of(client, name)
    env = gpu_pool["base_job_template"]["variables"]["properties"]["env"]["default"]
    assert env == {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "VLLM_TASKS_GPU_SLOTS": f"vllm-gpus:{name}-gpu",
        "VLLM_TASKS_GPUS": "1",
    }
    assert (
        "VLLM_TASKS_GPU_SLOTS" not in pool["base_job_template"]["variables"]["properties"]["env"]["default"]
    )
    assert (limit["name"], limit["limit"], limit["active"]) == (f"vllm-gpus:{name}-gpu", 4, True)
    assert (step["entrypoint"], step["work_pool_name"]) == ("vllm_tasks.pools.step.step", f"{name}-gpu")
    assert step["tags"] == ["vllm-tasks"]
    trigger = automation["trigger"]
    assert (trigger["after"], trigger["expect"]) == ({"prefect.flow-run.heartbeat"}, {"prefect.flow-run.*"})
    assert trigger["match_related"]["prefect.resource.name"] in (f"{name}-gpu", [f"{name}-gpu"])
    assert trigger["within"].total_seconds() == 3 * int(env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])


def test_what_others_have_set_stays(
    name: str, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defaults of the pool, and the slots of its limit unless they are given."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    command(name)
    pool = client.read_work_pool(f"{name}-gpu")
    declared = pool.base_job_template["variables"]["properties"]
    declared["working_dir"]["default"] = "/srv/flows"
    declared["env"]["default"]["HF_HOME"] = "/srv/hf"
    client.update_work_pool(pool.name, WorkPoolUpdate(base_job_template=pool.base_job_template))
    limit = f"vllm-gpus:{name}-gpu"
    assert client.read_global_concurrency_limit_by_name(limit).limit == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    command(name)
    assert client.read_work_pool(pool.name).base_job_template == pool.base_job_template
    assert client.read_global_concurrency_limit_by_name(limit).limit == 2
    command(name, "--gpus", "3")
    assert client.read_global_concurrency_limit_by_name(limit).limit == 3


def test_a_pool_that_was_made_otherwise_is_brought_up_to_date(name: str, client: SyncPrefectClient) -> None:
    """The pool gets our template in place of any other."""
    client.create_work_pool(WorkPoolCreate(name=name, type="kubernetes", base_job_template={}))
    make(Pool(name, "kubernetes"))
    assert client.read_work_pool(name).base_job_template == template(Pool(name, "kubernetes"))


def test_a_pool_of_another_type_is_left_alone(name: str, client: SyncPrefectClient) -> None:
    """Prefect cannot change the type, and the message names the way out."""
    client.create_work_pool(WorkPoolCreate(name=name, type="kubernetes", base_job_template={}))
    with pytest.raises(InvalidCall, match=r"exists with type 'kubernetes', not 'process'.*another name"):
        command(name)


@pytest.mark.parametrize("kind", POOL_TYPES)
def test_the_server_takes_the_template_and_it_declares_every_hint(
    kind: PoolType, name: str, client: SyncPrefectClient
) -> None:
    """Every hint that a pool of this type supports can be rendered for it; `--image` is its default."""
    image = "site/vllm:1" if kind != "process" else None
    make(Pool(name, kind, 8, image))
    pool = client.read_work_pool(name)
    assert image is None or pool.base_job_template["variables"]["properties"]["image"]["default"] == image
    every: dict[str, Any] = {
        "num_cpus": 4,
        "memory": 2**30,
        "accelerator_type": "A100",
        "shm_size": 2**30,
        "image": "i",
        "env": {"A": "1"},
        "node_selector": {"a": "b"},
        "tolerations": ({"key": "gpu"},),
    }
    assert HONOURED[kind] <= every.keys() | {"num_gpus"} <= HINTS.keys()
    honoured = {hint: value for hint, value in every.items() if hint in HONOURED[kind]}
    check_declared(pool, Resources(num_gpus=8, **honoured).job_variables(kind))


def test_what_cannot_be_is_refused(name: str, client: SyncPrefectClient) -> None:
    """The error comes before anything is created."""
    with pytest.raises(InvalidCall, match="--gpus -1"):
        command(name, "--gpus", "-1")
    with pytest.raises(InvalidCall, match=r"no images, and got 'site/vllm:1'.*docker or kubernetes"):
        command(name, "--image", "site/vllm:1")
    with pytest.raises(ObjectNotFound):
        client.read_work_pool(name)


@pytest.mark.parametrize("odd", ["", " ", "a/b", "50%", "Prefect-gpu"])
def test_a_name_that_prefect_refuses_is_named(odd: str, name: str, client: SyncPrefectClient) -> None:
    """The error comes before the other pool is created."""
    with pytest.raises(InvalidCall, match=re.escape(f"{odd!r} cannot name a work pool")):
        main(["--pool", name, "--gpu-pool", odd, "--gpus", "1"])
    with pytest.raises(ObjectNotFound):
        client.read_work_pool(name)


def test_a_server_that_refuses_is_named(name: str, server: ScriptedServer) -> None:
    """A wrong address or key is one line."""
    server.script = lambda _: refused(401, "no")
    with (
        temporary_settings({PREFECT_API_URL: server.url}),
        pytest.raises(
            ServerUnavailable, match=r"refused a request \(401 Unauthorized\); correct PREFECT_API_URL"
        ),
    ):
        command(name)


def test_a_server_that_is_not_there_is_named(name: str) -> None:
    """The message says what to do, instead of a traceback of Prefect's client."""
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        pytest.raises(ServerUnavailable, match=r"no Prefect server answers at http://127.0.0.1:9/api"),
    ):
        command(name)


def test_the_image_fits_the_package() -> None:
    """The image cannot be built here: the test checks its version of vLLM and the files that it copies."""
    repository = Path(__file__).parents[2]
    words = [line.split() for line in (repository / "Dockerfile").read_text().splitlines()]
    (image,) = [line[1] for line in words if line[:1] == ["FROM"]]
    (extras,) = [line[1] for line in words if line[:1] == ["ARG"]]
    extra = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.removeprefix("EXTRAS=").split(",")) <= extra.keys()
    version = Version(image.removeprefix("vllm/vllm-openai:v")).release[:2]
    assert process.OLDEST <= version <= process.LATEST
    assert "VLLM_TASKS_ENGINE_PYTHON=/usr/bin/python3" in [word for line in words for word in line]
    copied = [name for line in words if line[:1] == ["COPY"] for name in line[1:-1]]
    assert [name for name in copied if not (repository / name).exists()] == []
    assert ["ENTRYPOINT", "[]"] in words
