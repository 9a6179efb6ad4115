"""The kinds of work in a flow that is killed: the model's task, its source, and how a server answers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.servers.scripted_server import Asked, Reply, usual

IN_FLOW: Mapping[str, Any] = {"work": "in_flow"}


@dataclass(frozen=True)
class Work:
    """One kind of work; `call` has the arguments of `Jobs.start` beside the columns and the table."""

    name: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the model."""
    table: tuple[Any, str] = ("text", "rows")
    """The columns and the table."""
    call: Mapping[str, Any] = field(default_factory=lambda: IN_FLOW)
    deed: Callable[[Asked], Reply | None] = lambda _: None
    """How the server answers a row."""
    needs: Callable[[int], int] = lambda _: 1
    """See `Ledger.needs`."""


def corrected(asked: Asked) -> Reply:
    """The key as a number, in every second row only after the first answer was sent back."""
    key, *_ = asked.prompt[1:].split("none")
    answer = "none" if not int(key) % 2 and "Answer again" not in asked.prompt else key
    return _saying(asked, answer, {})


def with_tokens(asked: Asked) -> Reply:
    """The usual answer, with its tokens and their log probabilities."""
    tokens = list(asked.prompt)
    given = {"tokens": tokens, "token_logprobs": [-ord(token) / 128 for token in tokens]}
    return _saying(asked, asked.prompt, {"logprobs": given, "token_ids": [ord(token) for token in tokens]})


def briefly(asked: Asked) -> Reply:
    """The beginning of the prompt, however long it is."""
    return _saying(asked, asked.prompt[:10], {})


def _saying(asked: Asked, text: str, more: Mapping[str, Any]) -> Reply:
    reply = usual(asked)
    reply.body["choices"] = [{**choice, "text": text, **more} for choice in reply.body["choices"]]
    return reply


GENERATE = Work()
KINDS_OF_WORK = (
    Work("embed", {"task": "embed"}),
    Work(
        "score",
        {"task": "score", "signature": "**kwargs", "chat": None},
        ({"text": "document", "q": "query"}, "SELECT id, text, 'why' AS q FROM rows"),
    ),
    Work("classify", {"task": "classify"}),
    Work(
        "repaired",
        {"datatype": "int", "repair": 1},
        deed=corrected,
        needs=lambda key: 1 if key % 2 else 2,
    ),
    Work(
        "with columns kept",
        {"keep": ["prompt", "usage", "logprobs", "mean_logprob", "token_ids"]},
        deed=with_tokens,
    ),
)
