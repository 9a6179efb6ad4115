"""Checks of the arguments of a call over a table; errors name the value, the limit and the way out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import SecretStr

from vllm_tasks.calls.call import Model
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.arguments import check_folder
from vllm_tasks.datalayer.selection import Key, Refresh
from vllm_tasks.errors import InvalidCall
from vllm_tasks.settings import site_settings
from vllm_tasks.tables.commit_policy import CommitPolicy


def datalayer_of(db: Datalayer | str | None, model: Model) -> Datalayer:
    """Where a call reads and writes: `db`, else the model's own; raises `InvalidCall` if there is neither."""
    if isinstance(db, os.PathLike):
        db = os.fspath(db)
    if db is not None and not isinstance(db, str | Datalayer):
        raise InvalidCall(
            f"db=<{type(db).__name__}> is neither a Datalayer nor its URL: give a folder, 'data/', an fsspec "
            "URL or a SQLAlchemy URL, 'sqlite:///file.db'"
        )
    found = Datalayer(url=SecretStr(db)) if isinstance(db, str) else db or model.db
    if found is not None:
        check_folder(found.url.get_secret_value().strip())
        return found
    raise InvalidCall(
        f"{model.identifier!r} has no db: pass db='folder' or db=Datalayer(url=...), or give the model one"
    )


def columns_of(columns: str | Sequence[str]) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else tuple(columns)


def commit_policy_of(max_chunk_size: int | None) -> CommitPolicy:
    """When commit groups close: by the caller's size, else by the site's settings."""
    settings = site_settings()
    rows = at_least_one("max_chunk_size", max_chunk_size)
    return CommitPolicy.of(rows, settings.commit_rows, settings.commit_seconds)


def at_least_one(name: str, value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidCall(f"{name}={value!r} must be a whole number of at least 1, or None")
    return value


def shard_of(given: Any) -> tuple[int, int] | None:
    if given is None:
        return None
    try:
        index, count = given
    except (TypeError, ValueError):
        index, count = None, None
    if type(index) is not int or type(count) is not int or not 0 <= index < count:
        raise InvalidCall(f"shard={given!r:.100} must be (i, n): the i-th, from 0, of n parts")
    return index, count


def check_max_failed(value: float | int | None) -> float | int | None:
    """Raise `InvalidCall` if the value is not a fraction, not a number of rows and not None."""
    proper = value is None or (
        not isinstance(value, bool)
        and isinstance(value, int | float)
        and (value >= 0 if isinstance(value, int) else 0.0 <= value <= 1.0)
    )
    if not proper:
        raise InvalidCall(
            f"max_failed={value!r} must be a fraction from 0.0 to 1.0, a number of rows, or None for no limit"
        )
    return value


def refresh_of(refresh: str, overwrite: bool, retry_failed: bool) -> Refresh:
    if refresh not in ("missing", "changed"):
        raise InvalidCall(f"refresh={refresh!r} is neither 'missing' nor 'changed'")
    if overwrite and retry_failed:
        raise InvalidCall(
            "overwrite=True processes all rows and retry_failed=True only failed ones: choose one"
        )
    if retry_failed and refresh == "changed":
        raise InvalidCall(
            "retry_failed=True processes only failed rows: use refresh='changed' in a separate call"
        )
    return "all" if overwrite else "failed" if retry_failed else refresh  # type: ignore[return-value]  # checked above


def keys_of(ids: Sequence[Any], key: tuple[str, ...]) -> tuple[Key, ...]:
    if isinstance(ids, str | bytes | Mapping) or not isinstance(ids, Iterable):
        raise InvalidCall(f"ids must be a list of keys, got a {type(ids).__name__}")
    ids = list(ids)
    if any(isinstance(each, list | dict | set) for each in ids) and len(key) == 1:
        raise InvalidCall(f"ids must be values of {key[0]!r}, not lists, dicts or sets")
    if len(key) == 1:
        return tuple((each,) for each in ids)
    for each in ids:
        if not isinstance(each, tuple | list) or len(each) != len(key):
            raise InvalidCall(f"ids: {each!r} must be a tuple of {len(key)} values, for {key}")
    return tuple(tuple(each) for each in ids)
