"""Checks of the arguments of a call over a table; errors name the value, the limit and the way out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from pydantic import SecretStr

from vllm_tasks.calls.call import Model
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.arguments import check_folder
from vllm_tasks.datalayer.selection import Key, Refresh
from vllm_tasks.errors import InvalidCall
from vllm_tasks.settings import site_settings
from vllm_tasks.tables.budget import Budget
from vllm_tasks.tables.commit_policy import CommitPolicy
from vllm_tasks.tables.prices import Prices

SPENDING = "max_total_tokens", "max_seconds", "max_cost"
"""Arguments that bound what a call may spend."""


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


def budget_of(
    max_failed: float | int | None,
    max_total_tokens: int | None,
    max_seconds: float | None,
    max_cost: float | None,
    prices: Mapping[str, float] | None,
) -> Budget:
    """The checked bounds of a run; raises `InvalidCall`."""
    found = Budget(
        check_max_failed(max_failed),
        at_least_one("max_total_tokens", max_total_tokens),
        _above_zero("max_seconds", max_seconds),
        _above_zero("max_cost", max_cost),
        Prices.of(prices),
    )
    if max_cost is not None and not found.prices.are_set:
        raise InvalidCall(
            f"max_cost={max_cost!r} needs a price: pass prices={{'per_hour': ...}} or set "
            "VLLM_TASKS_PRICE_PER_HOUR (or the prices of tokens)"
        )
    return found


def share_of_budget(options: Mapping[str, Any], shards: int) -> dict[str, Any]:
    """What each of the shards may spend of a call's tokens and money; the time is that of each."""
    tokens = at_least_one("max_total_tokens", options.get("max_total_tokens"))
    cost = _above_zero("max_cost", options.get("max_cost"))
    return {
        "max_total_tokens": None if tokens is None else max(tokens // shards, 1),
        "max_cost": None if cost is None else cost / shards,
    }


def is_repeatable(options: Mapping[str, Any]) -> bool:
    """Whether another attempt may follow one that failed: nobody could tell which rows the first has
    processed (`overwrite`, `limit`), or what it has spent."""
    return not options.get("overwrite") and all(options.get(name) is None for name in ("limit", *SPENDING))


def _above_zero(name: str, value: float | None) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise InvalidCall(f"{name}={value!r:.100} must be a number above 0, or None")
    return value


def true_or_false(name: str, value: object) -> bool:
    """The value; raises `InvalidCall` for others, since a text such as "no" would count as true."""
    if not isinstance(value, int) or value not in (0, 1):
        raise InvalidCall(f"{name}={value!r:.100} must be True or False")
    return bool(value)


def refresh_of(refresh: str, overwrite: bool, retry_failed: bool) -> Refresh:
    overwrite = true_or_false("overwrite", overwrite)
    retry_failed = true_or_false("retry_failed", retry_failed)
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
        return tuple((_own(each),) for each in ids)
    for each in ids:
        if not isinstance(each, tuple | list) or len(each) != len(key):
            raise InvalidCall(f"ids: {each!r} must be a tuple of {len(key)} values, for {key}")
    return tuple(tuple(map(_own, each)) for each in ids)


def _own(value: Any) -> Any:
    """A whole number of numpy as Python's, the only one that a database takes."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
