"""One call, worked out: what a model and the arguments of a call amount to.

A model makes it (`prepare`). What is below the models (tables, validations, work pools) knows calls, and not
the models.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from vllm_tasks.calls.answers import Decoder
from vllm_tasks.calls.chat import of_model
from vllm_tasks.calls.functions import WAY_OUT
from vllm_tasks.calls.prompts import Context, Prompter, Signature, conversation
from vllm_tasks.calls.sampling import Target, check_prompts
from vllm_tasks.calls.weights import engine_identity, sampling_identity
from vllm_tasks.canonical import fingerprint
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.engines import loop, sharing
from vllm_tasks.engines.http.engine import HttpConfig
from vllm_tasks.engines.stopping import raise_if_stopped
from vllm_tasks.errors import InvalidCall, RowErrors, VllmTasksError
from vllm_tasks.rows import Completion, Message, Request, Result, RowError

if TYPE_CHECKING:
    from vllm_tasks.datalayer.selection import OutputColumn

logger = logging.getLogger(__name__)

Columns = str | Sequence[str] | Mapping[str, str | int]
"""A column, several, or columns by the argument that they are, a name or a position."""
Values = Sequence[Any]
"""Of one row, in the order of the columns."""
OnError = Literal["raise", "return"]
Output = Any
"""A text, or what `datatype` or `output_schema` make of it; with `n > 1` a list of those."""
T = TypeVar("T")
Answerer = Callable[[Sequence[Request | RowError]], list[Result]]
"""N requests to N results in their order."""


class Model(Protocol):
    """What is below the models knows of one."""

    @property
    def identifier(self) -> str: ...
    @property
    def signature(self) -> Signature: ...
    @property
    def db(self) -> Datalayer | None: ...
    @property
    def model_update_kwargs(self) -> dict[str, Any]: ...

    def prepare(
        self, call: Callable[..., Any], context: Context = None, sampling: Mapping[str, Any] | None = None
    ) -> Call:
        """The call of the function `call`; raises `InvalidCall` for whatever is wrong with it."""


@dataclass(frozen=True)
class Call:
    """From records to requests, and from answers to values."""

    identifier: str
    uuid: str
    engine: sharing.Config
    max_batch_size: int | None
    target: Target
    prompter: Prompter
    sampling: Mapping[str, Any]
    decoder: Decoder
    behind: Mapping[str, Any] | None = None
    """What decides an answer of the engine behind a server of ours, which does not tell it itself."""
    has_chat_template: bool | None = None
    """Of the model, where that is known without asking."""
    answerer: Answerer | None = None
    """Who answers in place of the engine: a work pool. What the model is, is known there."""

    def resolved(self) -> Call:
        """This call where it is known whether texts are sent as chat; raises as a call that has to ask."""
        if self.prompter.chat is not None or self.answerer is not None:
            return self
        known = self.has_chat_template
        chat = of_model(self.engine) if known is None else known
        return replace(self, prompter=replace(self.prompter, chat=chat))

    def requests(self, records: Sequence[Any]) -> list[Request | RowError]:
        """For each record a request, or why there is none; raises `InvalidCall` for what all have wrong."""
        prompts = [self.prompter(record) for record in records]
        prompter = self.prompter
        if any(isinstance(prompt, str) for prompt in prompts):
            try:
                prompter = self.resolved().prompter
            except VllmTasksError as error:
                failed = copy.copy(error)  # others may wait for the same
                failed.results = [p if isinstance(p, RowError) else None for p in prompts]
                raise failed from error.__cause__
        return requests_of(prompts, prompter.chat, prompter.system, self.sampling, self.target)

    def answers(self, requests: Sequence[Request | RowError]) -> list[Result]:
        """N results for N requests, in their order."""
        if self.answerer is not None:
            return self.answerer(requests)
        return loop.run(sharing.generate(self.engine, requests, self.max_batch_size), raise_if_stopped)

    def predict(self, x: Any) -> Output:
        """The value of one record; raises as `predict_batches`."""
        (output,) = _checked(self._values([x]), "raise")
        return output

    def predict_batches(self, xs: Sequence[Any], on_error: OnError = "raise") -> list[Output | RowError]:
        """N values for N records, in their order; see `Predictor.predict_batches`."""
        _check_on_error(on_error)
        return _checked(self._values(_rows_of(xs)), on_error)

    def completions(self, xs: Sequence[Any], on_error: OnError = "raise") -> list[Completion | RowError]:
        """N results for N records, in their order; see `Predictor.completions`."""
        _check_on_error(on_error)
        return _checked(self._results(_rows_of(xs)), on_error)

    def _values(self, records: Sequence[Any]) -> list[Output | RowError]:
        results = self._results(records)
        values = [r if isinstance(r, RowError) else self.decoder.values(r) for r in results]
        return [replace(v, index=i) if isinstance(v, RowError) else v for i, v in enumerate(values)]

    def _results(self, records: Sequence[Any]) -> list[Result]:
        results = self.answers(self.requests(records))
        answers = [r for r in results if isinstance(r, Completion)]
        truncated = sum(any(c.finish_reason == "length" for c in r.choices) for r in answers)
        self.warn_of_truncated(truncated, len(answers))
        return results

    def warn_of_truncated(self, truncated: int, answers: int) -> None:
        """Warn of answers that ended at a limit that nobody set."""
        if truncated and not {"max_tokens", "max_completion_tokens"} & self.sampling.keys():
            logger.warning(
                "%s: %d of %d answers were truncated at max_tokens (vLLM's own default is 16 where neither "
                "the model nor the chat protocol says more)", self.identifier, truncated, answers,
            )  # fmt: skip

    def over(self, X: Columns) -> TableCall:  # noqa: N803 - the name in predict_in_db
        """This call over the columns `X` of a table.

        A server is asked for the name of its model when the model has none, and for its chat template where
        the call does not say how texts are sent. Raises `InvalidCall` for columns that no prompt can be made
        of.
        """
        columns, record = records(X, self.prompter.signature)
        self.prompter.check_fields(record(columns))
        call = self.resolved()
        name, engine = identity_of(self.engine)
        prompts = call.prompter.identity()
        unused = iter([fingerprint(prompts)] if call.prompter.prompt_func else [])

        def requests(rows: Sequence[Values]) -> list[Request | RowError]:
            made = call.requests([record(r) for r in rows])
            if (before := next(unused, None)) and fingerprint(call.prompter.identity()) != before:
                raise InvalidCall(
                    "prompt_func changes what it holds as it is used (a count, a cache), so that the next "
                    f"call would ask all rows again: {WAY_OUT}"
                )
            return made

        identity = {
            "model": self.behind or engine,
            "sampling": sampling_identity(self.sampling),
            "outputs": self.decoder.identity(),
            "columns": [columns, X if isinstance(X, Mapping) else None],
            **prompts,
        }
        return TableCall(
            call=call,
            columns=columns,
            requests=requests,
            decoder=self.decoder,
            model_name=name,
            fingerprint=fingerprint(identity),
        )


def requests_of(
    prompts: Sequence[str | list[Message] | RowError],
    chat: bool | None,
    system: str | None,
    sampling: Mapping[str, Any],
    target: Target,
) -> list[Request | RowError]:
    """A request for each prompt, with `chat` for texts as chat messages; None: texts are left to who answers.

    Raises `InvalidCall` for what all have wrong.
    """
    if chat:
        prompts = [conversation(p, system) if isinstance(p, str) else p for p in prompts]
    if chat is False and system is not None and any(isinstance(p, str) for p in prompts):
        raise InvalidCall(
            "system needs chat messages, and texts are sent as plain text (chat=False, or the model has no "
            "chat template): set chat=True, or put the words into the prompt"
        )
    check_prompts([p for p in prompts if chat is not None or not isinstance(p, str)], sampling, target)
    return [
        replace(p, index=i) if isinstance(p, RowError) else Request(p, sampling)
        for i, p in enumerate(prompts)
    ]


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
class TableCall:
    """A call over a table: from the values of rows to requests, from answers to the columns of outputs."""

    call: Call
    columns: tuple[str, ...]
    requests: Callable[[Sequence[Values]], list[Request | RowError]]
    decoder: RowDecoder
    model_name: str
    """As the engine knows it."""
    fingerprint: str


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


def _checked(results: list[T], on_error: OnError) -> list[T]:
    errors = [r for r in results if isinstance(r, RowError)]
    if errors and on_error == "raise":
        raise RowErrors(errors, results)
    return results


def _check_on_error(on_error: OnError) -> None:
    if on_error not in ("raise", "return"):
        raise InvalidCall(f"on_error={on_error!r} is neither 'raise' nor 'return'")


def _rows_of(xs: Any) -> Sequence[Any]:
    """The records; refuses what would be iterated into something else, or in no order."""
    if isinstance(xs, str | bytes | Mapping):
        raise InvalidCall(f"xs must be a list of records, got a {type(xs).__name__}; predict(x) takes one")
    if isinstance(xs, set | frozenset):
        raise InvalidCall(f"xs must be a list of records, got a {type(xs).__name__}, which has no order")
    if hasattr(xs, "columns"):
        raise InvalidCall(
            f"xs must be a list of records, got a {type(xs).__name__}, which iterates over its columns; pass "
            "one of them, table['column'], or with signature='**kwargs' all rows as dicts: "
            "table.to_pylist() of pyarrow, table.to_dict('records') of pandas"
        )
    # pyarrow's columns iterate over scalars of its own.
    rows: Sequence[Any] = xs.to_pylist() if hasattr(xs, "to_pylist") else xs
    return rows
