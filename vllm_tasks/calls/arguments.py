"""The names of a call's arguments: what is misspelt is refused with the name that was meant."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from vllm_tasks.calls.sampling import GONE, OWNED, Target, known_names
from vllm_tasks.errors import InvalidCall


def check_spelling(
    given: Iterable[str], call: Callable[..., Any], target: Target, more: Iterable[str] = ()
) -> None:
    """Raise `InvalidCall` for a name that is neither an argument of `call` nor a sampling parameter, but near
    to an argument. What is near to a sampling parameter is `check_names`' matter.

    `more`: arguments that the call has elsewhere.
    """
    own = {name for name, p in inspect.signature(call).parameters.items() if p.kind != p.VAR_KEYWORD}
    own |= set(more)
    known = known_names(target)
    for name in given:
        if name in own | known or name in OWNED or name in GONE:
            continue
        near = difflib.get_close_matches(name, own | known, n=1)
        if near and near[0] in own:
            called = call.__name__.lstrip("_")
            raise InvalidCall(f"{called} has no argument {name!r}; did you mean {near[0]!r}?")
