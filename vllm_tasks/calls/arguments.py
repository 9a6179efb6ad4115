"""Checks the names of a call's arguments: a misspelt one is refused with the closest known name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Set
from typing import Any

from vllm_tasks.calls.sampling import OWNED, REMOVED
from vllm_tasks.errors import InvalidCall


def check_spelling(
    given: Iterable[str], call: Callable[..., Any], known: Set[str], more: Iterable[str] = ()
) -> None:
    """Raise `InvalidCall` for a name that is neither an argument of `call` nor a sampling parameter, but is
    close to an argument. `check_names` refuses names that are close to a sampling parameter.

    `known` has the sampling parameters, and `more` arguments that are not in the signature of `call`.
    """
    own = {name for name, p in inspect.signature(call).parameters.items() if p.kind != p.VAR_KEYWORD}
    own |= set(more)
    for name in given:
        if name in own | known or name in OWNED or name in REMOVED:
            continue
        near = difflib.get_close_matches(name, own | known, n=1)
        if near and near[0] in own:
            called = call.__name__.lstrip("_")
            raise InvalidCall(f"{called} has no argument {name!r}; did you mean {near[0]!r}?")
