"""One signature for a function and the task over it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def signed_as(contract: Callable[P, R]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function that passes its arguments on to `contract` the signature of `contract`.

    Type checkers, Prefect and `help()` then see the arguments by name, which are written down once.
    """

    def sign(function: Callable[..., Any]) -> Callable[P, R]:
        function.__signature__ = inspect.signature(contract)  # type: ignore[attr-defined]
        return function

    return sign
