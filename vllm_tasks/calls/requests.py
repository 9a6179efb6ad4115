"""Requests as they are sent: texts as chat where the model needs it, and parameters that fit the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_tasks.calls.messages import conversation
from vllm_tasks.calls.sampling import Target, check_prompts
from vllm_tasks.errors import InvalidCall
from vllm_tasks.rows import Conversation, Request, RowError, is_chat


def requests_of(
    requests: Sequence[Request | RowError],
    chat: bool | None,
    system: str | None,
    sampling: Mapping[str, Any],
    target: Target,
    *,
    thinks: bool = True,
) -> list[Request | RowError]:
    """Return the requests as they are sent, each error with its position. With `chat`, texts become chat
    messages; with None, a conversation that is sent as its text if chat is refused. Unless it `thinks`, a
    model is asked not to, in chats.

    `sampling` are the parameters of the call; a request with others has parameters of its own. Raises
    `InvalidCall` if all have the same fault.
    """
    if chat is not False:
        requests = [_in_chat(r, chat, system) if isinstance(r, Request) else r for r in requests]
    prompts = [r.prompt for r in requests if isinstance(r, Request)]
    if chat is False and system is not None and any(isinstance(prompt, str) for prompt in prompts):
        raise InvalidCall(
            "system needs chat messages, and texts are sent as plain text (chat=False, or the model has no "
            "chat template): set chat=True, or put the words into the prompt"
        )
    check_prompts([prompt for prompt in prompts if not isinstance(prompt, Conversation)], sampling, target)
    checked = [_checked(r, sampling, target) for r in requests]
    if not thinks:
        checked = _without_thinking(checked)
    return [replace(r, index=i) if isinstance(r, RowError) else r for i, r in enumerate(checked)]


def _without_thinking(requests: Sequence[Request | RowError]) -> list[Request | RowError]:
    """Return the requests with chats that are answered at once, unless their parameters say otherwise."""
    made: dict[int, Mapping[str, Any]] = {}  # rows with equal parameters go on sharing them

    def at_once(request: Request | RowError) -> Request | RowError:
        if isinstance(request, RowError) or not is_chat(request.prompt):
            return request
        given = request.sampling.get("chat_template_kwargs") or {}
        quick = {**request.sampling, "chat_template_kwargs": {"enable_thinking": False, **given}}
        return replace(request, sampling=made.setdefault(id(request.sampling), quick))

    return [at_once(request) for request in requests]


def _in_chat(request: Request, chat: bool | None, system: str | None) -> Request:
    if not isinstance(request.prompt, str):
        return request
    messages = conversation(request.prompt, system)
    return replace(request, prompt=messages if chat else Conversation(messages, request.prompt))


def _checked(request: Request | RowError, sampling: Mapping[str, Any], target: Target) -> Request | RowError:
    """Return a request, or its error if it has own parameters that are for the other kind of prompt."""
    if isinstance(request, RowError) or request.sampling is sampling:
        return request
    if isinstance(request.prompt, Conversation):  # it may be sent as either kind
        return request
    try:
        check_prompts([request.prompt], request.sampling, target)
    except InvalidCall as error:
        return RowError("prompt", str(error))
    return request
