"""Engines of one machine: no device is used twice, and devices and slots are released however they end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import PrefectException
from prefect.settings import get_current_settings

from tests.conftest import IN_PREFECT
from tests.eventually import eventually
from vllm_tasks import InvalidCall, VllmModel
from vllm_tasks.engines import loop
from vllm_tasks.engines.local import gpus, process
from vllm_tasks.engines.local import slots as slots_module
from vllm_tasks.engines.local.gpus import Claim, Devices, free_devices, visible_devices
from vllm_tasks.engines.local.slots import HeldHere, Slots
from vllm_tasks.errors import EngineFailed

pytestmark = IN_PREFECT

HOLD = """
import asyncio, sys, time
from pathlib import Path
from vllm_tasks.engines.local.gpus import free_devices
print(",".join(asyncio.run(free_devices(int(sys.argv[1]), Path(sys.argv[2]))).names), flush=True)
time.sleep(600)
"""
SLOT_AND_EXIT = """
import os
from vllm_tasks.engines import loop
from vllm_tasks.engines.local.slots import Slots
import atexit
slots = Slots(os.environ["LIMIT"], 1)
atexit.register(lambda: loop.run(slots.release()))  # as engines do, when no thread may be started any more
loop.run(slots.take())
"""


@contextmanager
def holder(count: int, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process that holds so many devices, and their names once it has them."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(count), str(folder)], stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs, as far as this process and its children see."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")


# ---------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("visible", "seen"),
    [("0,1", ["0", "1"]), ("3", ["3"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]), ("", []), ("-1", [])],
)
def test_visible_devices_are_those_of_the_environment(
    visible: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable is read as CUDA reads it; an empty one hides all devices."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_devices() == seen


def test_without_it_the_driver_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One folder for each GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for address in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / address).mkdir()
    monkeypatch.setattr(gpus, "DRIVER", tmp_path)
    assert visible_devices() == ["0", "1"]


@pytest.mark.usefixtures("four")
def test_no_two_processes_hold_the_same_device(tmp_path: Path) -> None:
    """Three of them share four; the one that comes too late waits, until another is killed."""
    with ExitStack() as stack:
        held = [stack.enter_context(holder(count, tmp_path)) for count in (1, 2)]
        assert [names for _, names in held] == ["0", "1,2"]

        async def last() -> tuple[str, ...]:
            waiting = asyncio.create_task(free_devices(2, tmp_path))
            await asyncio.wait({waiting}, timeout=1.5)
            assert not waiting.done()
            held[0][0].send_signal(signal.SIGKILL)
            devices = await waiting
            devices.release()
            return devices.names

        assert asyncio.run(last()) == ("0", "3")


@pytest.mark.usefixtures("four")
def test_devices_stay_held_while_the_engines_process_lives(tmp_path: Path) -> None:
    """The lock belongs to the process that inherited it, even if its creator has ended."""
    devices = asyncio.run(free_devices(4, tmp_path))
    engine = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=devices.locks
    )
    with engine:
        devices.release()
        assert gpus._take_free(["0"], 1, tmp_path) is None
        engine.kill()
    again = asyncio.run(free_devices(4, tmp_path))
    again.release()
    assert again.names == ("0", "1", "2", "3")


@pytest.mark.usefixtures("four")
def test_a_machine_with_too_few_is_refused_at_once(tmp_path: Path) -> None:
    """This also holds if this process itself has the devices and would wait for itself."""
    with pytest.raises(InvalidCall, match=r"needs 5 GPUs .* sees 4; .*num_gpus=0"):
        asyncio.run(free_devices(5, tmp_path))
    held = asyncio.run(free_devices(3, tmp_path))
    with pytest.raises(InvalidCall, match=r"sees 4, of which engines of this same process hold 3"):
        asyncio.run(free_devices(2, tmp_path))
    held.release()


@pytest.mark.usefixtures("four")
def test_who_waits_for_its_own_process_is_refused(tmp_path: Path) -> None:
    """If two engines wait for each other's devices, one gets them and the other is refused."""

    async def both() -> list[Any]:
        waiting = [asyncio.create_task(free_devices(count, tmp_path)) for count in (2, 4)]
        assert not (await asyncio.wait(waiting, timeout=1.5))[0]
        other.send_signal(signal.SIGKILL)
        return await asyncio.gather(*waiting, return_exceptions=True)

    with holder(3, tmp_path) as (other, _):
        found = asyncio.run(both())
    (held,) = [each for each in found if isinstance(each, Devices)]
    held.release()
    assert [type(each) for each in found if each is not held] == [HeldHere]


@pytest.mark.usefixtures("four")
def test_a_folder_that_cannot_be_used_holds_nothing(tmp_path: Path) -> None:
    """A file that Docker made for a mount is opened to all; if it cannot be opened, no lock is left."""
    tmp_path.chmod(0o755)
    asyncio.run(free_devices(1, tmp_path)).release()
    assert tmp_path.stat().st_mode & 0o7777 == 0o1777
    (tmp_path / "2").symlink_to("/nowhere")  # as another user might, to lead astray
    before = os.listdir("/proc/self/fd")
    with pytest.raises(EngineFailed, match="no GPU can be held in"):
        asyncio.run(free_devices(3, tmp_path))
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert gpus._held == set()


@pytest.mark.usefixtures("four")
def test_a_link_in_place_of_the_folder_opens_nothing(tmp_path: Path) -> None:
    """Another user may make it first, to a private folder of ours."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    (tmp_path / "gpus").symlink_to(private)
    with pytest.raises(EngineFailed, match="no GPU can be held in"):
        asyncio.run(free_devices(1, tmp_path / "gpus"))
    assert private.stat().st_mode & 0o7777 == 0o700
    assert not [*private.iterdir()]


@pytest.mark.usefixtures("four")
def test_the_folder_is_common_to_all_users(tmp_path: Path) -> None:
    """Everybody may add the file of a device, nobody may remove another's, under any umask."""
    before = os.umask(0o077)
    try:
        asyncio.run(free_devices(1, tmp_path / "locks")).release()
    finally:
        os.umask(before)
    assert (tmp_path / "locks").stat().st_mode & 0o7777 == 0o1777
    assert (tmp_path / "locks" / "0").stat().st_mode & 0o777 == 0o644


@pytest.mark.usefixtures("four")
def test_a_forked_child_holds_nothing(tmp_path: Path) -> None:
    """Otherwise the child would keep the devices after its parent's end."""
    devices = asyncio.run(free_devices(4, tmp_path))
    child = os.fork()
    if child == 0:  # pragma: no cover
        os._exit(any(os.path.exists(f"/proc/self/fd/{lock}") for lock in devices.locks))
    assert os.waitpid(child, 0)[1] == 0
    devices.release()


# ---------------------------------------------------------------------- slots


@pytest.fixture
def limit(prefect_server: None) -> Iterator[str]:
    """A limit with two slots, on the tests' server."""
    name = f"vllm-gpus:test-{os.urandom(4).hex()}"
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=2))
        yield name
        client.delete_global_concurrency_limit_by_name(name)


def taken(limit: str) -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(limit).active_slots


def test_a_second_engine_waits_for_the_first(
    limit: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There are as many slots as GPUs; another process gets them when the first engine is closed."""
    caplog.set_level("INFO")
    first, second = Slots(limit, 2), Slots(limit, 1)

    async def run() -> None:
        await first.take()
        assert taken(limit) == 2
        monkeypatch.setattr("vllm_tasks.engines.local.slots._held", {})  # as if `second` were elsewhere
        waiting = asyncio.create_task(second.take())
        await asyncio.wait({waiting}, timeout=1)
        assert not waiting.done()
        await first.release()
        await waiting
        assert taken(limit) == 1
        await second.release()

    loop.run(run())
    assert taken(limit) == 0
    assert f"waiting for 1 free GPU slots of the limit {limit!r}" in caplog.text


def test_one_that_closes_while_it_waits_takes_nothing(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled at any time, it leaves neither a slot nor a wish for one."""
    first, second = Slots(limit, 2), Slots(limit, 1)

    async def run() -> None:
        await first.take()
        held: dict[str, int] = {}
        monkeypatch.setattr("vllm_tasks.engines.local.slots._held", held)
        waiting = asyncio.create_task(second.take())
        while not held:  # noqa: ASYNC110 - no event tells that it waits
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        waiting.cancel()
        await asyncio.wait({waiting})
        await first.release()

    loop.run(run())
    assert taken(limit) == 0


def test_a_missing_limit_is_refused() -> None:
    """The error says how to create the limit; Prefect itself would let every engine start."""
    with pytest.raises(InvalidCall, match=r"no global concurrency limit 'absent' .*make pools"):
        loop.run(Slots("absent", 1).take())


def test_waiting_in_vain_is_refused(limit: str) -> None:
    """An engine is refused if it needs more slots than exist, or slots that this process itself holds."""
    with pytest.raises(InvalidCall, match=r"needs 3 slots .* which has 2; .*--gpus"):
        loop.run(Slots(limit, 3).take())
    mine = Slots(limit, 2)
    loop.run(mine.take())
    with pytest.raises(InvalidCall, match="engines of this same process hold 2"):
        loop.run(Slots(limit, 1).take())
    loop.run(mine.release())


def test_a_lost_lease_is_taken_anew(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease is renewed after a restart of the server, for instance, while the engine keeps running."""
    monkeypatch.setattr("vllm_tasks.engines.local.slots.RENEW_EVERY", 0.1)
    slots = Slots(limit, 1)

    async def lose() -> None:
        await slots.take()
        lost = slots._lease
        assert lost is not None
        async with get_client() as client:
            await client.release_concurrency_slots_with_lease(lost)
        while slots._lease in (lost, None):  # noqa: ASYNC110 - nobody is told of it
            await asyncio.sleep(0.05)

    loop.run(asyncio.wait_for(lose(), 30))
    assert taken(limit) == 1
    loop.run(slots.release())
    assert taken(limit) == 0


def test_a_lease_that_a_busy_server_does_not_renew_is_kept(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease has not ended; releasing it would mean waiting for slots beside its own."""
    monkeypatch.setattr("vllm_tasks.engines.local.slots.RENEW_EVERY", 0.1)
    renew, renewed = PrefectClient.renew_concurrency_lease, asyncio.Event()
    refused = httpx.Response(500, request=httpx.Request("POST", "http://prefect"))
    refusals = [httpx.HTTPStatusError("busy", request=refused.request, response=refused), PrefectException()]

    async def busy_at_first(self: PrefectClient, lease: UUID, duration: float) -> Any:
        if refusals:
            raise refusals.pop()
        renewed.set()
        return await renew(self, lease, duration)

    monkeypatch.setattr(PrefectClient, "renew_concurrency_lease", busy_at_first)
    slots = Slots(limit, 1)

    async def hold() -> None:
        await slots.take()
        lease = slots._lease
        await renewed.wait()
        assert slots._lease == lease
        await slots.release()

    loop.run(asyncio.wait_for(hold(), 30))
    assert taken(limit) == 0


def test_a_forked_child_counts_none_of_its_parents_slots(limit: str) -> None:
    """Otherwise the child would be asked to close engines that it does not have."""
    slots = Slots(limit, 1)
    loop.run(slots.take())
    child = os.fork()
    if child == 0:  # pragma: no cover
        os._exit(bool(slots_module._held))
    assert os.waitpid(child, 0)[1] == 0
    loop.run(slots.release())


def test_a_process_that_exits_gives_its_slot_back(limit: str, tmp_path: Path) -> None:
    """This works with a server's name, too, which is resolved when no more threads can start."""
    url = str(get_current_settings().api.url).replace("127.0.0.1", "localhost")
    env = {**os.environ, "LIMIT": limit, "PREFECT_API_URL": url, "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SLOT_AND_EXIT], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert taken(limit) == 0


def test_a_claim_is_all_or_nothing(limit: str, four: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device the slot is released; an engine on CPUs claims neither."""
    monkeypatch.setenv("VLLM_TASKS_GPU_SLOTS", limit)
    monkeypatch.setenv("VLLM_TASKS_GPUS", "5")
    with pytest.raises(InvalidCall, match="needs 5 GPUs"):
        loop.run(Claim(1).take())
    loop.run(Claim(0).take())
    assert taken(limit) == 0


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> Callable[..., VllmModel]:
    """Models on two GPUs of this machine, with engines that follow orders in the prompt."""
    monkeypatch.setattr(process, "HOST", Path(__file__).parents[1] / "servers/scripted_host.py")
    monkeypatch.setattr(gpus.free_devices, "__defaults__", (tmp_path,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("VLLM_TASKS_GPU_SLOTS", limit)
    monkeypatch.setenv("VLLM_TASKS_GPUS", "1")

    def make(name: str, tensor_parallel_size: int = 1, **arguments: Any) -> VllmModel:
        return VllmModel(
            identifier=name,
            model_name=name,
            tensor_parallel_size=tensor_parallel_size,
            vllm_kwargs={"log": str(tmp_path / f"{name}.log"), **arguments},
        )

    return make


def test_an_engine_holds_what_it_claims_until_it_is_closed(
    scripted: Callable[..., VllmModel], limit: str
) -> None:
    """One that dies is started again on the same devices; a second one gets others."""
    one, other = scripted("one"), scripted("other")
    with one, other:
        assert one.predict("die") == "die"
        assert taken(limit) == 2
        assert sorted(environment(pid)["CUDA_VISIBLE_DEVICES"] for pid in children()) == ["0", "1"]
    assert (taken(limit), children()) == (0, [])


def test_an_engine_that_is_given_up_holds_nothing(scripted: Callable[..., VllmModel], limit: str) -> None:
    """This holds for a failed start and for a failed restart."""
    with pytest.raises(EngineFailed, match="no CUDA"):
        scripted("refused", refuse="no CUDA").predict("a")
    assert taken(limit) == 0
    dying = scripted("dying", tensor_parallel_size=2, lives=1)
    with pytest.raises(EngineFailed, match="no more lives"):
        dying.predict("die")
    # The call is told first, then all is given back.
    assert eventually(lambda: (taken(limit), gpus._held) == (0, set()))


def test_an_engine_whose_process_cannot_be_made_again_ends_its_calls(
    scripted: Callable[..., VllmModel], limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk or a missing Python is not vLLM's failure, and the rows must not wait forever."""
    with scripted("one") as model:
        monkeypatch.setattr(sys, "executable", "/no/python")
        with pytest.raises(EngineFailed, match=r"vLLM's process cannot start: .*/no/python") as caught:
            model.predict("die")
    assert caught.value.temporary
    assert taken(limit) == 0


def test_warm_engines_make_room(scripted: Callable[..., VllmModel], limit: str) -> None:
    """An unused engine is closed when another one of this process needs its GPU; one in use is not."""
    warm, next_one = scripted("warm", tensor_parallel_size=2), scripted("next", tensor_parallel_size=2)
    warm.predict("a")
    assert taken(limit) == 2
    with next_one:
        assert next_one.predict("b") == "b"
        assert len(children()) == 1
        with pytest.raises(InvalidCall, match="engines of this same process hold 2: close one first"):
            warm.predict("a")
    assert taken(limit) == 0


def children() -> list[int]:
    """The engines' processes of this one."""
    listed = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    for thread in Path(f"/proc/{os.getpid()}/task").iterdir():
        listed += " " + (thread / "children").read_text()
    pids = sorted({int(pid) for pid in listed.split()})
    return [pid for pid in pids if "scripted_host.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
