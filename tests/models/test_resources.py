"""The resources of a model, and the jobs that the workers of each kind of pool make of them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
from kubernetes_asyncio.client import models as kubernetes
from prefect.client.schemas.objects import FlowRun, WorkPool
from prefect.workers.process import ProcessJobConfiguration
from prefect_docker.worker import DockerWorkerJobConfiguration
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
from pydantic import ValidationError

from tests.conftest import IN_PREFECT
from vllm_tasks import InvalidCall, VllmAPI, VllmModel
from vllm_tasks.models.hints import HINTS
from vllm_tasks.models.resources import HONOURED, ROUTES, Resources, check_declared
from vllm_tasks.pools import Pool, template

pytestmark = IN_PREFECT  # the workers' configurations ask a server for blocks in them

CONFIGURATIONS: dict[str, Any] = {
    "process": ProcessJobConfiguration,
    "docker": DockerWorkerJobConfiguration,
    "kubernetes": KubernetesWorkerJobConfiguration,
}
SIZES = [
    ({}, 1),
    ({"tensor_parallel_size": 2}, 2),
    ({"tensor_parallel_size": 2, "vllm_kwargs": {"pipeline_parallel_size": 2}}, 4),
    ({"tensor_parallel_size": 8, "vllm_kwargs": {"tensor_parallel_size": 4}}, 4),
    ({"vllm_kwargs": {"data_parallel_size": 2}}, 2),
    ({"tensor_parallel_size": 2, "compute_kwargs": {"num_gpus": 0}}, 0),
    ({"tensor_parallel_size": 2, "compute_kwargs": {"num_gpus": 3}}, 3),
    ({"tensor_parallel_size": 2, "on_ray": True, "replicas": 3}, 6),
    ({"ray_address": "ray://head:10001", "replicas": 3}, 0),
]
NEEDS: dict[str, Any] = {"memory": "64Gi", "num_cpus": 4, "shm_size": "16GB", "image": "site/vllm:1"}
OF_KUBERNETES: dict[str, Any] = {
    "accelerator_type": "NVIDIA-A100-SXM4-80GB",
    "node_selector": {"zone": "a"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "env": {"A": "1"},
}
SECRET = "hf-secret"


def resources(**fields: Any) -> Resources:
    return VllmModel(identifier="m", **fields).resources()


def job(kind: str, needs: Resources) -> Any:
    """The job as the real worker of this kind prepares it, from our template and our job variables."""
    variables = needs.job_variables(kind)
    pool = WorkPool(name="p", type=kind, base_job_template=template(Pool("p", kind, 8)))  # type: ignore[arg-type]
    check_declared(pool, variables)
    made = asyncio.run(CONFIGURATIONS[kind].from_template_and_values(pool.base_job_template, variables))
    made.prepare_for_flow_run(FlowRun(id=uuid4(), flow_id=uuid4(), name="run"))
    return made


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises((InvalidCall, ValidationError)) as refused:
        act()
    return str(refused.value)


# ---------------------------------------------------------------------- what is needed


@pytest.mark.parametrize(("fields", "gpus"), SIZES)
def test_the_gpus_of_a_job_are_those_of_its_engines(fields: dict[str, Any], gpus: int) -> None:
    """TP x PP x DP of one engine, unless there is a hint, times the engines that the job itself holds."""
    assert resources(**fields).job_gpus == gpus


def test_a_client_of_a_server_needs_no_gpu() -> None:
    """`VllmAPI` has none, and its other hints count."""
    needs = VllmAPI(identifier="m", compute_kwargs={"work_pool": "w"}).resources()
    assert (needs.num_gpus, needs.work_pool) == (0, "w")


@pytest.mark.parametrize(
    ("size", "count"),
    [(1024, 1024), ("32Gi", 2**35), ("16GB", 16 * 10**9), ("1.5 Gi", 3 * 2**29), ("512M", 512 * 10**6)],
)
def test_sizes_are_bytes_or_a_text_with_a_unit(size: Any, count: int) -> None:
    """Units are those of Kubernetes, with or without a B."""
    assert resources(compute_kwargs={"memory": size}).memory == count


@pytest.mark.parametrize(
    ("hints", "said"),
    [
        ({"num_gpus": 1}, ["num_gpus=1", "tensor_parallel_size=2", "2 GPUs", "leave num_gpus out"]),
        ({"num_gpus": 2.0}, ["num_gpus=2.0", "whole number"]),
        ({"num_gpus": True}, ["num_gpus=True", "whole number"]),
        ({"num_gpus": -1}, ["num_gpus=-1", "at least 0"]),
        ({"num_gpus": None}, ["num_gpus=None"]),
        ({"num_cpus": 0}, ["num_cpus=0", "above 0"]),
        ({"num_cpus": float("inf")}, ["num_cpus=inf"]),
        ({"memory": "32g"}, ["memory='32g'", "'32Gi'"]),
        ({"memory": 0}, ["memory=0", "not a size"]),
        ({"shm_size": "lots"}, ["shm_size='lots'"]),
        ({"image": ""}, ["image=''", "not a text"]),
        ({"resources": {"tpu": "1"}}, ["resources['tpu']='1'", "not a number"]),
        ({"env": {"A": 1}}, ["a int as env['A']", "give a text"]),
        ({"env": ["A=1"]}, ["a list as env", "give a dict"]),
        ({"env": {"vllm_tasks_places": "[]"}}, ["'vllm_tasks_places' in env", "only the site may set"]),
        ({"env": {"VLLM_TASKS_API_URL": "http://me"}}, ["'VLLM_TASKS_API_URL' in env"]),
        ({"env": {"VLLM_TASKS_ENGINE_PYTHON": "/tmp/x"}}, ["'VLLM_TASKS_ENGINE_PYTHON' in env"]),
        ({"env": {"VLLM_TASKS_ENGINE_PYTHONS": "[]"}}, ["'VLLM_TASKS_ENGINE_PYTHONS' in env"]),
        ({"node_selector": {1: "a"}}, ["node_selector", "keys are texts"]),
        ({"tolerations": {"key": "gpu"}}, ["tolerations={'key': 'gpu'}", "not a list"]),
        ({"tolerations": [{"kye": "gpu"}]}, ["'kye' in tolerations", "did you mean 'key'"]),
        ({"work_pol": "w"}, ["'work_pol'", "did you mean 'work_pool'", "tolerations"]),
    ],
)
def test_a_wrong_hint_is_refused_when_the_model_is_made(hints: dict[str, Any], said: list[str]) -> None:
    """The error names the hint, its value and the way out."""
    message = refusal(lambda: resources(tensor_parallel_size=2, compute_kwargs=hints))
    assert [words for words in said if words not in message] == []


def test_a_parallel_size_that_is_none_is_refused() -> None:
    """This includes sizes in `vllm_kwargs`, from which the GPUs are counted."""
    assert "data_parallel_size='2'" in refusal(lambda: resources(vllm_kwargs={"data_parallel_size": "2"}))


def test_values_of_env_are_shown_nowhere() -> None:
    """No model, resource or refusal of another hint displays them."""
    model = VllmModel(identifier="m", compute_kwargs={"env": {"HF_TOKEN": SECRET}})
    shown = repr(model) + repr(model.resources())
    shown += refusal(lambda: resources(compute_kwargs={"env": {"HF_TOKEN": SECRET}, "num_gpus": -1}))
    shown += refusal(lambda: model.model_copy(update={"tensor_parallel_size": 0}).resources())
    assert SECRET not in shown


# ---------------------------------------------------------------------- jobs


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_a_process_takes_its_gpus_from_the_machine(gpus: int) -> None:
    """The engine in the process takes as many free devices; other values reach the environment."""
    made = job("process", resources(tensor_parallel_size=gpus, compute_kwargs={"env": {"A": "1"}}))
    assert (made.env["VLLM_TASKS_GPUS"], made.env["A"]) == (str(gpus), "1")
    assert made.env["VLLM_TASKS_GPU_SLOTS"] == "vllm-gpus:p"
    assert made.env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_a_container_gets_what_docker_can_give(gpus: int) -> None:
    """Image, memory, CPUs and shared memory are set; the engine sees all GPUs and takes free ones."""
    docker = pytest.importorskip("docker")
    made = job("docker", resources(tensor_parallel_size=gpus, compute_kwargs=NEEDS | {"env": {"A": "1"}}))
    assert (made.image, made.mem_limit) == ("site/vllm:1", f"{64 * 2**30}b")
    assert (made.env["VLLM_TASKS_GPUS"], made.env["A"]) == (str(gpus), "1")
    assert made.env["VLLM_TASKS_GPU_SLOTS"] == "vllm-gpus:p"
    assert made.volumes == ["/tmp/vllm_tasks-gpus:/tmp/vllm_tasks-gpus"]
    created = docker.types.HostConfig(
        version="1.47", mem_limit=made.mem_limit, **made.container_create_kwargs
    )
    assert (created["Memory"], created["ShmSize"], created["NanoCpus"]) == (64 * 2**30, 16 * 10**9, 4 * 10**9)
    (devices,) = created["DeviceRequests"]
    assert (devices["Driver"], devices["Count"], devices["Capabilities"]) == ("nvidia", -1, [["gpu"]])


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_a_kubernetes_job_asks_for_all_of_it(gpus: int) -> None:
    """Each field of the manifest stands where Kubernetes reads it."""
    hints = NEEDS | OF_KUBERNETES
    manifest = job("kubernetes", resources(tensor_parallel_size=gpus, compute_kwargs=hints)).job_manifest
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"] == {
        "limits": {"memory": "64Gi", "nvidia.com/gpu": gpus},
        "requests": {"cpu": "4", "memory": "64Gi", "nvidia.com/gpu": gpus},
    }
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB", "zone": "a"}
    assert pod["tolerations"] == hints["tolerations"]
    assert pod["volumes"] == [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "15625000Ki"}}]
    assert container["volumeMounts"] == [{"name": "shm", "mountPath": "/dev/shm"}]
    assert container["image"] == "site/vllm:1"
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    assert (env["A"], env["VLLM_TASKS_GPU_SLOTS"]) == ("1", "vllm-gpus:p")
    assert "VLLM_TASKS_GPUS" not in env  # Kubernetes gives each pod devices of its own


OF_PREFECT = {"V1PodSpec": {"completions", "parallelism"}}
"""Fields of a job that Prefect's worker demands in the pod's spec; Kubernetes drops them with a warning."""
PLAIN: dict[str, type] = {"str": str, "int": int, "bool": bool}


def built(kind: str, value: Any, path: str = "job") -> Any:
    """A part of a manifest as a model of Kubernetes' client, which checks required fields and choices."""
    if found := re.fullmatch(r"list\[(.+)\]", kind):
        return [built(found[1], each, f"{path}[{i}]") for i, each in enumerate(value)]
    if found := re.fullmatch(r"dict\(str, (.+)\)", kind):
        of_values = "int" if path.endswith((".limits", ".requests")) else found[1]  # a quantity is either
        return {
            key: built("str" if isinstance(each, str) else of_values, each, f"{path}.{key}")
            for key, each in value.items()
        }
    if kind in PLAIN:
        assert type(value) is PLAIN[kind], f"{path}={value!r} is no {kind}"
        return value
    model = getattr(kubernetes, kind)
    names = {written: name for name, written in model.attribute_map.items()}
    known = {key: each for key, each in value.items() if key not in OF_PREFECT.get(kind, ())}
    assert known.keys() <= names.keys(), f"{path} has fields that {kind} lacks: {known.keys() - names.keys()}"
    types = {key: model.openapi_types[names[key]] for key in known}
    return model(**{names[key]: built(types[key], each, f"{path}.{key}") for key, each in known.items()})


@pytest.mark.parametrize("hints", [{}, NEEDS | OF_KUBERNETES], ids=["none", "all"])
def test_kubernetes_knows_every_field_of_a_job(hints: dict[str, Any]) -> None:
    """A server drops a field that it does not know, so a limit in the wrong place would limit nothing."""
    made = job("kubernetes", resources(tensor_parallel_size=2, compute_kwargs=hints)).job_manifest
    pod = built("V1Job", made).spec.template.spec
    assert pod.containers[0].name == "prefect-job"
    assert pod.restart_policy == "Never"
    with pytest.raises(AssertionError, match=r"V1PodSpec lacks: \{'nodeselector'\}"):
        built("V1PodSpec", made["spec"]["template"]["spec"] | {"nodeselector": {}})


@pytest.mark.parametrize("kind", HONOURED)
def test_without_hints_on_cpus_nothing_is_set(kind: str) -> None:
    """Missing hints are not rendered, so the pool's own defaults stay."""
    needs = resources(compute_kwargs={"num_gpus": 0})
    assert needs.job_variables(kind) == {}
    made = job(kind, needs)
    if kind == "kubernetes":
        pod = made.job_manifest["spec"]["template"]["spec"]
        assert pod["containers"][0]["resources"] == {"limits": {}, "requests": {}}
        assert not {"nodeSelector", "tolerations"} & pod.keys()


@pytest.mark.parametrize("kind", HONOURED)
def test_a_hint_that_a_pool_cannot_honour_is_refused(kind: str) -> None:
    """The error names the hint and the kinds of pools that support it; routing hints are not refused."""
    every: dict[str, Any] = NEEDS | {
        "num_gpus": 1,
        "accelerator_type": "A100",
        "resources": {"site": 1},
        "env": {"A": "1"},
        "node_selector": {"zone": "a"},
        "tolerations": [{"key": "gpu"}],
        **dict.fromkeys(ROUTES, "a/there"),
    }
    assert every.keys() == HINTS.keys()
    for hint, value in every.items():
        needs = resources(compute_kwargs={hint: value})
        if hint in HONOURED[kind] | ROUTES:
            needs.job_variables(kind)
        else:
            said = refusal(lambda needs=needs: needs.job_variables(kind))
            assert f"has {hint}, which a work pool of type {kind!r} cannot honour" in said


def test_a_pool_of_an_unknown_type_is_refused() -> None:
    """The error lists the known types."""
    assert "'ecs'" in refusal(lambda: resources().job_variables("ecs"))


def test_a_variable_that_the_pool_does_not_declare_is_refused() -> None:
    """Prefect would silently drop it; the message says how to give it to the pool."""
    default = KubernetesWorkerJobConfiguration.json_template()
    pool = WorkPool(
        name="plain",
        type="kubernetes",
        base_job_template={"job_configuration": default, "variables": {"properties": {"env": {}}}},
    )
    said = refusal(lambda: check_declared(pool, resources().job_variables("kubernetes")))
    assert [w for w in ("'plain'", "'num_gpus'", "make pools", "template") if w not in said] == []


# ---------------------------------------------------------------------- Ray


def test_an_actor_gets_what_one_engine_needs() -> None:
    """Hints become options of one actor, in Ray's names; the job gets only hints that Ray does not use."""
    hints = {
        "num_cpus": 4,
        "memory": "8Gi",
        "accelerator_type": "A100",
        "resources": {"site": 1},
        "env": {"A": "1"},
    }
    needs = resources(tensor_parallel_size=2, on_ray=True, replicas=2, compute_kwargs=hints)
    assert needs.ray_options() == {
        "num_gpus": 2,
        "num_cpus": 4,
        "memory": 2**33,
        "accelerator_type": "A100",
        "resources": {"site": 1},
        "runtime_env": {"env_vars": {"A": "1"}},
    }
    assert needs.job_variables("process") == {"env": {"A": "1"}}
    assert needs.job_variables("kubernetes")["num_gpus"] == 4
    assert needs.job_variables("kubernetes")["memory"] == "16Gi"
    assert resources(compute_kwargs={"num_gpus": 0}).ray_options() == {"num_gpus": 0}


def test_ray_takes_these_options() -> None:
    """Ray itself checks them, without a cluster."""
    ray_options = pytest.importorskip("ray._common.ray_option_utils")
    hints = {"num_cpus": 4, "memory": "8Gi", "accelerator_type": "A100", "resources": {"site": 1}}
    ray_options.validate_actor_options(resources(compute_kwargs=hints).ray_options(), in_options=False)
