"""Columns of an outputs table beside the answer: its reasoning, its log probabilities, its prompt, ..."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vllm_tasks.calls.media import without_media
from vllm_tasks.calls.sampling import Target
from vllm_tasks.datalayer.selection import OutputColumn
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Attempted, BuiltinType, Choice, Completion, Request, Result, TokenLogprob

Keep = Literal["reasoning", "tool_calls", "logprobs", "mean_logprob", "token_ids", "prompt", "usage"]
"""What a table may keep beside an answer. The column has this name after an underscore, which neither a key's
nor a schema's column has."""


def mean_logprob(choice: Choice) -> float | None:
    """Return the mean log probability (natural log) of a choice's tokens; None if they have none."""
    known = [token.logprob for token in choice.logprobs or () if math.isfinite(token.logprob)]
    return math.fsum(known) / len(known) if known else None


def _listed_logprobs(choice: Choice) -> list[Any] | None:
    return None if choice.logprobs is None else [_as_json(token) for token in choice.logprobs]


def _as_json(token: TokenLogprob) -> dict[str, Any]:
    top = [{"token": text, "logprob": _finite(logprob)} for text, logprob in token.top]
    return {"token": token.token, "logprob": _finite(token.logprob), **({"top": top} if top else {})}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no other


OF_CHOICE: Mapping[str, tuple[BuiltinType, Callable[[Choice], Any]]] = {
    "reasoning": ("str", lambda choice: choice.reasoning),
    "tool_calls": ("json", lambda choice: choice.tool_calls),
    "logprobs": ("json", _listed_logprobs),
    "mean_logprob": ("float", mean_logprob),
    "token_ids": ("json", lambda choice: choice.token_ids),
}
"""The type of each column that every choice has a value for, and how it is read."""
OF_ROW: Mapping[str, BuiltinType] = {"prompt": "str", "usage": "json"}
"""The types of the columns that a row has one value for, whatever `n` is."""
ATTEMPTS = OutputColumn("_attempts", "int")
"""The column of the number of attempts, where there may be several."""


@dataclass(frozen=True)
class Kept:
    """The columns that a call keeps beside its answers."""

    names: tuple[Keep, ...] = ()
    many: bool = False
    """Whether an answer has several choices (`n > 1`)."""
    flatten: bool = False
    """Whether each of several choices has a row of its own. Otherwise a column has a JSON list of them."""
    attempts: bool = False
    """Whether the number of attempts is kept."""

    @property
    def columns(self) -> tuple[OutputColumn, ...]:
        """The columns of the outputs table, after those of the answer."""
        listed = self.many and not self.flatten
        named = [
            OutputColumn(f"_{name}", OF_ROW.get(name) or ("json" if listed else OF_CHOICE[name][0]))
            for name in self.names
        ]
        return (*named, ATTEMPTS) if self.attempts else tuple(named)

    @property
    def needs_request(self) -> bool:
        """Whether `rows` reads the request."""
        return "prompt" in self.names

    def is_output(self, choice: Choice) -> bool:
        """Whether a choice without a text is an output because its reasoning or its tool calls are kept."""
        return bool(
            (choice.reasoning and "reasoning" in self.names)
            or (choice.tool_calls and "tool_calls" in self.names)
        )

    def rows(self, request: Request | None, completion: Completion) -> list[dict[str, Any]]:
        """Return the values by column: one mapping for all rows of an answer, or one for each choice.

        `request` is that of the row; it may be None unless `needs_request`.
        """
        if not self.names:
            return [{}]
        of_row = {"prompt": _text_of(request), "usage": completion.usage}
        shared = {f"_{name}": of_row[name] for name in self.names if name in of_row}
        read = {f"_{name}": OF_CHOICE[name][1] for name in self.names if name in OF_CHOICE}
        if self.many and not self.flatten:
            return [shared | {name: [of(c) for c in completion.choices] for name, of in read.items()}]
        return [shared | {name: of(choice) for name, of in read.items()} for choice in completion.choices]

    def attempts_of(self, answer: Result) -> dict[str, int]:
        """Return the value of the column of attempts, which failed rows have, too."""
        if not self.attempts:
            return {}
        return {ATTEMPTS.name: answer.attempts if isinstance(answer, Attempted) else 1}

    def requested(self, sampling: Mapping[str, Any], target: Target) -> dict[str, Any]:
        """Return the sampling parameters, with those that make vLLM send what is kept.

        Raises `InvalidCall` if the protocol carries texts alone.
        """
        if target == "legacy" and (lost := [name for name in self.names if name != "prompt"]):
            raise InvalidCall(
                f"keep={lost} is not in the answers of /generate, which are texts: use the server's base URL"
            )
        sampling = dict(sampling)
        if {"logprobs", "mean_logprob"} & {*self.names} and sampling.get("logprobs") in (None, False):
            # 0: the tokens of the answer and no others, for texts and for chat.
            sampling["logprobs"] = True if "top_logprobs" in sampling else 0
        if "token_ids" in self.names and target != "local":  # which always sends them
            sampling["return_token_ids"] = True
        return sampling


NOTHING_KEPT = Kept()


def _text_of(request: Request | None) -> str | None:
    if request is None:
        return None
    prompt = request.prompt
    return prompt if isinstance(prompt, str) else json.dumps(without_media(prompt), ensure_ascii=False)


def check_names(names: Sequence[Keep]) -> None:
    """Raise ValueError for a column that is named twice."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"keep={list(names)} names {twice} twice")
