"""A scripted server that answers with letters and their log-probabilities, as vLLM does for `Classes`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tests.servers.scripted_server import Asked, Reply, usual

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MASKED = -9999.0
"""How vLLM's server reports a token that cannot come."""


def of_letters(asked: Asked, weights: Sequence[float]) -> Reply:
    """The answer of a model that gives the letters these probabilities, in the protocol of the path."""
    reply = usual(asked)
    (choice,) = reply.body["choices"]
    logprobs = {letter: math.log(w) if w else MASKED for letter, w in zip(LETTERS, weights, strict=False)}
    most = asked.body.get("top_logprobs", asked.body["logprobs"])
    likeliest = sorted(logprobs, key=lambda letter: -logprobs[letter])[:most]
    text = likeliest[0]
    choice["finish_reason"] = "length"
    if "text" in choice:
        top = {letter: logprobs[letter] for letter in likeliest}
        choice |= {
            "text": text,
            "logprobs": {"tokens": [text], "token_logprobs": [logprobs[text]], "top_logprobs": [top]},
        }
        return reply
    top = [{"token": letter, "logprob": logprobs[letter]} for letter in likeliest]
    content = [{"token": text, "logprob": logprobs[text], "top_logprobs": top}]
    choice |= {"message": {"content": text}, "logprobs": {"content": content}}
    return reply


def lettered(weights_of: Callable[[str], Sequence[float]]) -> Callable[[Asked], Reply | None]:
    """A script: the model's probabilities of the letters follow from the prompt."""

    def script(asked: Asked) -> Reply | None:
        if asked.path not in ("/v1/completions", "/v1/chat/completions"):
            return None
        return of_letters(asked, weights_of(asked.prompt))

    return script


def by_words(known: dict[str, Any], otherwise: Sequence[float] = (0.5, 0.5)) -> Callable[[str], Any]:
    """Probabilities by a word of the prompt."""
    return lambda prompt: next((weights for word, weights in known.items() if word in prompt), otherwise)
