"""Waits that end with the flow that waits for them: a lost commit, an absent Prefect server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Never

import httpx
import pytest
from prefect import flow, task

from tests.conftest import IN_PREFECT
from tests.eventually import eventually
from vllm_tasks._prefect import commits
from vllm_tasks._prefect.commits import InPrefect
from vllm_tasks.errors import TablesUnavailable
from vllm_tasks.placement import grace

pytestmark = IN_PREFECT


def stopped_while(work: Callable[[], Any], until: Callable[[], object]) -> None:
    """Submit `work` in a flow that fails when `until` is true, and return when the flow has ended."""

    @task
    def waits() -> None:
        work()

    @flow
    def job() -> None:
        waits.submit()
        assert eventually(until)
        raise RuntimeError("the flow ends")

    with pytest.raises(RuntimeError, match="the flow ends"):
        job()


def test_a_lost_commit_is_not_tried_again_after_its_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit has been tried twice and would be tried again much later."""
    monkeypatch.setattr(commits, "RETRY_DELAYS", (0.0, *[3600.0] * len(commits.RETRY_DELAYS)))
    attempts: list[int] = []

    def lost() -> Never:
        attempts.append(len(attempts))
        raise TablesUnavailable("the disk is full")

    stopped_while(lambda: InPrefect("m", "p").commit("a group", lost), lambda: len(attempts) == 2)
    assert len(attempts) == 2


def test_an_absent_prefect_server_is_not_waited_for_after_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither between two attempts, nor within one to which the server does not respond."""
    monkeypatch.setattr(grace, "TRY_EVERY", 3600.0)
    attempts: list[str] = []
    hangs = threading.Event()

    def refused() -> Never:
        attempts.append("refused")
        raise httpx.ConnectError("refused")

    def silent() -> None:
        attempts.append("silent")
        hangs.wait()
        attempts.append("responded")

    stopped_while(lambda: grace.within_grace_period(refused), lambda: attempts)
    stopped_while(lambda: grace.within_grace_period(silent), lambda: len(attempts) == 2)
    assert attempts == ["refused", "silent"]
    hangs.set()
