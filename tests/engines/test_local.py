"""The local engine: real vLLM in a process of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow

from tests.conftest import TINY_ARGS
from tests.engines.poison import ROWS, check_poisoned
from tests.eventually import eventually
from tests.places import Place
from tests.tiny_model import make_adapter
from vllm_tasks import InvalidCall, RowError, VllmModel, predict_batches
from vllm_tasks.engines import loop, sharing
from vllm_tasks.errors import EngineFailed, RowErrors
from vllm_tasks.results import Completion

pytestmark = pytest.mark.engine


def processes(root: int | None = None) -> list[psutil.Process]:
    """The live processes of all engines started by `root` (this process if None)."""
    found = []
    for host in psutil.Process(root).children():
        if any(part.endswith("engines/local/host.py") for part in host.cmdline()):
            found += [host, *host.children(recursive=True)]
    return found


def alive(found: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def engine_core(found: list[psutil.Process]) -> psutil.Process:
    return next(p for p in found if "EngineCore" in " ".join(p.cmdline()))


# ---------------------------------------------------------------------- answers


def test_answers_keep_the_order_of_the_rows(local_model: VllmModel) -> None:
    """Each row gets its own answer, whatever chunks it travels in."""
    rows = [f"row {i} {'word ' * (i % 7)}" for i in range(200)]
    alone = {row: local_model.predict(row) for row in rows[:5]}
    answers = local_model.predict_batches(rows, seed=1)
    # Greedy answers may differ between batch compositions, and may not between equal requests.
    assert len(answers) == 200
    assert sum(alone[row] == answer for row, answer in zip(rows[:5], answers, strict=False)) >= 4
    assert local_model.predict_batches(rows[::-1], seed=1)[::-1][:3] == answers[:3]


def test_n_gives_a_list_of_texts(local_model: VllmModel) -> None:
    """With n > 1 every output is a list of n texts."""
    outputs = local_model.predict_batches(["a", "b"], n=3, temperature=1, seed=1)
    assert [len(o) for o in outputs] == [3, 3]
    assert len(set(outputs[0])) == 3


def test_completions_tell_all_that_vllm_tells(local_model: VllmModel) -> None:
    """Full results carry token ids, logprobs, prompt logprobs, finish reason and usage."""
    begin = time.monotonic()
    (completion,) = local_model.completions(["The quick brown"], logprobs=2, prompt_logprobs=1, max_tokens=4)
    assert isinstance(completion, Completion)
    (choice,) = completion.choices
    assert choice.finish_reason == "length"
    assert choice.token_ids is not None
    assert choice.logprobs is not None
    assert len(choice.token_ids) == len(choice.logprobs) == completion.completion_tokens == 4
    assert all(t.logprob <= 0 and len(t.top) in (2, 3) for t in choice.logprobs)  # also where two read alike
    assert completion.prompt_logprobs is not None
    assert completion.prompt_logprobs[0] is None
    assert len(completion.prompt_logprobs) == completion.prompt_tokens
    assert completion.seconds is not None
    assert 0 < completion.seconds < time.monotonic() - begin


def test_sampling_parameters_reach_vllm(local_model: VllmModel) -> None:
    """stop, logit_bias, structured_outputs and seed have vLLM's effects."""
    assert local_model.predict("x", structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert local_model.predict("x", logit_bias={"40": 100}, max_tokens=3) == "FFF"
    assert local_model.predict("x", logit_bias={"40": 100}, stop=["F"]) == ""
    assert local_model.predict("x", temperature=1, seed=7) == local_model.predict("x", temperature=1, seed=7)


def test_chat_uses_the_template_of_the_model(local_model: VllmModel) -> None:
    """A chat prompt costs the tokens of the chat template around it."""
    chat = local_model.model_copy(update={"chat": True, "system": "Be brief."})
    (templated,) = chat.completions(["hello"])
    (plain,) = local_model.model_copy(update={"chat": False}).completions(["hello"])
    (messages,) = local_model.completions([[{"role": "user", "content": "hello"}]])
    assert plain.prompt_tokens < messages.prompt_tokens < templated.prompt_tokens  # type: ignore[union-attr]


def test_poisoned_rows_fail_alone(local_model: VllmModel) -> None:
    """Of 1,000 rows with 10 poisoned ones, 990 complete in order and 10 errors name their row and reason."""
    results = local_model.predict_batches(ROWS, on_error="return", max_tokens=2)
    check_poisoned(results)
    with pytest.raises(RowErrors, match="10 of 1000 rows failed") as caught:
        local_model.predict_batches(ROWS, max_tokens=2)
    assert len(caught.value.errors) == 10
    assert len(caught.value.results) == 1000


def test_values_that_vllm_refuses_are_errors_of_the_row(local_model: VllmModel) -> None:
    """Values that do not go together come back with vLLM's own words."""
    (error,) = local_model.predict_batches(["a"], on_error="return", min_tokens=20, max_tokens=10)
    assert isinstance(error, RowError)
    assert error.kind == "refused"
    assert "min_tokens must be less than or equal to max_tokens" in error.message


def test_works_inside_a_running_event_loop(local_model: VllmModel) -> None:
    """The synchronous methods work where a loop is running already, as in a notebook."""

    async def cell() -> object:
        return local_model.predict("hello")

    assert asyncio.run(cell()) == local_model.predict("hello")


# ---------------------------------------------------------------------- one engine, and its end


@pytest.fixture
def own_model(tiny_model: Path) -> Iterator[VllmModel]:
    """A model with an engine of its own, not yet started."""
    arguments = {**TINY_ARGS, "max_num_seqs": 16}
    model = VllmModel(identifier="own", model_name=str(tiny_model), vllm_kwargs=arguments)
    yield model
    model.close()


@pytest.mark.usefixtures("prefect_server")
def test_one_engine_is_started_shared_survives_its_death_and_ends(
    own_model: VllmModel, tmp_path: Path
) -> None:
    """The life of an engine: started once by two tasks at once, restarted when it dies, closed; also when
    it works for a table."""
    before = {p.pid for p in processes()}

    def mine() -> list[psutil.Process]:
        return [p for p in processes() if p.pid not in before]

    @flow
    def two_tasks() -> list[Any]:
        futures = [predict_batches.submit(own_model, [f"{i}", "b"], max_tokens=2) for i in range(2)]
        return [future.result() for future in futures]

    assert [len(outputs) for outputs in two_tasks()] == [2, 2]
    assert sum("host.py" in " ".join(p.cmdline()) for p in mine()) == 1

    rows = [f"row {i}" for i in range(500)]
    place = Place(str(tmp_path / "lake"))
    place.fill_texts(*rows)
    sampling = {"max_tokens": 64, "ignore_eos": True}

    def killed_meanwhile(victim: psutil.Process, work: Callable[[], Any]) -> Any:
        killer = threading.Timer(0.5, victim.kill)
        killer.start()
        done = work()
        killer.join()
        assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
        return done

    answers = killed_meanwhile(engine_core(mine()), lambda: own_model.predict_batches(rows, **sampling))
    assert all(isinstance(a, str) for a in answers)

    over_a_table = partial(
        own_model.predict_in_db, "text", "rows", db=place.db, max_chunk_size=50, **sampling
    )
    report = killed_meanwhile(mine()[0], over_a_table)
    assert (report.succeeded, report.completion_tokens) == (500, 500 * 64)
    assert place.answers("own").keys() == set(range(500))

    twin = own_model.model_copy(update={"uuid": "twin", "identifier": "twin"})
    with twin:
        with own_model, own_model:
            pass
        assert alive(mine()), "the twin still holds the engine"
        found = mine()
    assert eventually(lambda: not alive(found), 30)


def test_interrupted_call_aborts_its_rows(local_model: VllmModel) -> None:
    """Ctrl-C ends a call at once, and the engine is free for the next one."""
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        local_model.predict_batches([f"row {i}" for i in range(5000)], max_tokens=900, ignore_eos=True)
    assert isinstance(local_model.predict("next"), str)


def shared_memory_of(found: Iterable[psutil.Process]) -> set[str]:
    """The files in /dev/shm that these processes have mapped."""
    names = set()
    for process in found:
        with suppress(psutil.Error, FileNotFoundError):
            names |= {
                m.path.removeprefix("/dev/shm/") for m in process.memory_maps() if "/dev/shm/" in m.path
            }
    return {name for name in names if not name.endswith("(deleted)")}


SCRIPT = """
import os, sys
from vllm_tasks import VllmModel
model = VllmModel(identifier="s", model_name=sys.argv[1], vllm_kwargs={arguments!r})
print("made", flush=True)
print(repr(model.predict("hello")), flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
"""


def start_script(folder: Path, tiny_model: Path, then: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(arguments=TINY_ARGS))
    command = [sys.executable, str(script), str(tiny_model), then]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of vLLM's sockets, with a path that is short enough for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("VLLM_RPC_BASE_PATH", folder)
        yield Path(folder)


@pytest.mark.usefixtures("all_processes_of_vllm")
def test_script_without_a_main_guard_leaves_nothing(tmp_path: Path, tiny_model: Path, sockets: Path) -> None:
    """An ordinary script predicts, ends by itself, and its engine, shared memory and sockets end with it."""
    seen: set[Path] = set()
    found: set[psutil.Process] = set()
    shared_memory: set[str] = set()
    with start_script(tmp_path, tiny_model, "end") as script:
        while script.poll() is None:
            with suppress(psutil.NoSuchProcess):
                found.update(processes(script.pid))
            shared_memory |= shared_memory_of(found)
            seen.update(sockets.glob("*/*"))
            time.sleep(0.1)
        assert script.stdout is not None
        out = script.stdout.read()
    assert len(found) > 2
    assert shared_memory
    assert seen
    assert script.returncode == 0
    assert out.count("made") == 1
    assert eventually(lambda: not alive(list(found)))
    assert eventually(lambda: not shared_memory & set(os.listdir("/dev/shm")), 10)
    assert not os.listdir(sockets)


@pytest.mark.long
@pytest.mark.usefixtures("all_processes_of_vllm")
@pytest.mark.parametrize("moment", ["starting", "ready", "starting, with its host"])
def test_killed_process_leaves_no_engine(
    moment: str, tmp_path: Path, tiny_model: Path, sockets: Path
) -> None:
    """After `kill -9`, no process of its engine and no socket survives 30 s.

    If the host is killed with it, as Ray kills the children of its actors, nobody removes the sockets.
    """
    with start_script(tmp_path, tiny_model, "wait") as script:
        assert script.stdout is not None
        assert script.stdout.readline() == "made\n"
        if moment == "ready":
            script.stdout.readline()
        else:
            assert eventually(lambda: len(processes(script.pid)) > 2)
        found = processes(script.pid)
        script.kill()
        if "host" in moment:
            found[0].kill()
        script.wait()
    assert len(found) > 2
    assert eventually(lambda: not alive(found), 30)
    assert eventually(lambda: not os.listdir(sockets), 5) or "host" in moment


# ---------------------------------------------------------------------- engines of several ranks

FORKED = """
import os

put = type(os.environ).__setitem__

def forked(self, name, value):
    put(self, name, "fork" if name == "VLLM_WORKER_MULTIPROC_METHOD" else value)

type(os.environ).__setitem__ = forked
"""
"""Read by Python at each start: vLLM forks, as it does by default on GPUs, though on CPUs it would spawn."""


@pytest.mark.long
@pytest.mark.usefixtures("all_processes_of_vllm")
@pytest.mark.parametrize(
    ("option", "forks", "capacity"), [("tensor_parallel_size", True, 9), ("data_parallel_size", False, 18)]
)
def test_two_ranks(
    option: str, forks: bool, capacity: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows fill both ranks of any kind, with any length of the temporary folder's path.

    Threads and cores are those that the user has set.
    """
    deep = tmp_path / ("deep" * 25)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    if forks:
        (tmp_path / "sitecustomize.py").write_text(FORKED)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = {**TINY_ARGS, "max_num_seqs": 8, option: 2}
    model = VllmModel(identifier="two", model_name=str(tiny_model), vllm_kwargs=arguments)
    with ExitStack() as stack:
        for _ in range(40):  # so that a number which is closed in one process is another file's in the next
            stack.enter_context(open(os.devnull))
        stack.enter_context(model)
        host = processes()[0]
        assert host.environ()["OMP_NUM_THREADS"] == "1"
        assert host.cpu_affinity() == psutil.Process().cpu_affinity()
        assert loop.run(sharing.capacity(model.engine_config())) == capacity
        assert len(model.predict_batches([f"row {i}" for i in range(40)], max_tokens=4)) == 40


# ---------------------------------------------------------------------- adapters, and an engine that hangs


def test_adapters_go_by_their_contents_and_wrong_ones_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """For any number in the call, answers come from the files in the adapter's folder. A wrong adapter is
    an error of the call, and the engine, which holds one adapter at a time, survives.
    """
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1}
    arguments = {**TINY_ARGS, "max_num_seqs": 16, **lora}
    model = VllmModel(identifier="lora", model_name=str(tiny_model), vllm_kwargs=arguments)
    a, b = (make_adapter(tmp_path / name, seed) for name, seed in (("a", 10), ("b", 11)))

    def ask(folder: Path, number: int | None = 1, name: str = "adapter") -> list[Any]:
        request = {"lora_name": name, "lora_path": str(folder), "lora_int_id": number}
        return model.predict_batches(["hello", "hi"], temperature=0, max_tokens=8, lora_request=request)

    with model:
        found = processes()
        of_a, of_b = ask(a, 7, "a"), ask(b, 8, "b")
        assert of_a != of_b
        assert (ask(a), ask(b)) == (of_a, of_b)
        trained = shutil.copytree(a, tmp_path / "trained")
        assert ask(trained) == of_a
        for file in b.iterdir():
            shutil.copy2(file, trained)
        assert ask(trained) == of_b
        shutil.rmtree(trained)
        assert (ask(a), ask(b)) == (of_a, of_b)

        empty, large = tmp_path / "empty", make_adapter(tmp_path / "large", 12, rank=16)
        empty.mkdir()
        for folder, reason in (
            (trained, "is not a folder"),
            (empty, "has no adapter_config.json"),
            (large, "rank 16 is greater than max_lora_rank 8"),
        ):
            with pytest.raises(InvalidCall, match=f"'adapter' cannot be used: .*{reason}"):
                ask(folder)
        with pytest.raises(InvalidCall, match="lora_name and lora_path"):
            model.predict("a", lora_request={"lora_name": "x"})
        assert ask(a) == of_a
        assert alive(found) == found


def test_adapter_without_an_engine_for_it_is_refused(local_model: VllmModel, tmp_path: Path) -> None:
    """The refusal names the missing engine argument."""
    request = {"lora_name": "a", "lora_path": str(make_adapter(tmp_path / "a", 1))}
    with pytest.raises(InvalidCall, match="enable_lora"):
        local_model.predict("a", lora_request=request)


@pytest.mark.long
def test_engine_core_that_stands_still_or_is_killed_is_named(
    own_model: VllmModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stopped core is ended after the site's timeout and its rows are sent again; for a killed core the
    signal is reported.
    """
    before = {p.pid for p in processes()}

    def core() -> psutil.Process:
        return engine_core([p for p in processes() if p.pid not in before])

    monkeypatch.setenv("VLLM_TASKS_ENGINE_TIMEOUT", "3")
    long = {"max_tokens": 400, "ignore_eos": True}
    rows = [f"row {i}" for i in range(150)]
    with own_model:
        for end in (psutil.Process.suspend, psutil.Process.kill):
            victim = core()
            timer = threading.Timer(1, end, [victim])
            timer.start()
            assert all(isinstance(a, str) for a in own_model.predict_batches(rows, **long))
            timer.join()
            assert not alive([victim])
    deaths = [r.getMessage() for r in caplog.records if " died: " in r.getMessage()]
    assert len(deaths) == 2
    assert "hung: no progress with any of" in deaths[0]
    assert "EngineCore" in deaths[1]
    assert "SIGKILL (often the kernel, out of memory)" in deaths[1]


# ---------------------------------------------------------------------- failed starts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_name": "/no/such/model"}, "no/such/model"),
        ({"vllm_kwargs": {"max_modle_len": 10}}, "did you mean 'max_model_len'"),
        ({"tensor_parallel_size": 64}, "64"),
        ({"vllm_kwargs": {**TINY_ARGS, "kv_cache_memory_bytes": 4096}}, "[Mm]emory|KV cache"),
    ],
    ids=["no such model", "misspelt argument", "too large for the machine", "no memory"],
)
def test_failed_start_gives_the_reason_of_vllm(
    tiny_model: Path, changes: dict[str, Any], reason: str
) -> None:
    """vLLM's reason for a failed start is in the error, and no process stays behind."""
    before = {p.pid for p in processes()}
    fields = {"identifier": "bad", "model_name": str(tiny_model), "vllm_kwargs": TINY_ARGS, **changes}
    with pytest.raises(EngineFailed, match=reason) as caught:
        VllmModel(**fields).predict("x")
    assert "See root cause above" not in str(caught.value)
    assert eventually(lambda: {p.pid for p in alive(processes())} <= before)


def test_model_without_a_name_is_refused_when_used() -> None:
    """An empty model_name is fine to keep in a block, and an error to predict with."""
    with pytest.raises(InvalidCall, match="model_name"):
        VllmModel(identifier="empty").predict("x")
