"""Gives a function and the task over it the same signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def signed_as(contract: Callable[P, R], *own: str) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function that passes its arguments on to `contract` the signature of `contract`.

    Type checkers, Prefect and `help()` then see the arguments by name, and these are written only once. The
    arguments in `own` are left out, because the function sets them itself.
    """

    def sign(function: Callable[..., Any]) -> Callable[P, R]:
        signature = inspect.signature(contract)
        kept = [p for name, p in signature.parameters.items() if name not in own]
        function.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return function

    return sign
