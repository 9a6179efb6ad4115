"""Prompters, and the messages of records that become no prompt."""

from __future__ import annotations

from typing import Any

from vllm_tasks.calls.prompts import Prompter
from vllm_tasks.rows import RowError


def prompter(prompt: str = "{input}", **given: Any) -> Prompter:
    defaults: dict[str, Any] = {
        "prompt_func": None,
        "signature": "singleton",
        "chat": False,
        "system": None,
        "artifacts": {},
        "context": None,
    }
    return Prompter(prompt=prompt, **(defaults | given))


def refusal(made: object) -> str:
    assert isinstance(made, RowError), made
    assert made.kind == "prompt"
    assert not made.retryable
    return made.message
