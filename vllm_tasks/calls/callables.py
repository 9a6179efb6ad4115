"""Callables in a model's fields: passed as objects in Python, as dotted paths in blocks and forms."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from vllm_tasks.errors import InvalidCall
from vllm_tasks.settings import site_settings

RETURN_LATER = inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction


def import_callable(value: object) -> object:
    """Return the callable at a dotted path (`package.module.name`), or any other value unchanged.

    Raises ValueError for a path that leads nowhere, and for a function that does not return its result when
    it is called: an async function or a generator.

    Danger: a path comes from anyone who may edit a block or a form, and could lead to any code. So the path
    and the module that defines the callable must both be under one of the setting's prefixes.
    """
    found = _at_path(value) if isinstance(value, str) else value
    for called in (found, getattr(found, "__call__", None)):  # noqa: B004 - an object's own method counts too
        if any(returns_later(called) for returns_later in RETURN_LATER):
            raise ValueError(
                f"{dotted_path(called)!r} is an async function or a generator, which is not awaited or run "
                "through here: write a plain function that returns the result"
            )
    return found


def _at_path(value: str) -> object:
    if not _is_allowed(value):
        raise ValueError(f"{value!r} is {_outside()}")
    found = _found(value)
    if not callable(found):
        raise ValueError(f"{value!r} is not callable but a {type(found).__name__}")
    defined = str(getattr(found, "__module__", None))
    if not _is_allowed(defined):
        raise ValueError(f"{value!r} leads into {defined!r}, which is {_outside()}")
    return found


def _found(path: str) -> object:
    try:
        try:
            return pkgutil.resolve_name(path)
        except AttributeError:
            importlib.import_module(path.rpartition(".")[0])  # if this fails, its error has the reason
            raise
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {path!r}: {error}; expected package.module.name") from error


def dotted_path(function: object) -> str:
    """Return the path by which `function` would be imported; it may not lead back to it."""
    module = getattr(function, "__module__", None)
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def check_importable(function: Callable[..., Any]) -> None:
    """Raise `InvalidCall` unless the path of `function` leads back to it in another process."""
    path = dotted_path(function)
    way_out = "define it at the top level of a module that can be imported where the block is loaded"
    if function.__module__ == "__main__":
        raise InvalidCall(f"{path!r} is defined in a script and cannot be saved; {way_out}")
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not function:
        raise InvalidCall(f"{path!r} cannot be imported again, so it cannot be saved; {way_out}")
    if not _is_allowed(path):
        raise InvalidCall(f"{path!r} could not be loaded again, because it is {_outside()}")


def _is_allowed(module: str) -> bool:
    return any(module == p or module.startswith(p + ".") for p in site_settings().callable_prefixes)


def _outside() -> str:
    return (
        f"outside the modules that saved callables may come from, {site_settings().callable_prefixes}; "
        "add its package to VLLM_TASKS_CALLABLE_PREFIXES (a JSON list), or pass the callable itself in Python"
    )


DottedCallable = Annotated[
    Callable[..., Any],
    BeforeValidator(import_callable),
    PlainSerializer(dotted_path, return_type=str),
    WithJsonSchema({"type": "string", "description": "Dotted path: package.module.name"}),
]
"""A callable, or the dotted path of one. It is saved as its path."""
