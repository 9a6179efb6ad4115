"""How many connections this process may have open: each is a file to the system."""

from __future__ import annotations

import errno
import logging
import os
import resource

logger = logging.getLogger(__name__)

SPARE = 32
"""Files that are left to all others in this process."""
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
TOO_MANY_FILES = (
    "too many open files: this process may open no more connections; raise its limit (ulimit -n), or lower "
    "max_in_flight"
)


def most_connections(wanted: int, servers: int) -> int:
    """As many to each server as are `wanted`, or as may be open; the soft limit is raised as they need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/dev/fd")) + SPARE
    need = taken + wanted * servers
    if soft == resource.RLIM_INFINITY or need <= soft:
        return wanted
    limit = need if hard == resource.RLIM_INFINITY else min(need, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    except (ValueError, OSError):  # a system has limits of its own
        limit = soft
    most = max(1, min(wanted, (limit - taken) // servers))
    if most < wanted:
        logger.warning(
            "only %d of %d rows are in flight per server: this process may have %d files open; raise its "
            "limit (ulimit -n)", most, wanted, limit,
        )  # fmt: skip
    return most
