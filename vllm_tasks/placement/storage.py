"""Rows and answers on their way: files in Prefect's default result storage, which both sides must see."""

from __future__ import annotations

import json
import logging
import os
import re
from inspect import isawaitable
from typing import Any
from uuid import uuid4

from prefect.filesystems import LocalFileSystem
from prefect.results import get_default_result_storage

from vllm_tasks.engines import loop
from vllm_tasks.errors import InvalidCall

logger = logging.getLogger(__name__)

FOLDER = "vllm-tasks"
"""Of the result storage."""
OURS = re.compile(FOLDER + r"/[0-9a-f-]{36}\.json")
"""A path that `store` gives; one that was told by another flow run may be anything."""


def store(content: Any) -> str:
    """Keep JSON data in the result storage; returns its path there."""
    path = f"{FOLDER}/{uuid4()}.json"
    try:
        data = json.dumps(content).encode()
    except (TypeError, ValueError) as error:
        raise InvalidCall(
            f"rows that travel to another flow run must be plain data (JSON): {error}"
        ) from error
    loop.run(_write(path, data))
    return path


def stored(path: str) -> Any:
    """What `store` has kept; raises `InvalidCall` where this side cannot see it."""
    _check(path)
    try:
        return json.loads(loop.run(_read(path)))
    except (OSError, ValueError) as error:
        raise InvalidCall(
            f"{path!r} is not in the result storage of this machine ({error}): rows travel "
            "through Prefect's default result storage, which both sides must see "
            "(PREFECT_DEFAULT_RESULT_STORAGE_BLOCK)"
        ) from error


def discard(path: str) -> None:
    """Remove what `store` has kept; emptied, where the storage can only write. To fail is worth a warning."""
    try:
        _check(path)
        storage = loop.run(_storage())
        if isinstance(storage, LocalFileSystem):
            os.remove(os.path.expanduser(os.path.join(storage.basepath or "", path)))
        else:
            loop.run(_write(path, b""))
    except Exception as error:  # noqa: BLE001 - whatever a storage raises: the step itself is done
        logger.warning("%r stays in the result storage: %s", path, error)


def _check(path: str) -> None:
    if not OURS.fullmatch(path):
        raise InvalidCall(f"{path!r:.200} is no file of rows; those are in {FOLDER}/ of the result storage")


async def _write(path: str, data: bytes) -> None:
    await _awaited((await _storage()).write_path(path, data))


async def _read(path: str) -> bytes:
    found: bytes = await _awaited((await _storage()).read_path(path))
    return found


async def _storage() -> Any:
    return await _awaited(get_default_result_storage())


async def _awaited(value: Any) -> Any:
    """What Prefect's functions give: the thing itself, or something to wait for it, as the context is."""
    return await value if isawaitable(value) else value
