"""Callables in a model's fields: given as such in process, as dotted paths in blocks and forms."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from vllm_tasks.settings import Settings


def import_callable(value: object) -> object:
    """The callable at a dotted path (`package.module.name`); anything else passes through.

    Paths arrive from blocks and forms, that is from whoever may edit those: both the path and the
    module that defines what it leads to must lie under one of the setting's prefixes.
    """
    if not isinstance(value, str):
        return value
    _refuse_outside(value, value)
    try:
        found = pkgutil.resolve_name(value)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {value!r}: {error}; expected package.module.name") from error
    if not callable(found):
        raise ValueError(f"{value!r} is not callable but a {type(found).__name__}")
    _refuse_outside(str(getattr(found, "__module__", "")), value)
    return found


def dotted_path(function: Callable[..., Any]) -> str:
    """The path by which `function` would be imported; it need not lead back there."""
    return f"{function.__module__}.{function.__qualname__}"


def check_importable(function: Callable[..., Any]) -> None:
    """Raise ValueError unless a saved path leads back to `function` in another process."""
    path = dotted_path(function)
    way_out = "define it at the top level of a module that can be imported where the block is loaded"
    if function.__module__ == "__main__":
        raise ValueError(f"{path!r} lives in a script and cannot be saved; {way_out}")
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not function:
        raise ValueError(f"{path!r} cannot be imported again and so cannot be saved; {way_out}")
    _refuse_outside(path, path)


def _refuse_outside(module: str, path: str) -> None:
    prefixes = Settings().callable_prefixes
    if not any(module == p or module.startswith(p + ".") for p in prefixes):
        raise ValueError(
            f"{path!r} is outside the modules that callables may come from, {prefixes}; "
            "name its package in VLLM_TASKS_CALLABLE_PREFIXES (a JSON list), "
            "or pass the callable itself in Python"
        )


DottedCallable = Annotated[
    Callable[..., Any],
    BeforeValidator(import_callable),
    PlainSerializer(dotted_path, return_type=str),
    WithJsonSchema({"type": "string", "description": "Dotted path: package.module.name"}),
]
"""A callable, or the dotted path of one; saved as its path."""
