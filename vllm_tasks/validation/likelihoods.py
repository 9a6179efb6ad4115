"""The likelihood of given texts under a model, from vLLM's `prompt_logprobs`. One token is generated, since
vLLM requires one.

As in lm-evaluation-harness (`TemplateLM._encode_pair`), white space at the end of the prompt belongs to the
text. Prompt and text are tokenized together, and the prompt without that space alone; the text's tokens are
those beyond as many as the latter has. Their log probabilities are summed, and no others. With chat messages
the text is the beginning of the assistant's message.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import pyarrow as pa

from vllm_tasks.calls.call import TableCall
from vllm_tasks.calls.kept import NOTHING_KEPT, Kept
from vllm_tasks.calls.plain_text import NoText, plain_text
from vllm_tasks.canonical import canonical, fingerprint
from vllm_tasks.datalayer import exact_json
from vllm_tasks.datalayer.selection import OutputColumn, Tables
from vllm_tasks.engines.batching import FollowUp, final
from vllm_tasks.errors import InvalidCall
from vllm_tasks.metrics.measure import Answer, Likelihood
from vllm_tasks.rows import Completion, Request, RowError, is_chat
from vllm_tasks.validation import Metric
from vllm_tasks.validation.expected import expected
from vllm_tasks.validation.predictions import Incomplete, Round, Row, Source, predict_id_of, read
from vllm_tasks.validation.snapshot import Case, Snapshot, has_rows

KEY = "row", "part"
PROMPT_ALONE = -1
"""Number of the part that is the prompt without a text."""
NUMBERS = int, float, Decimal
SAMPLING = {"prompt_logprobs": 0, "max_tokens": 1, "temperature": 0}
OF_THE_PROMPT = {
    *("add_generation_prompt", "add_special_tokens", "chat_template", "chat_template_kwargs"),
    *("continue_final_message", "documents", "lora_request", "media_io_kwargs", "mm_processor_kwargs"),
    *("model", "reasoning_effort", "tool_choice", "tools", "truncate_prompt_tokens", "truncation_side"),
}
"""Parameters that are sent with the sampling parameters and decide the prompt or the weights."""
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}
"""For chat: the last message is unfinished, so the template does not close it."""


@dataclass(frozen=True)
class LogprobDecoder:
    """Keeps the log probabilities of a prompt's tokens, without the first token, which has none."""

    columns: tuple[OutputColumn, ...] = (OutputColumn("logprobs", "json"),)
    flatten: bool = False
    kept: Kept = NOTHING_KEPT

    @property
    def follow_up(self) -> FollowUp:
        """Nothing follows a likelihood."""
        return final

    def rows(self, completion: Completion) -> list[tuple[Any, ...]] | RowError:
        """One row: a list of natural logs."""
        if completion.prompt_logprobs is None:
            return RowError("response", "the server sent no prompt_logprobs, which likelihoods need")
        return [([token.logprob for token in completion.prompt_logprobs if token is not None],)]


@dataclass(frozen=True)
class Likelihoods:
    """The likelihoods of each row's texts: of its choices (the target is the index of the right one, from 0),
    or of the target."""

    over: TableCall
    """The call that makes the requests."""
    metric: Metric
    predict_id: str

    @classmethod
    def of(cls, over: TableCall, metric: Metric, dataset: str) -> Likelihoods:
        """The likelihoods under the model of `over`, with its prompts."""
        delimiter = _delimiter(metric)
        scoring = _scoring_call(over, delimiter)
        # Metrics over the same texts share their likelihoods.
        texts = "choices" if metric.built_in == "multiple_choice" else "target"
        kind = f"{texts}-{fingerprint({'delimiter': delimiter})[:8]}"
        return cls(scoring, metric, predict_id_of(over.call.identifier, dataset, scoring.decoder, kind))

    def needed(self) -> list[Source]:
        return [self]

    def check(self, snapshot: Snapshot) -> None:
        _texts(snapshot.cases, self.metric)

    def process(self, round_: Round, snapshot: Snapshot) -> int:
        texts, _ = _texts(snapshot.cases, self.metric)
        parts = 1 + max(map(len, texts))
        table = _stored(round_.home, snapshot, texts)
        return round_.process(self.over, self.predict_id, table, KEY, parts=parts)

    def answers(self, home: Tables, run: str, snapshot: Snapshot) -> list[Answer]:
        texts, targets = _texts(snapshot.cases, self.metric)
        rows = read(home, run, self.predict_id, self.over.decoder, KEY)
        found = {(row["row"], row["part"]): row for row in rows}
        return [
            _answer(case, own, target, found, len(_delimiter(self.metric)))
            for case, own, target in zip(snapshot.cases, texts, targets, strict=True)
        ]


def _texts(cases: Sequence[Case], metric: Metric) -> tuple[list[list[str]], list[Any]]:
    chooses = metric.built_in == "multiple_choice"
    delimiter = _delimiter(metric)
    texts = []
    for case in cases:
        own = case.choices if chooses else [case.target]
        if not isinstance(own, list) or not own:
            raise InvalidCall(
                f"{metric.identifier!r}: row {case.row} needs a list of choices; got {own!r:.100}"
            )
        texts.append([f"{delimiter}{_text(text, case, metric)}" for text in own])
    if not chooses:
        return texts, [case.target for case in cases]
    # Among choices that are numbers, 1 may be one of them or an index: it is the same in all rows.
    numbers_are_choices = all(
        case.target in expected(case.choices) for case in cases if isinstance(case.target, NUMBERS)
    )
    return texts, [
        _index(case, case.choices or [], metric, numbers_are_choices=numbers_are_choices) for case in cases
    ]


def _text(value: Any, case: Case, metric: Metric) -> str:
    try:
        text = plain_text(value)
    except NoText as error:
        raise InvalidCall(
            f"{metric.identifier!r} needs texts, but row {case.row} has {value!r:.100}, which {error}"
        ) from error
    if not text:
        raise InvalidCall(f"{metric.identifier!r}: row {case.row} has an empty text, which has no likelihood")
    return text


def _delimiter(metric: Metric) -> str:
    delimiter = metric.options.get("delimiter", " " if metric.built_in == "multiple_choice" else "")
    if not isinstance(delimiter, str):
        raise InvalidCall(f"{metric.identifier!r}: delimiter={delimiter!r:.100} is not a text")
    return delimiter


def _index(case: Case, choices: list[Any], metric: Metric, *, numbers_are_choices: bool) -> int:
    """The index of the right choice; the target is that index, from 0, or the choice itself."""
    target, choices = case.target, expected(choices)
    if target in choices and (numbers_are_choices or not isinstance(target, NUMBERS)):
        return choices.index(target)
    if isinstance(target, Decimal) and target == target.to_integral_value():
        target = int(target)  # a NUMERIC column returns indexes as Decimal
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(choices):
        return target
    raise InvalidCall(
        f"{metric.identifier!r}: the answer {target!r:.100} of row {case.row} is none of its {len(choices)} "
        "choices, nor the index of one from 0"
    )


def _stored(home: Tables, snapshot: Snapshot, texts: list[list[str]]) -> str:
    """Name of the table of prompts and texts, one row each; it is created if it is missing."""
    rows = [
        (case.row, part, exact_json.dumps([case.inputs, text]))
        for case, own in zip(snapshot.cases, texts, strict=True)
        for part, text in enumerate([None, *own], PROMPT_ALONE)
    ]
    digest = hashlib.sha256(canonical(rows).encode()).hexdigest()
    name = f"_texts__{snapshot.dataset}__{digest[:12]}"
    if not has_rows(home, name):
        numbers, parts, inputs = map(list, zip(*rows, strict=True))
        home.put(name, pa.table({"row": numbers, "part": parts, "input": inputs}), KEY)
    return name


def _scoring_call(over: TableCall, delimiter: Any) -> TableCall:
    """`over`, changed to return the likelihood of a text after the prompt and the delimiter."""

    def requests(rows: Sequence[Sequence[Any]]) -> list[Request | RowError]:
        pairs = [exact_json.loads(row[0]) for row in rows]
        prompts = over.requests([(exact_json.dumps(inputs),) for inputs, _ in pairs])
        return [
            prompt
            if isinstance(prompt, RowError)
            else _request(prompt, text, _scoring(prompt.sampling, sampling))
            for prompt, (_, text) in zip(prompts, pairs, strict=True)
        ]

    sampling = _scoring(over.call.sampling)
    return replace(
        over,
        columns=("input",),
        requests=requests,
        decoder=LogprobDecoder(),
        call=replace(over.call, sampling=sampling),
        fingerprint=fingerprint(
            {"likelihood": over.fingerprint, "sampling": sampling, "delimiter": delimiter}
        ),
    )


def _scoring(given: Mapping[str, Any], shared: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """The parameters of a likelihood: those among `given` of the prompt; `shared` itself if equal to it."""
    found = {**{name: value for name, value in given.items() if name in OF_THE_PROMPT}, **SAMPLING}
    return found if shared is None or shared != found else shared


def _request(request: Request, text: str | None, sampling: Mapping[str, Any]) -> Request | RowError:
    if isinstance(request.prompt, str):
        alone = request.prompt.rstrip()
        if not alone:
            return RowError(
                "prompt",
                "nothing stands before the text, so its first token has no likelihood; let the prompt be the "
                "token that begins a document for this model, such as <|endoftext|>",
            )
        return Request(alone if text is None else request.prompt + text, sampling)
    if not is_chat(request.prompt):
        return RowError(
            "prompt", "a likelihood needs a prompt that is a text or chat messages, not token ids"
        )
    if text is None:
        return Request(request.prompt, sampling)
    return Request([*request.prompt, {"role": "assistant", "content": text}], {**sampling, **CONTINUE})


def _answer(
    case: Case, texts: list[str], target: Any, found: Mapping[tuple[int, int], Row], delimiter: int
) -> Answer:
    try:
        alone, *with_text = [found[case.row, part] for part in range(PROMPT_ALONE, len(texts))]
    except KeyError as error:
        raise Incomplete(f"there is no likelihood for row {case.row}") from error
    if problem := next((part["_error"] for part in (alone, *with_text) if part["_error"]), None):
        return Answer(case.row, target, None, error=problem)
    prompt = len(alone["value"]["logprobs"])
    tokens = [part["value"]["logprobs"][prompt:] for part in with_text]
    if not all(tokens):
        text = texts[[bool(own) for own in tokens].index(False)]
        return Answer(
            case.row,
            target,
            None,
            error=f"prompt: the tokenizer joins {text!r:.100} with the prompt, so it has no token of "
            "its own; separate them by a delimiter",
        )
    likelihoods = [
        Likelihood(
            logprob=math.fsum(own),
            tokens=len(own),
            characters=len(text) - delimiter,
        )
        for own, text in zip(tokens, texts, strict=True)
    ]
    return Answer(case.row, target, likelihoods)
