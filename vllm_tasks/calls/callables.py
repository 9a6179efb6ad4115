"""Callables in a model's fields: passed as objects in Python, as dotted paths in blocks and forms."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

from vllm_tasks.errors import InvalidCall
from vllm_tasks.settings import site_settings


def import_callable(value: object) -> object:
    """Return the callable at a dotted path (`package.module.name`), or any other value unchanged.

    Danger: a path comes from anyone who may edit a block or a form, and could lead to any code. So the path
    and the module that defines the callable must both be under one of the setting's prefixes.
    """
    if not isinstance(value, str):
        return value
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


def dotted_path(function: Callable[..., Any]) -> str:
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


def _refuse_async(function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a function whose call returns no value, but something to be awaited or iterated."""
    called = () if isinstance(function, type) else (function, getattr(function, "__call__", None))  # noqa: B004
    kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(is_kind(each) for is_kind in kinds for each in called):
        raise ValueError(
            f"{dotted_path(function)!r} is async or a generator, and is called like a plain function: write "
            "it with def and return"
        )
    return function


DottedCallable = Annotated[
    Callable[..., Any],
    BeforeValidator(import_callable),
    AfterValidator(_refuse_async),
    PlainSerializer(dotted_path, return_type=str),
    WithJsonSchema({"type": "string", "description": "Dotted path: package.module.name"}),
]
"""A callable, or the dotted path of one. It is saved as its path."""
