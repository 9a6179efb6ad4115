"""Fixtures for calls with functions and types of the tests' own."""

from __future__ import annotations

import pytest


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callables and schemas by path may come from the tests."""
    monkeypatch.setenv("VLLM_TASKS_CALLABLE_PREFIXES", '["vllm_tasks", "tests"]')
