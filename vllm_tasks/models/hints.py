"""The hints that `compute_kwargs` may have, each with the check of its value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from vllm_tasks.errors import InvalidCall, near

BINARY = {"Ti": 2**40, "Gi": 2**30, "Mi": 2**20, "Ki": 2**10}
DECIMAL = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS = {"": 1, **BINARY, **DECIMAL}
AMOUNT = re.compile(r"(\d+(?:\.\d+)?) ?([a-zA-Z]*)")

TOLERATION = ("key", "operator", "value", "effect", "tolerationSeconds")


def checked(hints: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hints with sizes in bytes; raise `InvalidCall` for an unknown name or a wrong value."""
    for name in hints:
        if name not in HINTS:
            raise InvalidCall(
                f"unknown compute_kwargs {name!r}{near(name, HINTS)}; known are {', '.join(HINTS)}"
            )
    return {name: HINTS[name](name, value) for name, value in hints.items()}


def quantity(size: int) -> str:
    """Return `size`, in bytes, as Kubernetes writes it: '32Gi', or plain bytes if no unit divides it."""
    unit = next((unit for unit, factor in BINARY.items() if size % factor == 0), None)
    return f"{size // BINARY[unit]}{unit}" if unit else str(size)


def _gpu_count(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise InvalidCall(
            f"compute_kwargs has {name}={value!r}, which is not a whole number of at least 0; give the GPUs "
            "of one engine"
        )
    return value


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise InvalidCall(f"compute_kwargs has {name}={value!r}, which is not a number above 0")
    number: float = value
    return number


def _size(name: str, value: Any) -> int:
    match = AMOUNT.fullmatch(value) if isinstance(value, str) else None
    unit = UNITS.get(match[2].removesuffix("B")) if match else None
    size = value if type(value) is int else round(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise InvalidCall(
            f"compute_kwargs has {name}={value!r}, which is not a size: give bytes, or a text such as '32Gi' "
            f"(units {', '.join(UNITS)[2:]})"
        )
    return size


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidCall(f"compute_kwargs has {name}={value!r}, which is not a text, or is blank")
    return value


def _deployment(name: str, value: Any) -> str:
    if not re.fullmatch("[^/]+/[^/]+", _text(name, value)):
        raise InvalidCall(f"compute_kwargs has {name}={value!r}, which is not of the form 'FLOW/DEPLOYMENT'")
    return str(value)


def _amounts(name: str, value: Any) -> dict[str, float]:
    return {key: _number(f"{name}[{key!r}]", amount) for key, amount in _mapping(name, value).items()}


def _texts(name: str, value: Any) -> dict[str, str]:
    for key, text in _mapping(name, value).items():
        if not isinstance(text, str):  # the message omits the value: in `env` it may be a secret
            raise InvalidCall(f"compute_kwargs has a {type(text).__name__} as {name}[{key!r}]; give a text")
    return dict(value)


def _env(name: str, value: Any) -> dict[str, str]:
    """Environment variables of the job; a model must not set those by which a site protects itself."""
    for key in _mapping(name, value):
        if key.upper() in GUARDS or key.upper().startswith(OF_PROFILES):
            raise InvalidCall(
                f"compute_kwargs has {key!r} in {name}, which only the site may set: in the variables of the "
                "work pool, or where the worker runs"
            )
    return _texts(name, value)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InvalidCall(
            f"compute_kwargs has a {type(value).__name__} as {name}; give a dict whose keys are texts"
        )
    return value


def _tolerations(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list | tuple):
        raise InvalidCall(
            f"compute_kwargs has {name}={value!r}, which is not a list of Kubernetes tolerations"
        )
    for toleration in value:
        for key in _mapping(f"one of {name}", toleration):
            if key not in TOLERATION:
                raise InvalidCall(
                    f"compute_kwargs has {key!r} in {name}{near(key, TOLERATION)}; a toleration has "
                    f"{', '.join(TOLERATION)}"
                )
    return tuple(dict(toleration) for toleration in value)


GUARDS = {
    f"VLLM_TASKS_{name}"
    for name in (
        *("API_KEY", "API_URL", "CALLABLE_PREFIXES", "ENGINE_PYTHON", "ENGINE_PYTHONS", "PLACES"),
        *("REPORT_SAMPLES", "TRUST_REMOTE_CODE"),
    )
}
"""Settings that decide where the site's key is sent, which code runs, and what may be read or shown."""
OF_PROFILES = ("PREFECT_HOME", "PREFECT_PROFILE", "PREFECT_TEST", "PREFECT_UNIT_TEST")
"""Beginnings of Prefect's variables that choose or ignore the profile, in which those settings may stand."""

HINTS: dict[str, Callable[[str, Any], Any]] = {
    "num_gpus": _gpu_count,
    "num_cpus": _number,
    "memory": _size,
    "accelerator_type": _text,
    "resources": _amounts,
    "shm_size": _size,
    "image": _text,
    "env": _env,
    "node_selector": _texts,
    "tolerations": _tolerations,
    "work_pool": _text,
    "work_queue": _text,
    "deployment": _deployment,
}
