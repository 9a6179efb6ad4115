"""LoRA adapters of one engine. Part of the program `host`, which loads this file by path."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_tasks.engines import session
else:  # which would import the package
    session = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "session.py")))

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""Files of a LoRA adapter, by the names that vLLM looks for."""


class Unusable(Exception):
    """The adapter that a call names cannot be used."""


class Adapters:
    """LoRA adapters by name and contents. Each gets its own number, name and copy.

    vLLM identifies an adapter by its number, and in the prefix cache by its name. It reads the folder again
    whenever other adapters have displaced this one. A folder changed by then would mix answers, and a missing
    one would end the engine. So the folder is copied now and loaded before a row needs it, where a failure
    affects only the call.
    """

    def __init__(self, engine: Any, models: Any) -> None:
        self.engine = engine
        self.models = models  # of vLLM's server, which also assigns numbers, to `default_mm_loras`
        self.loads: dict[str, asyncio.Task[Any]] = {}

    async def request(self, given: Any) -> Any:
        """vLLM's request for the adapter `given`, with its folder's current contents. Raises `Unusable`."""
        if given is None:
            return None
        if not isinstance(given, Mapping) or not {"lora_name", "lora_path"} <= given.keys():
            raise Unusable(f"lora_request={given!r:.200} must have lora_name and lora_path")
        wanted = {name: v for name, v in given.items() if name not in ("lora_int_id", "load_inplace")}
        found = stamps(wanted["lora_path"])
        key = json.dumps([wanted, found], sort_keys=True)
        if key not in self.loads:
            self.loads[key] = asyncio.create_task(self.load(key, wanted, found))
        return await asyncio.shield(self.loads[key])

    async def load(self, key: str, wanted: dict[str, Any], found: Stamps) -> Any:
        from vllm.lora.request import LoRARequest
        from vllm.lora.utils import get_adapter_absolute_path
        from vllm.v1.engine.exceptions import EngineDeadError

        number = self.models.lora_id_counter.inc(1)
        try:
            if self.engine.vllm_config.lora_config is None:
                raise Unusable("the engine accepts adapters only with vllm_kwargs={'enable_lora': True}")
            folder = await asyncio.to_thread(get_adapter_absolute_path, wanted["lora_path"])
            copy = await asyncio.to_thread(copied, Path(folder), number, wanted["lora_path"], found)
            own = {
                "lora_name": f"{wanted['lora_name']}#{number}",
                "lora_int_id": number,
                "lora_path": str(copy),
            }
            request = LoRARequest(**{**wanted, **own})
            await self.engine.add_lora(request)
            self.models.lora_requests[request.lora_name] = request
        except EngineDeadError:
            raise
        except Exception as error:
            del self.loads[key]  # the next call may succeed
            words = str(error) if isinstance(error, Unusable) else session.reason_of(error)
            raise Unusable(f"the adapter {wanted['lora_name']!r} cannot be used: {words}") from error
        return request


Stamps = list[tuple[int, int, int]]


def stamps(folder: str) -> Stamps:
    """Sizes and times of an adapter's files, which show changes. Empty if the folder is not local."""
    files = [Path(folder).expanduser() / name for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS)]
    found = [file.stat() for file in files if file.is_file()]
    return [(status.st_size, status.st_mtime_ns, status.st_ctime_ns) for status in found]


def copied(folder: Path, number: int, given: str, found: Stamps) -> Path:
    """Copy the adapter in `folder`, `given` by the call, to a folder that is removed with the engine.

    Raises `Unusable` if its files are no longer those that were `found`: the copy may mix old and new ones.
    """
    weights = [name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
    if not weights or not (folder / ADAPTER_CONFIG).is_file():
        what = "has no" if folder.is_dir() else "is not a folder with"
        raise Unusable(f"{folder} {what} {ADAPTER_CONFIG} and {' or '.join(ADAPTER_WEIGHTS)}")
    copy = Path(os.environ[session.SOCKETS]) / f"adapter-{number}"
    copy.mkdir()
    for name in (ADAPTER_CONFIG, *weights):
        shutil.copyfile(folder / name, copy / name)
    if stamps(given) != found:
        raise Unusable(f"{folder} was written to while it was copied; run the call again when it is complete")
    return copy
