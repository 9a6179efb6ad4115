"""Reads rankings from answers and relevant ids from targets, for metrics of retrieval."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from vllm_tasks.calls.plain_text import NoText, plain_text
from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.data import data_of

LENGTH = 10
"""How many ids of a ranking count, unless `k` says otherwise."""


def ranking_of(prediction: Any) -> list[str]:
    """Return the ids of a ranking as texts, each once; none for an answer that is not a list."""
    found = data_of(prediction)
    return list(dict.fromkeys(map(id_of, found))) if isinstance(found, list) else []


def gains_of(target: Any, k: int, metric: str) -> dict[str, float]:
    """Return the gains above 0 of the relevant ids.

    Raises `InvalidCall` for a target without any, and for a k that is not at least 1.
    """
    if type(k) is not int or k < 1:
        raise InvalidCall(f"{metric}: k={k!r:.100} must be a whole number of at least 1")
    found = data_of(target)
    given = (
        found
        if isinstance(found, Mapping)
        else dict.fromkeys(map(id_of, found), 1.0)
        if isinstance(found, list)
        else {}
    )
    gains = {
        id_of(name): float(gain)
        for name, gain in given.items()
        if isinstance(gain, int | float | Decimal) and gain > 0
    }
    if not gains:
        raise InvalidCall(
            f"{metric} takes a list of relevant ids as target, or an object from ids to gains, not "
            f"{target!r:.100}"
        )
    return gains


def id_of(value: Any) -> str:
    """Return an id as a text, so that 7 is "7"; a value that is not an id is the id of nothing."""
    try:
        return plain_text(value)
    except NoText:
        return ""
