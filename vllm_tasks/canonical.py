"""What decides an answer, as one hash; and the hash of one row's input.

In the fingerprint: the model (its revision, the contents of local files, the engine arguments that change
what it computes: see `weights`), prompt, what `prompt_func` is made of (see `functions`), contents of
artifacts, signature, chat, system, context, sampling, output schema and datatype, and which columns are which
argument. Not in it: where the server is, batch size, window, retries, hardware. What a server does not tell,
its weights, cannot be in it.
"""

from __future__ import annotations

import copyreg
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any
from uuid import UUID

DEEPEST = 100
"""Levels of nested values that are told apart."""
PLAIN_TEXTS = date, time, timedelta, Decimal, UUID, Fraction, complex, PurePath
"""Types whose text says all of a value."""


def fingerprint(parts: Mapping[str, Any]) -> str:
    """SHA-256 in hexadecimal digits of `parts` as canonical JSON; the same on every machine."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def input_hash(values: Sequence[Any]) -> str:
    """128 bits in hexadecimal digits of what one row's prompt is made of."""
    return hashlib.blake2b(canonical(values).encode(), digest_size=16).hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys; what JSON has no type for is written with its type.

    A float that is a whole number is written as one: a form in a browser makes 0 of 0.0.
    """
    return json.dumps(_plain(value, 0), sort_keys=True, separators=(",", ":"))


def _plain(value: Any, depth: int) -> Any:
    """`value` as JSON's types; an object by its class and state, never by its address."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value).hex()}
    if depth > DEEPEST:
        return {"deeper": type(value).__qualname__}
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else canonical(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(canonical, value))
    if isinstance(value, Sequence):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, PLAIN_TEXTS):
        return {type(value).__name__: str(value)}
    return {type(value).__qualname__: _plain(_state_of(value), depth + 1)}


def _state_of(value: object) -> Any:
    """What an object holds: its attributes, or where it has none what it would be copied by."""
    if (attributes := getattr(value, "__dict__", None)) is not None:
        return attributes
    reducer = copyreg.dispatch_table.get(type(value))
    try:
        copied = reducer(value) if reducer else value.__reduce_ex__(2)
    except Exception:  # noqa: BLE001 - whatever its class raises: it is known by its class alone
        return None
    return copied if isinstance(copied, str) else [_listed(part) for part in copied[1:]]


def _listed(part: Any) -> Any:
    return list(part) if isinstance(part, Iterator) else part
