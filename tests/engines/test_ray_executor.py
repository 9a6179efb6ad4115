"""One model over several machines: vLLM's own Ray executor in our actors.

vLLM's build for CPUs refuses that executor, so a scripted host reserves GPUs as vLLM does, on a real cluster
that believes in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_ARGS
from tests.engines.test_ray import ScriptedActor, actors, ray
from tests.eventually import eventually
from vllm_tasks import InvalidCall, VllmModel
from vllm_tasks.engines.ray import actor
from vllm_tasks.errors import EngineFailed

BY_VLLM = {"distributed_executor_backend": "ray"}
Make = Callable[..., VllmModel]


@pytest.fixture(scope="module")
def cluster(ray_token: None) -> Iterator[str]:
    """The address of a cluster: a head without GPUs, and two nodes that have two each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_gpus": 0, "include_dashboard": False})
    nodes.add_node(num_gpus=2)
    nodes.add_node(num_gpus=2)
    yield nodes.address
    nodes.shutdown()


@pytest.fixture
def make(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes models on the cluster whose engines are scripted hosts."""
    monkeypatch.setattr(actor, "HostActor", ScriptedActor)

    def model(**arguments: Any) -> VllmModel:
        return VllmModel(
            identifier="scripted",
            model_name="m",
            ray_address=cluster,
            vllm_kwargs={"log": str(tmp_path / "log"), **BY_VLLM, **arguments},
            chat=False,
        )

    return model


def free_gpus() -> float:
    gpus: float = ray().available_resources().get("GPU", 0)
    return gpus


def test_workers_of_one_engine_get_gpus_of_several_machines(make: Make) -> None:
    """The engine joins the actor's cluster; the actor has no GPU, but is on a machine that has some."""
    with make(tensor_parallel_size=2, pipeline_parallel_size=2) as model:
        assert model.predict("workers") == "2: 2 2"
        assert model.predict("devices") == ""
        assert eventually(lambda: free_gpus() == 0)
    with make(tensor_parallel_size=3) as model:
        assert sorted(model.predict("workers").split(": ")[1]) == [" ", "1", "2"]
    assert eventually(lambda: not actors())


def test_engine_that_dies_gives_its_gpus_to_its_successor(make: Make, tmp_path: Path) -> None:
    """Ray frees the GPUs of a killed engine, so that the one that replaces it gets them."""
    with make(tensor_parallel_size=4) as model:
        assert model.predict_batches(["die", "a"], temperature=0) == ["die", "a"]
        assert model.predict("workers") == "2: 2 2"
    assert (tmp_path / "log").read_text().splitlines().count("start") == 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ray_config": {"num_gpus": 2}, "vllm_kwargs": BY_VLLM}, "num_gpus=2.*leave it out"),
        ({"vllm_kwargs": {"data_parallel_backend": "ray"}}, "data_parallel_backend='ray'.*replicas=N"),
    ],
)
def test_what_would_keep_vllm_from_placing_its_workers_is_refused(fields: dict[str, Any], words: str) -> None:
    """GPUs of the actor would be missing for them, and data parallel engines are placed by other rules."""
    model = VllmModel(identifier="m", model_name="m", on_ray=True, tensor_parallel_size=2, **fields)
    with pytest.raises(InvalidCall, match=words):
        model.engine_config()


@pytest.mark.engine
@pytest.mark.long
def test_refusal_of_a_vllm_for_cpus_comes_back(cluster: str, tiny_model: Path) -> None:
    """The real vLLM joins the cluster, and its reason is that of the error."""
    model = VllmModel(
        identifier="m",
        model_name=str(tiny_model),
        tensor_parallel_size=2,
        vllm_kwargs={**TINY_ARGS, **BY_VLLM},
        ray_address=cluster,
    )
    with pytest.raises(EngineFailed, match="does not support ray"):
        model.predict("a")
