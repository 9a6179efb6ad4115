"""Requests as they are sent: texts as chat where the model needs it, and parameters that fit the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_tasks.calls.prompts import conversation
from vllm_tasks.calls.sampling import Target, check_prompts
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Request, RowError


def requests_of(
    requests: Sequence[Request | RowError],
    chat: bool | None,
    system: str | None,
    sampling: Mapping[str, Any],
    target: Target,
) -> list[Request | RowError]:
    """Return the requests as they are sent, each error with its position. With `chat`, texts become chat
    messages; with None they stay texts, and the work pool that processes them decides.

    `sampling` are the parameters of the call; a request with others has parameters of its own. Raises
    `InvalidCall` if all have the same fault.
    """
    if chat:
        requests = [_in_chat(r, system) if isinstance(r, Request) else r for r in requests]
    prompts = [r.prompt for r in requests if isinstance(r, Request)]
    if chat is False and system is not None and any(isinstance(prompt, str) for prompt in prompts):
        raise InvalidCall(
            "system needs chat messages, and texts are sent as plain text (chat=False, or the model has no "
            "chat template): set chat=True, or put the words into the prompt"
        )
    decided = [prompt for prompt in prompts if chat is not None or not isinstance(prompt, str)]
    check_prompts(decided, sampling, target)
    checked = (
        r if isinstance(r, RowError) or r.sampling is sampling else _checked(r, chat, target)
        for r in requests
    )
    return [replace(r, index=i) if isinstance(r, RowError) else r for i, r in enumerate(checked)]


def _in_chat(request: Request, system: str | None) -> Request:
    if not isinstance(request.prompt, str):
        return request
    return replace(request, prompt=conversation(request.prompt, system))


def _checked(request: Request, chat: bool | None, target: Target) -> Request | RowError:
    """Return a request with parameters of its own, or its error if they are for the other kind of prompt."""
    if chat is None and isinstance(request.prompt, str):
        return request
    try:
        check_prompts([request.prompt], request.sampling, target)
    except InvalidCall as error:
        return RowError("prompt", str(error))
    return request
