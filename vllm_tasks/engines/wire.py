"""The three HTTP formats: a request becomes a JSON body, a JSON answer becomes a `Completion`.

Pure functions. Answers come from outside and are trusted in nothing: what is not as the protocol
promises raises `WrongShape`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Never

from vllm_tasks.rows import Choice, Completion, Request, TokenLogprob

Protocol = Literal["legacy", "completions", "chat", "openai"]
"""`openai` means completions or chat, as each prompt demands."""
PATHS: dict[str, Protocol] = {
    "/generate": "legacy",
    "/v1/completions": "completions",
    "/v1/chat/completions": "chat",
    "/v1": "openai",
    "": "openai",
}
"""What the path of a server's URL says."""
JSON = Mapping[str, Any]


class WrongShape(ValueError):
    """The answer is not what the protocol promises."""


def path_of(protocol: Protocol, request: Request) -> str:
    """The path under the server's base URL that answers `request`."""
    if protocol == "legacy":
        return "/generate"
    return "/v1/completions" if isinstance(request.prompt, str) else "/v1/chat/completions"


def body_of(request: Request, model: str | None) -> dict[str, Any]:
    """The JSON body; `model` is None for the legacy format, which has no such field."""
    named = {} if model is None else {"model": model}
    if isinstance(request.prompt, str):
        return {**named, "prompt": request.prompt, **request.sampling}
    return {**named, "messages": request.prompt, **request.sampling}


def parse(path: str, request: Request, answer: object) -> Completion:
    """The completion in `answer`, a decoded JSON value."""
    if not isinstance(answer, Mapping):
        wrong("an object", answer)
    wanted = request.sampling.get("n") or 1
    if path == "/generate":
        assert isinstance(request.prompt, str)
        return _legacy(answer, request.prompt, wanted)
    return _openai(answer, _text_choice if path == "/v1/completions" else _chat_choice, wanted)


def wrong(expected: str, got: object) -> Never:
    """Say what was expected and show the beginning of what came."""
    raise WrongShape(f"expected {expected}, the server sent {str(got)[:200]!r}")


def _legacy(answer: JSON, prompt: str, wanted: int) -> Completion:
    """`{"text": [prompt + completion, ...]}`, the format of the former `vllm.entrypoints.api_server`."""
    texts = answer.get("text")
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        wrong('"text", a list of strings', answer)
    _count(texts, wanted)
    if not all(t.startswith(prompt) for t in texts):
        wrong("each text to begin with the prompt", texts)
    return Completion(choices=tuple(Choice(text=t[len(prompt) :]) for t in texts))


def _openai(answer: JSON, choice_of: Callable[[JSON], Choice], wanted: int) -> Completion:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(c, Mapping) for c in choices):
        wrong('"choices", a list of objects', answer)
    _count(choices, wanted)
    usage = answer.get("usage") or {}
    if not isinstance(usage, Mapping):
        wrong('"usage", an object', usage)
    prompt_logprobs = answer.get("prompt_logprobs") or choices[0].get("prompt_logprobs")
    return Completion(
        choices=tuple(choice_of(c) for c in sorted(choices, key=_index)),
        prompt_tokens=_optional(usage, "prompt_tokens", int),
        completion_tokens=_optional(usage, "completion_tokens", int),
        prompt_logprobs=_prompt_logprobs(prompt_logprobs),
        model=_optional(answer, "model", str),
    )


def _text_choice(choice: JSON) -> Choice:
    text = choice.get("text")
    if not isinstance(text, str):
        wrong('"text", a string', choice)
    return Choice(
        text=text,
        finish_reason=_optional(choice, "finish_reason", str),
        token_ids=_optional(choice, "token_ids", list),
        logprobs=_text_logprobs(choice.get("logprobs")),
        reasoning=_optional(choice, "reasoning", str),
    )


def _chat_choice(choice: JSON) -> Choice:
    message = choice.get("message")
    if not isinstance(message, Mapping):
        wrong('"message", an object', choice)
    text = message.get("content")
    tool_calls = _optional(message, "tool_calls", list) or None
    reasoning = _optional(message, "reasoning", str) or _optional(message, "reasoning_content", str)
    if text is None and (tool_calls or reasoning):
        text = ""  # all tokens went into the calls or the reasoning
    if not isinstance(text, str):
        wrong('"content", a string', message)
    return Choice(
        text=text,
        finish_reason=_optional(choice, "finish_reason", str),
        token_ids=_optional(choice, "token_ids", list),
        logprobs=_chat_logprobs(choice.get("logprobs")),
        reasoning=reasoning,
        tool_calls=tool_calls,
    )


def _text_logprobs(value: Any) -> list[TokenLogprob] | None:
    if value is None:
        return None
    try:
        tops = value.get("top_logprobs") or [{}] * len(value["tokens"])
        rows = zip(value["tokens"], value["token_logprobs"], tops, strict=True)
        return [TokenLogprob(token, logprob, top or {}) for token, logprob, top in rows]
    except (AttributeError, KeyError, TypeError, ValueError):
        wrong('"logprobs" with "tokens" and "token_logprobs" of one length', value)


def _chat_logprobs(value: Any) -> list[TokenLogprob] | None:
    if value is None:
        return None
    try:
        return [
            TokenLogprob(
                t["token"],
                t["logprob"],
                {top["token"]: top["logprob"] for top in t.get("top_logprobs") or ()},
            )
            for t in value.get("content") or ()
        ]
    except (AttributeError, KeyError, TypeError):
        wrong('"logprobs" with "content", a list of tokens', value)


def _prompt_logprobs(value: Any) -> list[TokenLogprob | None] | None:
    """vLLM's `prompt_logprobs`: per prompt token `{token_id: {logprob, decoded_token, rank}}`.

    The first entry of each is the prompt's own token; the first token of a prompt has None.
    """
    if value is None:
        return None
    try:
        return [_prompt_token(entry) for entry in value]
    except (AttributeError, KeyError, TypeError, StopIteration):
        wrong('"prompt_logprobs", a list of objects', value)


def _prompt_token(entry: Mapping[str, Any] | None) -> TokenLogprob | None:
    if entry is None:
        return None
    own = next(iter(entry.values()))
    return TokenLogprob(
        own["decoded_token"], own["logprob"], {t["decoded_token"]: t["logprob"] for t in entry.values()}
    )


def _count(choices: list[Any], wanted: int) -> None:
    if len(choices) != wanted:
        wrong(f"{wanted} choice(s)", choices)


def _index(choice: JSON) -> int:
    index = choice.get("index", 0)
    return index if isinstance(index, int) else wrong('"index", a whole number', choice)


def _optional(value: JSON, name: str, kind: type) -> Any:
    found = value.get(name)
    if found is not None and not isinstance(found, kind):
        wrong(f'"{name}" to be a {kind.__name__}', found)
    return found
