"""Arguments of a prompt function or template: those of the record by `signature`, and keywords beside it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeGuard

from vllm_tasks.calls.template import BadRow
from vllm_tasks.errors import InvalidCall

CACHED = functools._lru_cache_wrapper
"""The type of functions with `lru_cache` or `cache`, which have no signature but that of what they wrap."""
Signature = Literal["singleton", "*args", "**kwargs", "*args,**kwargs"]


def call_arguments(signature: Signature, x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a record as `(args, kwargs)` of a call. Raise `BadRow` if it has another shape."""
    if signature == "singleton":
        return (x,), {}
    if signature == "*args" and is_tuple(x):
        return tuple(x), {}
    if signature == "**kwargs" and isinstance(x, Mapping):
        return (), dict(x)
    if signature == "*args,**kwargs" and is_tuple(x) and len(x) == 2:
        args, kwargs = x
        if is_tuple(args) and isinstance(kwargs, Mapping):
            return tuple(args), dict(kwargs)
    expected = {"*args": "a tuple", "**kwargs": "a dict"}.get(signature, "a pair of a tuple and a dict")
    raise BadRow(f"signature={signature!r} takes {expected} for each record, got {described(x)}")


def is_tuple(x: object) -> TypeGuard[Sequence[Any]]:
    """Return whether `x` is a sequence of values, and not a text or bytes."""
    return isinstance(x, Sequence) and not isinstance(x, str | bytes | bytearray | memoryview)


def described(value: object) -> str:
    """Return the kind of a value for an error, without the value."""
    return "None" if value is None else f"a {type(value).__name__}"


def refusal(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], twice: Collection[str]
) -> str | None:
    """Return why `function` does not take these arguments; None if it does, or has no signature."""
    if twice:
        return f"{sorted(twice)} would be given twice, by X and by the call"
    try:
        # Of the function itself: a decorator may take other arguments than the function in `__wrapped__`.
        signature = inspect.signature(function, follow_wrapped=isinstance(function, CACHED))
    except ValueError:  # some built-ins, such as str, have no signature
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def named_parameters(function: Callable[..., Any] | None) -> set[str]:
    """Return the parameters of `function` that can be passed by keyword; `**kwargs` and None have none."""
    if function is None:
        return set()
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some built-ins, such as str, have no signature
        return set()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def beside_the_record(function: Callable[..., Any] | None, signature: Signature) -> set[str]:
    """Return the parameters of `function` that can be passed by keyword, without the first one if this is the
    record."""
    names = named_parameters(function)
    if function is not None and names and signature == "singleton":
        names.discard(next(iter(inspect.signature(function).parameters)))
    return names


def keywords_of(
    function: Callable[..., Any] | None,
    signature: Signature,
    given: Mapping[str, Any],
    known: Collection[str],
) -> dict[str, Any]:
    """Return the keywords of a call that `function` names, except its record and the model's artifacts.

    Raises `InvalidCall` for a name that is also a sampling parameter (`known`).
    """
    names = beside_the_record(function, signature) - {"artifacts"}
    found = {name: value for name, value in given.items() if name in names}
    if both := sorted(found.keys() & set(known)):
        raise InvalidCall(
            f"{both[0]!r} is an argument of prompt_func and a sampling parameter of vLLM: give the argument "
            "of prompt_func another name"
        )
    return found
