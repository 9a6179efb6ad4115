"""Engines on Ray: real actors on a real cluster of two nodes on this machine, joined by its address.

Tests of deaths and placement use actors with the scripted host instead of vLLM's.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow

from tests.conftest import IN_PREFECT, TINY_ARGS
from tests.eventually import eventually
from tests.places import Place
from tests.servers.scripted_server import ScriptedServer, answer_to
from vllm_tasks import InvalidCall, VllmAPI, VllmModel, predict_batches
from vllm_tasks.calls.call import identity_of
from vllm_tasks.engines import loop
from vllm_tasks.engines.batching import generate
from vllm_tasks.engines.local import process
from vllm_tasks.engines.local.engine import LocalConfig, LocalEngine
from vllm_tasks.engines.ray import actor
from vllm_tasks.engines.ray.engine import RayHost
from vllm_tasks.engines.ray.replicas import REMEMBERED, Replica, Replicas, prefixes_of
from vllm_tasks.errors import EngineFailed, ServerUnavailable
from vllm_tasks.rows import Completion, Request

SCRIPTED_HOST = Path(__file__).parents[1] / "servers/scripted_host.py"
ON_CPU = {"num_gpus": 0, "num_cpus": 1}
Make = Callable[..., VllmModel]
OTHERS: set[int] = set()
"""Hosts of engines that tests of other files share."""


class ScriptedActor(actor.HostActor):
    """The actor with the scripted host in it."""

    def __init__(self) -> None:
        super().__init__()
        process.HOST = SCRIPTED_HOST
        # The host cannot know it: all nodes of a test have one address.
        os.environ["NODE"] = ray().get_runtime_context().get_node_id()


class Lossy(ScriptedActor):
    """An actor whose first frames are lost on the way, as where an object store is full."""

    async def start(self, arguments: Any, timeout: float, python: str) -> Any:  # noqa: ASYNC109
        self._lost = Path(f"{arguments['log']}.lost")
        return await super().start(arguments, timeout, python)

    async def put(self, frames: Any) -> None:
        if not self._lost.exists():
            self._lost.touch()
            raise OSError("there is no room")
        await super().put(frames)


@pytest.fixture(scope="module")
def cluster(ray_token: None) -> Iterator[str]:
    """The address of a cluster of two nodes with a CPU each, and four GPUs that Ray believes in."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_gpus": 4, "include_dashboard": False})
    nodes.add_node()
    OTHERS.update(host.pid for host in hosts())
    yield nodes.address
    nodes.shutdown()


@pytest.fixture
def make(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes models on the cluster whose engines are scripted hosts; nothing of them is left at the end."""
    monkeypatch.setattr(actor, "HostActor", ScriptedActor)
    made: list[VllmModel] = []

    def model(replicas: int = 1, ray_config: dict[str, Any] = ON_CPU, **arguments: Any) -> VllmModel:
        made.append(
            VllmModel(
                identifier="scripted",
                model_name="m",
                ray_address=cluster,
                replicas=replicas,
                ray_config=ray_config,
                vllm_kwargs={"log": str(tmp_path / "log"), **arguments},
                chat=False,  # as in test_sharing
            )
        )
        return made[-1]

    yield model
    for each in made:
        each.close()
    assert_nothing_left()


def ray() -> Any:
    import ray

    return ray


def of_ray(title: str) -> list[psutil.Process]:
    """Our processes, and those of the cluster, whose command line holds `title`."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def actors() -> list[psutil.Process]:
    return [p for name in ("HostActor", "ScriptedActor", "Lossy") for p in of_ray(f"ray::{name}")]


def hosts() -> list[psutil.Process]:
    return of_ray("_host.py") + of_ray("engines/local/host.py")


def assert_nothing_left() -> None:
    """Assert that no actor and no host is left, and that this process is in no cluster."""
    assert not ray().is_initialized()
    assert eventually(lambda: not actors() and {host.pid for host in hosts()} <= OTHERS)


# ---------------------------------------------------------------------- real engines


@pytest.mark.engine
@pytest.mark.long
def test_replicas_on_two_nodes_answer_a_table_though_one_is_killed(
    cluster: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Two engines share a table; one is killed meanwhile, and every row is there once and complete."""
    model = VllmModel(
        identifier="m",
        model_name=str(tiny_model),
        vllm_kwargs=TINY_ARGS,
        ray_address=cluster,
        ray_config=ON_CPU,
        replicas=2,
        predict_kwargs={"max_tokens": 64, "ignore_eos": True},
    )
    rows = 800
    place = Place(str(tmp_path / "lake"))
    place.fill_texts(*(f"row {i}" for i in range(rows)))
    with model:
        assert len({a.ppid() for a in actors()}) == 2, "both are on one node"
        killer = threading.Timer(1, actors()[0].kill)
        killer.start()
        report = model.predict_in_db("text", "rows", db=place.db, max_chunk_size=100)
        killer.join()
        assert (report.succeeded, report.completion_tokens) == (rows, rows * 64)
        assert place.answers().keys() == set(range(rows))
        assert len(actors()) == 2
    assert_nothing_left()
    here = model.model_copy(update={"on_ray": False, "ray_address": None, "replicas": 1})
    assert identity_of(model.engine_config()) == identity_of(here.engine_config())


# ---------------------------------------------------------------------- deaths and places


def test_rows_of_a_host_that_died_in_its_actor_are_asked_once_more(make: Make, tmp_path: Path) -> None:
    """The death of an engine's process is handled as on this machine: its open rows are sent again."""
    rows = ["a", "die", *(f"row {i}" for i in range(200))]
    assert make().predict_batches(rows, temperature=0) == rows
    asked = (tmp_path / "log").read_text().splitlines()
    assert asked.count("die") == 2
    assert asked.count("start") == 2


def test_an_end_that_is_cut_short_gives_the_place_back_too(make: Make, tmp_path: Path) -> None:
    """An interrupt has no time for an orderly end; an actor left behind would keep its GPUs."""

    async def cut_short() -> None:
        arguments = {"model": "m", "log": str(tmp_path / "log")}
        host, _ = await RayHost.launch(ON_CPU, "", arguments, 60)
        assert len(actors()) == 2
        end = asyncio.create_task(host.end())
        await asyncio.wait({end}, timeout=0)
        end.cancel()
        await asyncio.wait({end})

    with make():
        loop.run(cut_short())
        assert eventually(lambda: len(actors()) == 1)


def test_failed_start_tells_the_reason_of_the_engine(make: Make) -> None:
    """The error has vLLM's reason from the actor."""
    with pytest.raises(EngineFailed, match="ValueError: no room"):
        make(refuse="no room").predict("a")


@pytest.mark.long
def test_several_gpus_come_in_one_placement_group(make: Make) -> None:
    """Each engine sees GPUs of its own, all of one machine; at the end they are free again."""
    from ray.util import placement_group_table

    model = make(replicas=2, ray_config={}, tensor_parallel_size=2)
    with model:
        # Enough rows at once for both, and none of them folded.
        seen = set(model.predict_batches(["devices"] * 40, temperature=1))
        groups = [g for g in placement_group_table().values() if g["state"] == "CREATED"]
        free = ray().available_resources().get("GPU", 0)
    assert seen == {"0,1", "2,3"}
    assert [(g["strategy"], g["bundles"]) for g in groups] == [("STRICT_PACK", {0: {"GPU": 2.0}})] * 2
    assert free == 0
    with make(ray_config={}, tensor_parallel_size=4) as all_of_them:
        assert all_of_them.predict("devices") == "0,1,2,3"


def test_place_that_is_not_there_is_waited_for_and_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster may grow or become free, so the call waits; in the end the error names the resources."""
    monkeypatch.setenv("VLLM_TASKS_ENGINE_START_TIMEOUT", "1")
    with pytest.raises(EngineFailed, match=r"'GPU': 8.*request less") as caught:
        make(ray_config={"num_gpus": 8}).predict("a")
    assert caught.value.temporary


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_gpu": 1}, "num_gpu"),
        ({"num_cpus": "all"}, "num_cpus"),
        ({"max_concurrency": 1}, "max_concurrency.*at the same time"),
        ({"lifetime": "detached"}, "lifetime.*ends with its flow"),
    ],
)
def test_options_that_ray_does_not_know_or_that_are_ours_are_refused(
    make: Make, options: dict[str, Any], words: str
) -> None:
    """A misspelt option is not dropped, and none can take an engine from its owner."""
    with pytest.raises(InvalidCall, match=f"ray_config.*{words}"):
        make(ray_config={**ON_CPU, **options}).predict("a")


def test_rows_that_are_lost_on_their_way_are_sent_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Their actor lives, but it knows nothing of them; so the engine is restarted at once."""
    monkeypatch.setattr(actor, "HostActor", Lossy)
    monkeypatch.setenv("VLLM_TASKS_ENGINE_TIMEOUT", "60")
    assert make().predict_batches(["a", "b"]) == ["a", "b"]
    assert "there is no room" in caplog.text
    assert "it hung" not in caplog.text


def test_an_actor_that_ray_refuses_keeps_no_gpus(make: Make) -> None:
    """Its placement group is removed, though this process stays in the cluster."""
    from ray.util import placement_group_table

    with make() as model:
        assert model.predict("a")
        with pytest.raises(InvalidCall, match=r"ray_config: .*async actors"):
            make(ray_config={"num_gpus": 2, "allow_out_of_order_execution": False}).predict("a")
        assert eventually(lambda: {g["state"] for g in placement_group_table().values()} <= {"REMOVED"})


# ---------------------------------------------------------------------- joining and leaving


def test_without_an_address_ray_is_our_own_and_ends_with_the_last_engine(
    make: Make, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ray of this process alone is used; resources that this machine lacks are refused at once."""
    of_the_cluster = len(of_ray("raylet/raylet"))
    model = make().model_copy(update={"ray_address": None})
    with model:
        assert model.predict("a") == "a"
        assert len(of_ray("raylet/raylet")) == of_the_cluster + 1
        with pytest.raises(InvalidCall, match=r"this machine has 0.*num_gpus"):
            model.model_copy(update={"ray_config": {}}).predict("a")
        by_vllm = {**model.vllm_kwargs, "distributed_executor_backend": "ray", "pipeline_parallel_size": 3}
        with pytest.raises(InvalidCall, match=r"need 3 GPU each, and this machine has 0"):
            model.model_copy(update={"ray_config": {}, "vllm_kwargs": by_vllm}).predict("a")
        with pytest.raises(InvalidCall, match=r"is in the Ray cluster at .* already"):
            make().predict("a")
    assert eventually(lambda: len(of_ray("raylet/raylet")) == of_the_cluster)
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    with model:
        assert len(of_ray("raylet/raylet")) == of_the_cluster


@pytest.mark.long
def test_ray_that_was_there_is_used_and_left_as_it_was(
    make: Make, cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A Ray that others have joined in this process stays joined. When they leave, rows in flight fail,
    and the next call starts another engine.
    """
    monkeypatch.setattr("vllm_tasks.engines.ray.engine.CHECK_EVERY", 0.2)
    ray().init(address=cluster, log_to_driver=False, logging_level="ERROR")
    model = make(pause=1)
    assert model.predict("a") == "a"
    model.close()
    assert ray().is_initialized()

    def leave() -> None:
        assert eventually(lambda: "b 0" in (tmp_path / "log").read_text())
        ray().shutdown()

    leaving = threading.Thread(target=leave)
    leaving.start()
    with pytest.raises(EngineFailed, match="left its Ray cluster"):
        model.predict_batches([f"b {i}" for i in range(20)])
    leaving.join()
    assert model.predict("d") == "d"


def test_cluster_that_is_not_there_is_named() -> None:
    """The refusal names the address that was tried."""
    model = VllmModel(identifier="m", model_name="m", ray_address="127.0.0.1:1", ray_config=ON_CPU)
    with pytest.raises(ServerUnavailable, match=r"127\.0\.0\.1:1"):
        model.predict("a")


def test_without_ray_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing extra is named with the line that installs it."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidCall, match=r"pip install 'vllm-tasks\[ray\]'"):
        VllmModel(identifier="m", model_name="m", on_ray=True).predict("a")


# ---------------------------------------------------------------------- Prefect's runner of tasks on Ray


class TestRayTaskRunner:
    """The tasks of this package in Ray's workers."""

    pytestmark = IN_PREFECT

    def test_tasks_run_on_ray(self, cluster: str, server: ScriptedServer) -> None:
        """Rows travel into a worker of Ray, answers come back in order."""
        from prefect_ray import RayTaskRunner

        model = VllmAPI(identifier="api", api_url=server.url)

        @flow(task_runner=RayTaskRunner(address=cluster, init_kwargs={"log_to_driver": False}))
        def on_ray() -> list[Any]:
            futures = [predict_batches.submit(model, [f"{i} a", f"{i} b"]) for i in range(2)]
            futures.append(predict_batches.submit(model, futures[0]))
            return [future.result() for future in futures]

        first, second, chained = on_ray()
        assert [first, second] == [[answer_to(f"{i} a"), answer_to(f"{i} b")] for i in range(2)]
        assert chained == [answer_to(answer) for answer in first]


# ---------------------------------------------------------------------- which replica, without Ray


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Replicas]:
    """Makes `Replicas` of scripted hosts here; the log of each is a letter."""
    monkeypatch.setattr(process, "HOST", SCRIPTED_HOST)

    def replicas(*each: dict[str, Any]) -> Replicas:
        arguments = [{"model": "m", "log": str(tmp_path / "abc"[i]), **a} for i, a in enumerate(each)]
        return Replicas([LocalEngine(LocalConfig(json.dumps(a), 30)) for a in arguments])

    return replicas


def ask(replicas: Replicas, prompts: Sequence[str]) -> list[Any]:
    async def whole_life() -> list[Any]:
        await replicas.start()
        try:
            return await generate(replicas, [Request(p, {}) for p in prompts], 1)
        finally:
            await replicas.close()

    results = asyncio.run(whole_life())
    return [r.text if isinstance(r, Completion) else r for r in results]


def asked_of(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line not in ("start", "end")]


def test_rows_are_shared_out(scripted: Callable[..., Replicas], tmp_path: Path) -> None:
    """Both replicas get rows, each row is sent once, and the window is the sum of theirs."""
    replicas = scripted({}, {})
    prompts = [f"row {i}" for i in range(100)]
    assert ask(replicas, prompts) == prompts
    first, second = asked_of(tmp_path / "a"), asked_of(tmp_path / "b")
    assert sorted(first + second) == sorted(prompts)
    assert min(len(first), len(second)) >= 5
    assert replicas.window.limit == 2 * 5


def test_replica_that_fails_for_good_is_left_out(scripted: Callable[..., Replicas], tmp_path: Path) -> None:
    """Its unfinished rows go to the others; the call fails only when all replicas have failed."""
    replicas = scripted({"lives": 1}, {})
    prompts = ["die", *(f"row {i}" for i in range(30))]
    assert ask(replicas, prompts) == prompts
    assert replicas.window.limit == 5
    for log in tmp_path.iterdir():
        log.unlink()
    with pytest.raises(EngineFailed, match="no more lives"):
        ask(scripted({"lives": 1}, {"lives": 1}), prompts)


def test_start_of_replicas_is_all_or_nothing(scripted: Callable[..., Replicas]) -> None:
    """If one replica does not start, none is left, and its reason is reported."""
    with pytest.raises(EngineFailed, match="no room"):
        ask(scripted({}, {"refuse": "no room"}), ["a"])
    assert not of_ray("scripted_host.py")


class Idle(LocalEngine):
    """An engine of a given size that is ready and gets no rows."""

    is_ready = True

    def __init__(self, limit: int) -> None:
        super().__init__(LocalConfig('{"model": "m"}', 1))
        self.window.limit = limit


def dispatch(*open_rows: int) -> tuple[Replicas, list[Replica]]:
    replicas = Replicas([])
    replicas._replicas = [Replica(Idle(100), n) for n in open_rows]
    return replicas, replicas._replicas


def test_prompts_with_one_beginning_go_to_one_replica_unless_it_is_clearly_fuller() -> None:
    """The cache of a replica is used again, but no other replica is left without rows."""
    replicas, (first, second) = dispatch(0, 0)
    long = "Classify this text. " * 20
    assert replicas._choose(Request(long + "1", {})) is first
    first.open = 10
    assert replicas._choose(Request(long + "2", {})) is first
    assert replicas._choose(Request("another", {})) is second
    first.open = 11
    assert replicas._choose(Request(long + "3", {})) is second
    second.open = 11
    assert replicas._choose(Request(long + "4", {})) is first


def test_longest_beginning_in_common_decides() -> None:
    """Of two replicas with a common prefix, the one that had more of the prompt is chosen."""
    replicas, (first, second) = dispatch(0, 0)
    head = "You are a helpful assistant. " * 5
    assert replicas._choose(Request(head + "A" * 1000, {})) is first
    second.remember(prefixes_of(Request(head + "B" * 1000, {})))
    first.open = second.open = 5
    assert replicas._choose(Request(head + "B" * 1000 + "?", {})) is second
    messages: list[Any] = [{"role": "user", "content": head + "A" * 1000}]
    assert len(prefixes_of(Request(messages, {}))) == 3


def test_what_a_replica_remembers_is_bounded() -> None:
    """Memory does not grow with the table."""
    replicas, (only,) = dispatch(0)
    for i in range(REMEMBERED):
        replicas._choose(Request(f"{i:064}", {}))
        replicas._choose(Request(f"short {i}", {}))
    replicas._choose(Request("x" * 64, {}))
    assert len(only.prefixes) == REMEMBERED
