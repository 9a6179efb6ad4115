"""Rows and answers in transit: files in Prefect's default result storage, which both sides must share."""

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
"""The folder of our files in the result storage."""
OURS = re.compile(FOLDER + r"/[0-9a-f-]{36}\.json")
"""The paths that `store` returns. A path from another flow run may be anything, so it is checked."""


def store(content: Any) -> str:
    """Write JSON data into the result storage.

    Args:
        content: The data.

    Returns:
        Its path in the storage.

    Raises:
        InvalidCall: The data is not JSON.
    """
    path = f"{FOLDER}/{uuid4()}.json"
    try:
        data = json.dumps(content).encode()
    except (TypeError, ValueError) as error:
        raise InvalidCall(
            f"rows that are sent to another flow run must be plain data (JSON): {error}"
        ) from error
    loop.run(_write(path, data))
    return path


def load(path: str) -> Any:
    """Read the data that `store` has written.

    Args:
        path: The path that `store` returned.

    Returns:
        The data.

    Raises:
        InvalidCall: The file is not in the result storage of this process, or `path` is not one of our files.
    """
    _check(path)
    try:
        return json.loads(loop.run(_read(path)))
    except (OSError, ValueError) as error:
        raise InvalidCall(
            f"{path!r} is not in the result storage of this machine ({error}): rows are sent "
            "through Prefect's default result storage, which both sides must share "
            "(PREFECT_DEFAULT_RESULT_STORAGE_BLOCK)"
        ) from error


def discard(path: str) -> None:
    """Remove a file that `store` has written, or empty it if the storage can only write; a failure is logged.

    Args:
        path: The path that `store` returned.
    """
    try:
        _check(path)
        storage = loop.run(_storage())
        if isinstance(storage, LocalFileSystem):
            os.remove(os.path.expanduser(os.path.join(storage.basepath or "", path)))
        else:
            loop.run(_write(path, b""))
    except Exception as error:  # noqa: BLE001 - a storage may raise anything, and the step itself is done
        logger.warning("%r could not be removed from the result storage: %s", path, error)


def _check(path: str) -> None:
    if not OURS.fullmatch(path):
        raise InvalidCall(
            f"{path!r:.200} is not a file of rows; those are in {FOLDER}/ of the result storage"
        )


async def _write(path: str, data: bytes) -> None:
    await _awaited((await _storage()).write_path(path, data))


async def _read(path: str) -> bytes:
    found: bytes = await _awaited((await _storage()).read_path(path))
    return found


async def _storage() -> Any:
    return await _awaited(get_default_result_storage())


async def _awaited(value: Any) -> Any:
    """Wait for `value` if need be: in a running loop, Prefect's functions return a coroutine."""
    return await value if isawaitable(value) else value
