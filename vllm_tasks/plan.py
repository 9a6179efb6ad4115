"""How a model is asked over rows of a table: worked out and checked before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vllm_tasks import loop, sharing
from vllm_tasks.engines.http import HttpConfig
from vllm_tasks.errors import InvalidCall
from vllm_tasks.fingerprint import engine_identity, fingerprint, sampling_identity
from vllm_tasks.prompts import Context, Signature
from vllm_tasks.rows import Completion, Request, RowError

if TYPE_CHECKING:
    from vllm_tasks.datalayer.selection import OutputColumn
    from vllm_tasks.predictor import Predictor

Columns = str | Sequence[str] | Mapping[str, str | int]
"""A column, several, or columns by the argument that they are, a name or a position."""
Values = Sequence[Any]
"""Of one row, in the order of the columns."""


class RowDecoder(Protocol):
    """What becomes of an answer in a table."""

    @property
    def columns(self) -> tuple[OutputColumn, ...]:
        """What the model said, beside the columns that every outputs table has."""

    @property
    def flatten(self) -> bool:
        """Whether an answer becomes any number of rows."""

    def rows(self, completion: Completion) -> list[tuple[Any, ...]] | RowError:
        """The answer as rows, each with a value for each of `columns`."""


@dataclass(frozen=True)
class Plan:
    """From the values of rows to requests, and from answers to the columns of outputs."""

    model: Predictor
    config: sharing.Config
    columns: tuple[str, ...]
    requests: Callable[[Sequence[Values]], list[Request | RowError]]
    decoder: RowDecoder
    sampling: Mapping[str, Any]
    model_name: str
    fingerprint: str

    @classmethod
    def of(
        cls,
        model: Predictor,
        X: Columns,  # noqa: N803 - the name in predict_in_db
        context: Context = None,
        given: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Whatever is wrong with the model or its parameters is said here (`InvalidCall`).

        A server is asked for the name of its model when `model` has none.
        """
        given = given or {}
        columns, record = records(X, model.signature)
        config = model._config()
        decoder = model._decoder(given)
        sampling = model._sampling(given)
        prompter = model._prompter(context)
        model._check_call([], sampling)
        prompter.check_fields(record(columns))
        model_name, model_identity = identity_of(config)
        identity = {
            "model": model._behind or model_identity,
            "sampling": sampling_identity(sampling),
            "context": prompter.context,
            "outputs": decoder.identity(),
            "columns": [columns, X if isinstance(X, Mapping) else None],
            **model._identity(),
        }
        return cls(
            model=model,
            config=config,
            columns=columns,
            requests=lambda rows: model._requests(prompter, [record(r) for r in rows], sampling),
            decoder=decoder,
            sampling=sampling,
            model_name=model_name,
            fingerprint=fingerprint(identity),
        )


def records(X: Columns, signature: Signature) -> tuple[tuple[str, ...], Callable[[Sequence[Any]], Any]]:  # noqa: N803
    """The columns that `X` names, and how their values become the record that `signature` takes."""
    if isinstance(X, Mapping):
        columns, arguments = named_columns("X", tuple(X)), tuple(X.values())
    else:
        columns = named_columns("X", X)
        arguments = tuple(range(len(columns))) if signature != "**kwargs" else columns
    by_position = [i for i, a in enumerate(arguments) if isinstance(a, int)]
    by_position.sort(key=lambda i: arguments[i])
    by_name = {str(a): i for i, a in enumerate(arguments) if not isinstance(a, int)}
    if [arguments[i] for i in by_position] != list(range(len(by_position))):
        raise InvalidCall(f"X={X!r}: positions must be 0, 1, ... without a gap")
    if signature == "singleton":
        if len(columns) != 1:
            raise InvalidCall(
                f"X={X!r} names {len(columns)} columns, but with signature='singleton' a record is one "
                "value; use signature='**kwargs' (fields by name) or '*args' (fields by position)"
            )
        return columns, lambda values: values[0]
    if signature == "*args":
        if by_name:
            raise InvalidCall(f"X={X!r}: signature='*args' takes positions, not the names {sorted(by_name)}")
        return columns, lambda values: tuple(values[i] for i in by_position)
    if signature == "**kwargs":
        if by_position:
            raise InvalidCall(f"X={X!r}: signature='**kwargs' takes names of arguments, not positions")
        return columns, lambda values: {name: values[i] for name, i in by_name.items()}
    return columns, lambda values: (
        tuple(values[i] for i in by_position),
        {name: values[i] for name, i in by_name.items()},
    )


def named_columns(name: str, given: Any) -> tuple[str, ...]:
    columns = (given,) if not isinstance(given, Iterable) or isinstance(given, str) else tuple(given)
    if not columns or not all(isinstance(c, str) and c for c in columns):
        raise InvalidCall(f"{name}={given!r} must name one column or more")
    if len(set(columns)) < len(columns):
        raise InvalidCall(f"{name}={columns!r} names a column twice")
    return columns


def identity_of(config: sharing.Config) -> tuple[str, Any]:
    """The model's name, and the model as the fingerprint knows it.

    A server is asked for the name when the call has none.
    """
    if not isinstance(config, HttpConfig):
        arguments = json.loads(config.engine_args)
        return arguments["model"], engine_identity(arguments)
    name = config.model
    if name is None and config.protocol != "legacy":  # which tells no name
        name = loop.run(sharing.facts(config))["model"]
    return name or "", name
