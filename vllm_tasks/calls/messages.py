"""Chat messages and token ids: how they are told apart, and what is added to the messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from vllm_tasks.calls.prompt_func import described, is_tuple
from vllm_tasks.calls.template import BadRow
from vllm_tasks.rows import Message, Prompt, is_chat


def is_messages(x: object) -> bool:
    """Return whether `x` is a non-empty list of chat messages: mappings with a `role`."""
    return (
        is_tuple(x)
        and len(x) > 0
        and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in x)
    )


def is_token_ids(x: object) -> TypeGuard[Sequence[int]]:
    """Return whether `x` is a non-empty list of token ids: whole numbers."""
    return is_tuple(x) and len(x) > 0 and all(type(token) is int for token in x)


def conversation(text: str, system: str | None) -> list[Message]:
    """Return a text as a user message, after the system message if there is one."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def with_user_content(messages: list[Message], change: Callable[[Any], Any], missing: str) -> list[Message]:
    """Return chat messages in which `change` has made another content of that of the last user message.

    Raises `BadRow` with the words `missing` if there is none.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise BadRow(missing)
    changed = {**messages[last], "content": change(messages[last].get("content"))}
    return [*messages[:last], changed, *messages[last + 1 :]]


def ended(prompt: Prompt, ending: str) -> Prompt:
    """Return a prompt with `ending` after its text, or after that of its last user message."""
    if not ending:
        return prompt
    if isinstance(prompt, str):
        return f"{prompt}\n\n{ending}"
    if not is_chat(prompt):
        raise BadRow("the prompt is token ids, at whose end the classes cannot be listed as text")

    def more(content: Any) -> Any:
        if isinstance(content, list):
            return [*content, {"type": "text", "text": ending}]
        if isinstance(content, str):
            return f"{content}\n\n{ending}"
        raise BadRow(f"the content of the last user message is {described(content)}, not a text or parts")

    return with_user_content(
        prompt, more, "the messages have no user message, at whose end the classes would be listed"
    )
