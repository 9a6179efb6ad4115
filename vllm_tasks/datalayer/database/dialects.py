"""Which backend a URL means."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError

from vllm_tasks.datalayer.database.backends import NO_URL, Backend
from vllm_tasks.datalayer.database.postgres import Postgres
from vllm_tasks.datalayer.database.sqlite import Sqlite
from vllm_tasks.errors import InvalidCall


def backend(url: str) -> Backend:
    """Connects to nothing yet; raises `InvalidCall`, which never shows the password."""
    try:
        made = sa.make_url(url)
    except (ArgumentError, ValueError):
        raise InvalidCall(NO_URL) from None
    if made.get_backend_name() == "sqlite":
        return Sqlite(made)
    if made.drivername in ("postgresql", "postgres"):
        made = made.set(drivername="postgresql+psycopg")
    if made.get_backend_name() != "postgresql":
        return Backend(made)
    if made.drivername != "postgresql+psycopg":
        # Others send a statement with its parameters filled in, and the server runs two as gladly as one.
        raise InvalidCall(
            f"{made.drivername!r}: PostgreSQL is read by psycopg alone; write postgresql://, or "
            "postgresql+psycopg:// (pip install 'vllm-tasks[postgres]')"
        )
    return Postgres(made)
