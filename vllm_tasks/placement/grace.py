"""The grace period for a Prefect server that is down for a while, as in an update: no step fails for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

logger = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_PERIOD = 300.0
"""Seconds that Prefect's server may be down when a flow run is to be created or to report its outcome."""
TRY_EVERY = 2.0
"""Seconds between two attempts."""


def within_grace_period(work: Callable[[], T]) -> T:
    """Return `work()`, repeated while Prefect's server cannot be reached.

    `work` must be safe to repeat: its response may be lost after the server has done it. Prefect's own client
    retries only once it has reached the server.
    """
    until = time.monotonic() + GRACE_PERIOD
    while True:
        try:
            return work()
        except httpx.HTTPError as error:
            refused = isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error
            if refused or time.monotonic() > until:
                raise
            logger.warning("Prefect's server does not respond; trying again: %s", error or repr(error))
            time.sleep(TRY_EVERY)
