"""Chooses the backend of a URL."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError

from vllm_tasks.datalayer.database.backends import NO_URL, Backend
from vllm_tasks.datalayer.database.postgres import Postgres
from vllm_tasks.datalayer.database.sqlite import Sqlite
from vllm_tasks.errors import InvalidCall


def backend(url: str) -> Backend:
    """The backend of `url`, not connected yet; raises `InvalidCall`, which never contains the password."""
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
        # Danger: other drivers send a statement with its parameters filled in, and the server would then run
        # two statements in one text.
        raise InvalidCall(
            f"{made.drivername!r}: PostgreSQL needs the driver psycopg; write postgresql://, or "
            "postgresql+psycopg:// (pip install 'vllm-tasks[postgres]')"
        )
    return Postgres(made)
