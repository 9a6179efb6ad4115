"""A Prefect server that is away for a while, as in an update, ends no step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

logger = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_PERIOD = 300.0
"""Seconds that Prefect's server may be away when a flow run is to be made, or tells what became of it."""
TRY_EVERY = 2.0


def within_grace_period(work: Callable[[], T]) -> T:
    """`work()`, again while nobody answers for Prefect; its client itself waits for a server that it has met.

    `work` may have been done when its answer is lost: doing it again must do no harm.
    """
    until = time.monotonic() + GRACE_PERIOD
    while True:
        try:
            return work()
        except httpx.HTTPError as error:
            refused = isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error
            if refused or time.monotonic() > until:
                raise
            logger.warning("Prefect's server does not answer, and is waited for: %s", error or repr(error))
            time.sleep(TRY_EVERY)
