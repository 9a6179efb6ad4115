"""Limits the connections of this process, since each one is an open file to the system."""

from __future__ import annotations

import errno
import logging
import os
import resource

logger = logging.getLogger(__name__)

SPARE = 32
"""Open files that are left to the rest of this process."""
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
TOO_MANY_FILES = (
    "too many open files: this process cannot open more connections; raise its limit (ulimit -n) or lower "
    "max_in_flight"
)


def most_connections(wanted: int, servers: int) -> int:
    """The connections per server: `wanted`, or as many as may be open. Raises the soft limit as needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/dev/fd")) + SPARE
    need = taken + wanted * servers
    if soft == resource.RLIM_INFINITY or need <= soft:
        return wanted
    limit = need if hard == resource.RLIM_INFINITY else min(need, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (ValueError, OSError):  # the system has further limits
        limit = soft
    most = max(1, min(wanted, (limit - taken) // servers))
    if most < wanted:
        logger.warning(
            "only %d of %d rows are in flight per server: this process may have %d files open; raise its "
            "limit (ulimit -n)", most, wanted, limit,
        )  # fmt: skip
    return most
