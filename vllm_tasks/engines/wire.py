"""The HTTP formats: turns a request into a JSON body and a JSON response into a `Completion`.

These are pure functions. Responses come from outside and are not trusted: whatever differs from the
protocol raises `WrongShape`.
"""

from __future__ import annotations

import base64
import math
import reprlib
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, Never

from vllm_tasks.rows import Choice, Completion, Request, TokenLogprob, is_chat

JSON = Mapping[str, Any]
Protocol = Literal["legacy", "completions", "chat", "openai"]
"""`openai` means completions or chat, depending on each prompt."""
PATHS: dict[str, Protocol] = {
    "/generate": "legacy",
    "/chat/completions": "chat",
    "/completions": "completions",
    "": "openai",
}
"""The protocol that the end of the path of a server's URL selects."""
POOLING = {"embed": "/v1/embeddings", "score": "/score", "classify": "/classify", "reward": "/classify"}
"""The paths of the tasks that return numbers."""
OWN: dict[str, JSON] = {"embed": {"encoding_format": "base64"}, "reward": {"use_activation": False}}
"""Parameters of a task that its requests have unless the call sets them."""
WITHHELD = {"content_filter", "safety", "recitation", "prohibited_content", "sensitive"}
"""The finish reasons of answers that a filter withholds, completely or in part: OpenAI's, which most gateways
have, and in small letters those of Gemini and GLM, which some gateways pass on."""
COUNTS = range(2**63)
"""Valid token counts: those that fit into 64 bits."""
UNFIT = (AttributeError, LookupError, OverflowError, TypeError, ValueError)
"""Exceptions raised by reading a value of another shape."""
TRUNCATED = {"model_length", "max_tokens", "model_context_window_exceeded"}
"""The finish reasons, in small letters, of answers that are truncated where vLLM and OpenAI have `length`:
Mistral's, Gemini's and Anthropic's, and GLM's."""


class WrongShape(ValueError):
    """The response does not have the shape that the protocol requires."""


_glimpse = reprlib.Repr()  # bounded in size and depth, whatever the value
_glimpse.maxstring = _glimpse.maxother = 100


def path_of(protocol: Protocol, request: Request) -> str:
    """The path to which `request` is sent; `Endpoint` knows where a server has it."""
    if request.task in POOLING:
        return POOLING[request.task]
    if protocol == "legacy":
        return "/generate"
    return "/v1/chat/completions" if is_chat(request.prompt) else "/v1/completions"


def body_of(request: Request, model: str | None) -> dict[str, Any]:
    """The JSON body. `model` is None for the legacy format, which has no such field."""
    named = {} if model is None else {"model": model}
    return {**named, **input_of(request), **sampling_of(request)}


def input_of(request: Request) -> dict[str, Any]:
    """The fields that hold the prompt."""
    if not is_chat(request.prompt):
        return {"input" if request.task in POOLING else "prompt": request.prompt}
    if request.task == "score":
        query, document = request.prompt
        return {"text_1": query["content"], "text_2": document["content"]}
    return {"messages": request.prompt}


def sampling_of(request: Request) -> Mapping[str, Any]:
    """The sampling parameters as the protocol names them: chat has two for a number of `logprobs`.

    Vectors are requested as base64, which is exact and a quarter of the bytes of decimal numbers. A reward is
    the number that the model was trained on, before any activation.
    """
    if request.task in POOLING:
        return {**OWN.get(request.task, {}), **request.sampling}
    most = request.sampling.get("logprobs")
    if type(most) is not int or not is_chat(request.prompt):
        return request.sampling
    return {**request.sampling, "logprobs": True, "top_logprobs": most}


def parse(path: str, request: Request, answer: object) -> Completion:
    """Read the completion from `answer`, a decoded JSON value. Raises `WrongShape`."""
    if not isinstance(answer, Mapping):
        wrong("an object", answer)
    if request.task in POOLING:
        return _pooled(answer, request.task)
    wanted = request.sampling.get("n") or 1
    if path == "/generate":
        assert isinstance(request.prompt, str)
        return _legacy(answer, request.prompt, wanted)
    found = _openai(answer, _text_choice if path == "/v1/completions" else _chat_choice, wanted)
    structure = request.sampling.get("structured_outputs")
    options = structure.get("choice") if isinstance(structure, Mapping) else None
    return _whole(found, options) if isinstance(options, list) else found


def status_of(answer: object) -> int:
    """Return the HTTP status of an error within a response that came with 200, as in streams and from
    gateways that have begun to respond (OpenRouter); 200 without one."""
    error = answer.get("error") if isinstance(answer, Mapping) else None
    code = error.get("code") if isinstance(error, Mapping) else None
    if isinstance(code, str) and code.isascii() and code.isdigit():  # LiteLLM has "400"
        code = int(code[:9])
    if isinstance(code, int) and 400 <= code < 600:
        return code
    return 500 if error else 200


def withheld(answer: object) -> str | None:
    """Return why a filter or the model itself withholds an answer; None if the response does not say that it
    does. A model's refusal stands in `refusal`, beside an empty or absent text (OpenAI)."""
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    for choice in choices if isinstance(choices, list) else ():
        found = choice if isinstance(choice, Mapping) else {}
        reason, message = found.get("finish_reason"), found.get("message")
        words = message.get("refusal") if isinstance(message, Mapping) else None
        if words and isinstance(words, str):
            return f"refusal {words!r:.300}"
        if isinstance(reason, str) and reason.lower() in WITHHELD:
            return f"finish_reason {reason!r}"
    return None


def wrong(expected: str, got: object) -> Never:
    """Raise `WrongShape` with what was expected and the beginning of what was received."""
    raise WrongShape(f"expected {expected}, the server sent {_glimpse.repr(got)[:300]}")


def _whole(completion: Completion, options: list[Any]) -> Completion:
    """The completion with `stop` for an answer that is one of the `options` and the beginning of no other.

    vLLM reports `length` if `max_tokens` is reached with it, but nothing has been truncated.
    """
    return replace(
        completion,
        choices=tuple(
            replace(choice, finish_reason="stop")
            if choice.finish_reason == "length"
            and [option for option in options if str(option).startswith(choice.text)] == [choice.text]
            else choice
            for choice in completion.choices
        ),
    )


def _legacy(answer: JSON, prompt: str, wanted: int) -> Completion:
    """`{"text": [prompt + completion, ...]}`, the format of the former `vllm.entrypoints.api_server`."""
    texts = answer.get("text")
    if not isinstance(texts, list):
        wrong('"text", a list of strings', answer)
    _check_number(texts, wanted)
    if not all(_text(t, "text").startswith(prompt) for t in texts):
        wrong("each text to begin with the prompt", texts)
    return Completion(choices=tuple(Choice(text=t[len(prompt) :]) for t in texts))


def _openai(answer: JSON, choice_of: Callable[[JSON], Choice], wanted: int) -> Completion:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, Mapping) for c in choices):
        wrong('"choices", a list of objects', answer)
    _check_number(choices, wanted)
    usage = _optional(answer, "usage", dict) or {}
    prompt_logprobs = answer.get("prompt_logprobs") or choices[0].get("prompt_logprobs")
    return Completion(
        choices=tuple(choice_of(c) for c in _in_order(choices)),
        prompt_tokens=_count_of(usage, "prompt_tokens"),
        completion_tokens=_count_of(usage, "completion_tokens"),
        prompt_logprobs=_prompt_logprobs(prompt_logprobs),
        model=_name(answer, "model"),
        usage=usage or None,
    )


def _pooled(answer: JSON, task: str) -> Completion:
    data = answer.get("data")
    if not isinstance(data, list) or len(data) != 1 or not isinstance(data[0], Mapping):
        wrong('"data", a list of one object', answer)
    numbers = _numbers(data[0].get("embedding")) if task == "embed" else None
    if numbers is None:
        found = [data[0].get("score")] if task == "score" else data[0].get("probs")
        numbers = [_number(each) for each in found] if isinstance(found, list) else []
    if not numbers or not all(map(math.isfinite, numbers)):
        wrong("finite numbers", data[0])
    if task == "classify" and not all(0 <= each <= 1 for each in numbers):  # it has no activation
        wrong("probabilities from 0 to 1 (task='reward' returns one number of any size)", data[0])
    if task == "reward" and len(numbers) > 1:
        wrong("one number, as from a model with one class", data[0])
    return Completion(
        choices=(Choice(text=_name(data[0], "label") or "", data=numbers),),
        prompt_tokens=_count_of(_optional(answer, "usage", dict) or {}, "prompt_tokens"),
        model=_name(answer, "model"),
    )


def _numbers(vector: Any) -> list[float]:
    """The numbers of a vector, each of 32 bits; servers may send a list although base64 was requested."""
    try:
        if not isinstance(vector, str):
            return array("f", [_number(each) for each in vector]).tolist()
        return array("f", base64.b64decode(vector, validate=True)).tolist()
    except UNFIT:
        wrong('"embedding", a list of numbers or base64', vector)


def _text_choice(choice: JSON) -> Choice:
    return Choice(
        text=_text(choice.get("text"), "text"),
        finish_reason=_finish_reason(choice),
        token_ids=_list_of(int, choice, "token_ids"),
        logprobs=_text_logprobs(choice.get("logprobs")),
        reasoning=_optional(choice, "reasoning", str),
    )


def _chat_choice(choice: JSON) -> Choice:
    message = choice.get("message")
    if not isinstance(message, Mapping):
        wrong('"message", an object', choice)
    text = message.get("content")
    former = _optional(message, "function_call", dict)  # OpenAI's, from before `tool_calls`
    tool_calls = _list_of(dict, message, "tool_calls") or (
        [{"type": "function", "function": former}] if former else None
    )
    reasoning = _optional(message, "reasoning", str) or _optional(message, "reasoning_content", str)
    if text is None and (tool_calls or reasoning):
        text = ""  # all tokens went into the calls or the reasoning
    return Choice(
        text=_text(text, "content"),
        finish_reason=_finish_reason(choice),
        token_ids=_list_of(int, choice, "token_ids"),
        logprobs=_chat_logprobs(choice.get("logprobs")),
        reasoning=reasoning,
        tool_calls=tool_calls,
    )


def _finish_reason(choice: JSON) -> str | None:
    """The finish reason, by vLLM's name for one that other servers call otherwise."""
    reason = _name(choice, "finish_reason")
    return "length" if reason and reason.lower() in TRUNCATED else reason


def _text_logprobs(value: Any) -> list[TokenLogprob] | None:
    if value is None:
        return None
    if isinstance(value, Mapping) and "content" in value and "tokens" not in value:
        return _chat_logprobs(value)  # llama.cpp's server has one form for both
    try:
        tops = [(top or {}).items() for top in value.get("top_logprobs") or [None] * len(value["tokens"])]
        if "content" in value:  # from our host: a list, which keeps tokens of equal text apart
            tops = [_tops(token) for token in value["content"]]
        rows = zip(value["tokens"], value["token_logprobs"], tops, strict=True)
        return [_token(token, logprob, top) for token, logprob, top in rows]
    except UNFIT:
        wrong('"logprobs" with "tokens" and "token_logprobs" of one length', value)


def _chat_logprobs(value: Any) -> list[TokenLogprob] | None:
    if value is None:
        return None
    try:
        return [_token(t["token"], t["logprob"], _tops(t)) for t in value.get("content") or ()]
    except UNFIT:
        wrong('"logprobs" with "content", a list of tokens', value)


def _tops(token: JSON) -> list[tuple[Any, Any]]:
    return [(top["token"], top["logprob"]) for top in token.get("top_logprobs") or ()]


def _prompt_logprobs(value: Any) -> list[TokenLogprob | None] | None:
    """vLLM's `prompt_logprobs`: per prompt token `{token_id: {logprob, decoded_token, rank}}`.

    The first entry of each is the prompt's own token. The first token of a prompt has None.
    """
    if value is None:
        return None
    try:
        return [_prompt_token(entry) for entry in value]
    except UNFIT:
        wrong('"prompt_logprobs", a list of objects', value)


def _prompt_token(entry: Mapping[str, Any] | None) -> TokenLogprob | None:
    if entry is None:
        return None
    tokens = [(t["decoded_token"], t["logprob"]) for t in entry.values()]
    return _token(*tokens[0], tokens)


def _token(token: Any, logprob: Any, top: Iterable[tuple[Any, Any]]) -> TokenLogprob:
    return TokenLogprob(
        _text(token, "token"), _number(logprob), [(_text(t, "token"), _number(p)) for t, p in top]
    )


def _number(value: Any) -> float:
    """A float; NaN for None, because the first token of an echoed prompt has no probability."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        wrong("a number", value)
    try:
        return float(value)
    except OverflowError:
        wrong("a number of 64 bits", value)


def _text(value: Any, name: str) -> str:
    """A string that UTF-8 can encode. JSON can carry a lone surrogate, tables cannot."""
    if not isinstance(value, str):
        wrong(f'"{name}", a string', value)
    try:
        value.encode()
    except UnicodeEncodeError:
        wrong(f'"{name}", a string without lone surrogates', value)
    return value


def _check_number(choices: list[Any], wanted: int) -> None:
    if len(choices) != wanted:
        wrong(f"{wanted} choice(s)", choices)


def _in_order(choices: list[JSON]) -> list[JSON]:
    """The choices sorted by their index. Without an index they are in order already."""
    by_index = {_optional(c, "index", int, i): c for i, c in enumerate(choices)}
    if len(by_index) != len(choices) or None in by_index:
        wrong('choices with an "index" each', choices)
    return [by_index[i] for i in sorted(by_index)]


def _count_of(usage: JSON, name: str) -> int | None:
    """A token count. It is stored beside the answer, so it must fit into every kind of table."""
    found: int | None = _optional(usage, name, int)
    if found is not None and found not in COUNTS:
        wrong(f'"{name}" to be a count', found)
    return found


def _name(value: JSON, name: str) -> str | None:
    """A name, to be stored like a count: without the character 0, which PostgreSQL rejects."""
    found: str | None = _optional(value, name, str)
    if found is not None and "\0" in found:
        wrong(f'"{name}", a string without the character 0', found)
    return found


def _list_of(kind: type, value: JSON, name: str) -> list[Any] | None:
    found: list[Any] | None = _optional(value, name, list)
    if found is not None and not all(_is(kind, item) for item in found):
        wrong(f'"{name}" to be a list of {kind.__name__}', found)
    return found


def _optional(value: JSON, name: str, kind: type, default: Any = None) -> Any:
    found = value.get(name, default)
    if found is not None and not _is(kind, found):
        wrong(f'"{name}" to be a {kind.__name__}', found)
    return _text(found, name) if isinstance(found, str) else found


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # JSON's true is not a number
