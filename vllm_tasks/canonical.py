"""The fingerprint, which is one hash of all that determines an answer, and the hash of one row's input.

The fingerprint covers the model (its revision, the contents of local files, the engine arguments that change
what it computes: see `weights`), the prompt, the code and data of `prompt_func` (see `functions`), the
contents of artifacts, signature, chat, system, context, sampling, output schema, datatype, and the columns
with their arguments. It does not cover the server's address, batch size, window, retries and hardware, nor
the weights behind a server, which does not report them.
"""

from __future__ import annotations

import copyreg
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any
from uuid import UUID

DEEPEST = 100
"""The number of nested levels within which values are distinguished."""
PLAIN_TEXTS = date, time, timedelta, Decimal, UUID, Fraction, complex, PurePath
"""Types whose text determines the value."""


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of `parts` as canonical JSON, in hexadecimal; it is the same on every machine."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()


def input_hash(values: Sequence[Any]) -> str:
    """Return a 128-bit hash, in hexadecimal, of the values that one row's prompt is made of.

    Numbers are distinguished as in prompts: 1 from 1.0, and in JSON lines 12.5 from 12.50.
    """
    return hashlib.blake2b(canonical(values, _as_in_prompts).encode(), digest_size=16).hexdigest()


def _as_in_forms(number: float) -> Any:
    """An integral value as an integer, because a form in a browser turns 0.0 into 0."""
    return int(number) if number.is_integer() else number


def _as_in_prompts(number: float) -> Any:
    """A number whose text is not Python's, such as one of JSON lines, as this text."""
    return number if str(number) == float.__repr__(number) else {"float": str(number)}


def canonical(value: Any, of_float: Callable[[float], Any] = _as_in_forms) -> str:
    """Return JSON with sorted keys. A value that JSON has no type for is written with its type."""
    return json.dumps(_plain(value, 0, of_float), sort_keys=True, separators=(",", ":"))


def in_order(value: Any) -> Any:
    """Return `value` with its mappings as lists of pairs, whose order counts."""
    if isinstance(value, Mapping):
        return {"pairs": [[key, in_order(each)] for key, each in value.items()]}
    return [in_order(each) for each in value] if isinstance(value, list | tuple) else value


def _plain(value: Any, depth: int, of_float: Callable[[float], Any]) -> Any:
    """Return `value` in JSON's types: an object as its class and state, never its address."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return of_float(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return {"bytes": bytes(value).hex()}
    if depth > DEEPEST:
        return {"deeper": type(value).__qualname__}

    def plain(inner: Any) -> Any:
        return _plain(inner, depth + 1, of_float)

    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else canonical(k, of_float): plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(canonical(item, of_float) for item in value)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    if isinstance(value, type):  # its state would be all classes that it leads to
        return {"type": f"{value.__module__}.{value.__qualname__}"}
    if isinstance(value, PLAIN_TEXTS):
        return {type(value).__name__: str(value)}
    return {type(value).__qualname__: plain(_state_of(value))}


def _state_of(value: object) -> Any:
    """Return an object's attributes, or, if it has none, the state that a copy would be made from."""
    if (attributes := getattr(value, "__dict__", None)) is not None:
        return attributes
    reducer = copyreg.dispatch_table.get(type(value))
    try:
        copied = reducer(value) if reducer else value.__reduce_ex__(2)
    except Exception:  # noqa: BLE001 - its class may raise anything; the class alone then counts
        return None
    if isinstance(copied, str):
        return copied
    made, arguments, *state = copied
    if made in (copyreg.__newobj__, copyreg.__newobj_ex__):  # type: ignore[attr-defined]
        arguments = arguments[1:]  # the class: its name counts, and its own attributes have no end
    return [_listed(part) for part in (arguments, *state)]


def _listed(part: Any) -> Any:
    return list(part) if isinstance(part, Iterator) else part
