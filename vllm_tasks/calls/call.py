"""A call: the fields of a model combined with the arguments of one call.

A model creates it (`prepare`). The rooms below the models (tables, validations, work pools) know calls, but
not the models.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from vllm_tasks.calls.answers import Decoder
from vllm_tasks.calls.chat import of_model
from vllm_tasks.calls.columns import Columns, records
from vllm_tasks.calls.functions import WAY_OUT
from vllm_tasks.calls.prompt_func import Signature
from vllm_tasks.calls.prompts import Context, Prompter, fields_of
from vllm_tasks.calls.requests import requests_of
from vllm_tasks.calls.row_parameters import LIMITS, RowParameters, plain_number
from vllm_tasks.calls.sampling import Target, task_of
from vllm_tasks.calls.weights import engine_identity, sampling_identity
from vllm_tasks.canonical import fingerprint
from vllm_tasks.datalayer import Datalayer
from vllm_tasks.engines import batching, loop, sharing
from vllm_tasks.engines.http.transport import HttpConfig
from vllm_tasks.engines.stopping import raise_if_stopped
from vllm_tasks.errors import InvalidCall, RowErrors, VllmTasksError
from vllm_tasks.rows import Completion, Conversation, Prompt, Request, Result, RowError, is_chat

if TYPE_CHECKING:
    from vllm_tasks.calls.kept import Kept
    from vllm_tasks.datalayer.selection import OutputColumn
    from vllm_tasks.engines.batching import FollowUp

logger = logging.getLogger(__name__)

Values = Sequence[Any]
"""The values of one row, in the order of the columns."""
OnError = Literal["raise", "return"]
Output = Any
"""A text, or the value that `datatype` or `output_schema` makes of it; with `n > 1` a list of those."""
T = TypeVar("T")
Answerer = Callable[[Sequence[Request | RowError]], list[Result]]
"""A function from N requests to N results in their order."""


class Model(Protocol):
    """The part of a model that the rooms below the models know."""

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
        """Return the call of the function `call`. Raise `InvalidCall` if anything is wrong with it."""


def check_model(model: object) -> None:
    """Raise `InvalidCall` for anything that is not a model, such as a name or rows."""
    if inspect.isawaitable(model):
        if inspect.iscoroutine(model):
            model.close()
        raise InvalidCall("the model was not awaited: in an asynchronous flow, `await VllmAPI.aload(NAME)`")
    if isinstance(model, type) or not hasattr(model, "prepare"):
        named = model.__name__ if isinstance(model, type) else f"a {type(model).__name__}"
        raise InvalidCall(
            f"the model is {named}, not a VllmAPI or VllmModel: give one as the first argument; "
            "VllmAPI.load(NAME) loads a saved one"
        )


@dataclass(frozen=True)
class Call:
    """Makes requests of records, and values of answers."""

    identifier: str
    uuid: str
    engine: sharing.Config
    max_batch_size: int | None
    target: Target
    prompter: Prompter
    sampling: Mapping[str, Any]
    decoder: Decoder
    check: Callable[[Iterable[str]], None]
    """Raises `InvalidCall` for names that are not sampling parameters here."""
    served_arguments: Mapping[str, Any] | None = None
    """Engine arguments of a server that `serve` started. They count in the fingerprint: the server does
    not report them."""
    has_chat_template: bool | None = None
    """Whether the model has a chat template, if that is known without a request."""
    answerer: Answerer | None = None
    """Processes requests elsewhere, on a work pool, where it is also decided whether texts become chat."""

    @functools.cached_property
    def of_rows(self) -> RowParameters:
        """The parameters of rows' own."""
        return RowParameters(self.sampling, self.target, self.check, self.decoder)

    def resolved(self) -> Call:
        """Return this call with `chat` set, as the model's files, engine or server report it.

        It stays None if a server does not report it. Raises the errors of a request if an engine or server is
        needed for that.
        """
        if self.prompter.chat is not None or self.answerer is not None:
            return self
        known = self.has_chat_template
        chat = of_model(self.engine) if known is None else known
        return replace(self, prompter=replace(self.prompter, chat=chat))

    def of_texts(self) -> Call:
        """Return this call with plain texts, unless it sets `chat` or a system text."""
        if self.prompter.chat is not None or self.prompter.system is not None:
            return self
        return replace(self, prompter=replace(self.prompter, chat=False))

    def requests(
        self, records: Sequence[Any], own: Sequence[Mapping[str, Any]] | None = None
    ) -> list[Request | RowError]:
        """Return for each record a request or its error. Raise `InvalidCall` if all have the same fault.

        `own` has sampling parameters of each record's own; those that `prompt_func` returns override them.
        """
        made = [
            self._with_parameters(self.prompter(record), own[i] if own else {})
            for i, record in enumerate(records)
        ]
        prompts = [r.prompt for r in made if isinstance(r, Request)]
        prompter = self.prompter
        if any(isinstance(prompt, str) for prompt in prompts):
            try:
                prompter = self.resolved().prompter
            except VllmTasksError as error:
                failed = copy.copy(error)  # other callers may raise the same error
                failed.results = [r if isinstance(r, RowError) else None for r in made]
                raise failed from error.__cause__
        if self.decoder.repairs.repair and any(isinstance(p, list) and not is_chat(p) for p in prompts):
            raise InvalidCall("repair adds a turn to a prompt, and token ids take none: use resample")
        # On a work pool, that side does it: it knows which texts become chat.
        thinks = self.decoder.type.thinks or self.answerer is not None
        requests = requests_of(
            made, prompter.chat, prompter.system, self.sampling, self.target, thinks=thinks
        )
        if self.decoder.repairs.check is None:
            return requests
        return [
            request if isinstance(request, RowError) else replace(request, record=record)
            for request, record in zip(requests, records, strict=True)
        ]

    def sends_chat(self) -> bool:
        """Return whether texts were sent as chat by this resolved call."""
        if self.prompter.chat is not None:
            return self.prompter.chat
        return not loop.run(sharing.refuses_chat(self.engine))

    def _with_parameters(
        self, made: Prompt | Request | RowError, own: Mapping[str, Any]
    ) -> Request | RowError:
        if isinstance(made, RowError):
            return made
        task = task_of(self.target)
        if isinstance(made, Request):
            return self.of_rows.request(replace(made, task=task), own)
        if own:
            return self.of_rows.request(Request(made, task=task), own)
        return Request(made, self.sampling, task)

    def answers(
        self, requests: Sequence[Request | RowError], follow_up: FollowUp | None = None
    ) -> list[Result]:
        """Return N results for N requests, in their order, each after all attempts that `follow_up` makes.

        By default it is that of the decoder.
        """
        follow_up = follow_up or self.decoder.follow_up
        if self.answerer is not None:
            self._refuse_unknown_turns(requests)
            return batching.in_rounds(self.answerer, requests, follow_up)
        sent = sharing.generate(self.engine, requests, self.max_batch_size, follow_up=follow_up)
        return loop.run(sent, raise_if_stopped)

    def _refuse_unknown_turns(self, requests: Sequence[Request | RowError]) -> None:
        """Refuse to repair texts of which only a work pool decides whether they are chat."""
        texts = any(isinstance(r, Request) and isinstance(r.prompt, Conversation) for r in requests)
        if self.decoder.repairs.repair and texts:
            raise InvalidCall(
                "repair adds a turn to a prompt, and on a work pool it is not known here whether the model "
                "takes texts as chat: set chat=True or chat=False"
            )

    def predict(self, x: Any) -> Output:
        """Return the value of one record; it raises the errors of `predict_batches`."""
        (output,) = _checked(self._values([x]), "raise")
        return output

    def predict_batches(self, xs: Sequence[Any], on_error: OnError = "raise") -> list[Output | RowError]:
        """Return N values for N records, in their order; see `Predictor.predict_batches`."""
        _check_on_error(on_error)
        return _checked(self._values(rows_of(xs)), on_error)

    def completions(self, xs: Sequence[Any], on_error: OnError = "raise") -> list[Completion | RowError]:
        """Return N results for N records, in their order; see `Predictor.completions`."""
        _check_on_error(on_error)
        return _checked(self._results(rows_of(xs), batching.final), on_error)

    def _values(self, records: Sequence[Any]) -> list[Output | RowError]:
        results = self._results(records)
        values = [r if isinstance(r, RowError) else self.decoder.values(r) for r in results]
        return [replace(v, index=i) if isinstance(v, RowError) else v for i, v in enumerate(values)]

    def _results(self, records: Sequence[Any], follow_up: FollowUp | None = None) -> list[Result]:
        results = self.answers(self.requests(records), follow_up)
        answers = [r for r in results if isinstance(r, Completion)]
        truncated = sum(any(c.finish_reason == "length" for c in r.choices) for r in answers)
        self.warn_of_truncated(truncated, len(answers))
        return results

    def warn_of_truncated(self, truncated: int, answers: int) -> None:
        """Warn of answers that were truncated at a limit that the caller has not set."""
        if truncated and not LIMITS & (self.sampling.keys() | self.of_rows.names):
            logger.warning(
                "%s: %d of %d answers were truncated at max_tokens (vLLM's own default is 16 unless the "
                "model or the chat protocol sets more)", self.identifier, truncated, answers,
            )  # fmt: skip

    def over(
        self,
        X: Columns,  # noqa: N803 - the name in predict_in_db
        sampling_columns: Mapping[str, str] | None = None,
    ) -> TableCall:
        """Return this call over the columns `X` of a table, and those of sampling parameters.

        It requests the model's name from a server if the model has none, and the chat template if the call
        does not determine how texts are sent. It raises `InvalidCall` if no prompt can be made of the
        columns.
        """
        columns, record = records(X, self.prompter.signature)
        self.prompter.check_fields(record(columns))
        fields = fields_of(self.prompter.signature, record(columns))
        own = self.of_rows.check_columns(sampling_columns)
        # Those of `own` stand behind those of `X`, where `record` does not look.
        all_columns = tuple(dict.fromkeys((*columns, *own.values())))
        places = {name: all_columns.index(column) for name, column in own.items()}
        call = self.resolved()
        name, engine = identity_of(self.engine)
        prompts = call.prompter.identity()
        # Compared once, after the first rows: a prompt_func that counts would make the next call rerun all.
        to_compare = iter([fingerprint(prompts)] if call.prompter.prompt_func else [])

        def requests(rows: Sequence[Values]) -> list[Request | RowError]:
            parameters = [
                {name: plain_number(row[i]) for name, i in places.items() if row[i] is not None}
                for row in rows
            ]
            made = call.requests([record(r) for r in rows], parameters if places else None)
            if (before := next(to_compare, None)) and fingerprint(call.prompter.identity()) != before:
                raise InvalidCall(
                    "prompt_func changes its own data as it is used (a counter, a cache), so the next call "
                    f"would process all rows again: {WAY_OUT}"
                )
            return made

        identity = {
            "model": self.served_arguments or engine,
            "sampling": sampling_identity(self.sampling),
            "outputs": self.decoder.identity(),
            "columns": [columns, X if isinstance(X, Mapping) else None],
            **({"sampling_columns": own} if own else {}),
            **prompts,
        }
        return TableCall(
            call=call,
            columns=all_columns,
            media=frozenset(columns.index(fields[name]) for name in self.prompter.media.fields),
            requests=requests,
            decoder=self.decoder,
            model_name=name,
            fingerprint=fingerprint(identity),
        )


class RowDecoder(Protocol):
    """Turns an answer into rows of a table."""

    @property
    def columns(self) -> tuple[OutputColumn, ...]:
        """The columns of the answer, without those that every outputs table has."""

    @property
    def kept(self) -> Kept:
        """The columns beside those of the answer."""

    @property
    def flatten(self) -> bool:
        """Whether an answer may become any number of rows."""

    @property
    def follow_up(self) -> FollowUp:
        """Decides what follows a result."""

    def rows(self, completion: Completion) -> list[tuple[Any, ...]] | RowError:
        """Return the answer as rows, each with a value for each of `columns`."""


def stored_columns(decoder: RowDecoder) -> tuple[OutputColumn, ...]:
    """Return the columns of an outputs table that `decoder` has values for."""
    return (*decoder.columns, *decoder.kept.columns)


@dataclass(frozen=True)
class TableCall:
    """A call over a table. It makes requests of rows' values, and rows of the outputs table of answers."""

    call: Call
    columns: tuple[str, ...]
    media: frozenset[int]
    """The places of the columns that are pictures, audio or video."""
    requests: Callable[[Sequence[Values]], list[Request | RowError]]
    decoder: RowDecoder
    model_name: str
    """The name by which the engine knows the model."""
    fingerprint: str


def identity_of(config: sharing.Config) -> tuple[str, Any]:
    """Return the model's name, and the part of the fingerprint that identifies the model.

    The name is requested from the server if the call has none. Raises `InvalidCall` if an engine of this
    process has former contents of the model's files.
    """
    if not isinstance(config, HttpConfig):
        loop.run(sharing.check_current(config), raise_if_stopped)
        arguments = json.loads(config.engine_args)
        return arguments["model"], engine_identity(arguments)
    name = config.model
    if name is None and config.protocol != "legacy":  # which does not report a name
        name = loop.run(sharing.facts(config), raise_if_stopped)["model"]
    return name or "", name


def _checked(results: list[T], on_error: OnError) -> list[T]:
    errors = [r for r in results if isinstance(r, RowError)]
    if errors and on_error == "raise":
        raise RowErrors(errors, results)
    return results


def _check_on_error(on_error: OnError) -> None:
    if on_error not in ("raise", "return"):
        raise InvalidCall(f"on_error={on_error!r} is neither 'raise' nor 'return'")


def rows_of(xs: Any) -> list[Any]:
    """Return the records as a list; refuse values that iterate over something else, or without an order."""
    if isinstance(xs, set | frozenset):
        raise InvalidCall(f"xs must be a list of records, got a {type(xs).__name__}, which has no order")
    if hasattr(xs, "columns"):
        raise InvalidCall(
            f"xs must be a list of records, got a {type(xs).__name__}, which iterates over its columns; pass "
            "one of them, table['column'], or with signature='**kwargs' all rows as dicts: "
            "table.to_pylist() of pyarrow, table.to_dict('records') of pandas"
        )
    if isinstance(xs, str | bytes | Mapping) or not hasattr(xs, "__iter__"):
        raise InvalidCall(f"xs must be a list of records, got a {type(xs).__name__}; predict(x) takes one")
    # pyarrow's columns iterate over pyarrow's own scalars.
    return [*(xs.to_pylist() if hasattr(xs, "to_pylist") else xs)]
