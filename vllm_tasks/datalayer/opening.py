"""Opens the tables of a call: `select`, `source` and `db` as the caller gave them."""

from __future__ import annotations

import os
from typing import Any

from vllm_tasks.datalayer import Datalayer
from vllm_tasks.datalayer.arguments import check_folder, table_or_statement
from vllm_tasks.datalayer.selection import Tables
from vllm_tasks.datalayer.source_id import is_statement, place
from vllm_tasks.errors import InvalidCall

Store = Datalayer | str | os.PathLike[str]
"""A `Datalayer`, its URL or path, or (for a source) the name of a saved one."""


def open_tables(home: Datalayer, select: Any, source: Datalayer | None = None) -> tuple[Tables, str]:
    """Open the tables that `select` is read from, with outputs at `home`.

    Returns them and the name of `select`, a text or a table in memory that has Arrow's stream protocol.
    Raises `InvalidCall`.
    """
    from vllm_tasks.datalayer.sources import frames

    in_memory = frames.is_table(select)
    if in_memory and source is not None:
        raise InvalidCall("select is a table in memory, which has no source: leave source=... out")
    named = frames.display_name(select) if in_memory else table_or_statement(select)
    if not in_memory and (source is None or _same(source, home)):
        return home.tables(), named
    from vllm_tasks.datalayer.elsewhere import Elsewhere

    kept = home.tables()
    try:
        rows = frames.Frame(select) if in_memory or source is None else source.source(named)
    except BaseException:
        kept.close()
        raise
    return Elsewhere(rows, kept, named if source is None else source.shown(name_of(named))), named


def name_of(select: str) -> str:
    """The name of a table or path as it is; for a statement, a short hash."""
    from vllm_tasks.canonical import fingerprint

    return f"query-{fingerprint({'select': select})[:8]}" if is_statement(select) else select


def _same(one: Datalayer, other: Datalayer) -> bool:
    """Whether both read the same files or tables in the same way."""
    return place(one.url.get_secret_value()) == place(other.url.get_secret_value()) and one.read == other.read


def source_of(given: Store | None) -> Datalayer | None:
    """The `Datalayer` that `source=` names; raises `InvalidCall`."""
    if given is None or isinstance(given, Datalayer):
        return given
    if not isinstance(given, str | os.PathLike):
        raise InvalidCall(
            f"source=<{type(given).__name__}> must be a Datalayer, its URL or path, or a saved one's name"
        )
    text = os.fspath(given)
    if not text.strip():
        raise InvalidCall("source='' is empty: give a Datalayer, its URL or path, or the name of a saved one")
    check_folder(text, "source")
    is_path = isinstance(given, os.PathLike) or "://" in text or os.sep in text or os.path.isdir(text)
    return Datalayer(url=text) if is_path else saved(text)  # type: ignore[arg-type]  # pydantic makes the secret


def saved(name: str) -> Datalayer:
    """The saved `Datalayer` of this name; raises `InvalidCall`."""
    import httpx

    from vllm_tasks.datalayer.storage_errors import plain

    try:
        found = Datalayer.load(name)
    except (httpx.HTTPError, RuntimeError) as error:  # Prefect's own server raises RuntimeError
        raise InvalidCall(
            f"{name!r:.200} is not a folder here, and Prefect's server did not say whether it is a saved "
            f"Datalayer ({plain(error):.300}); set PREFECT_API_URL to a running server, or give a URL, or "
            "a path with a / in it"
        ) from error
    except (ValueError, httpx.InvalidURL) as error:
        raise InvalidCall(
            f"{name!r:.200} is neither a folder here nor the name of a saved Datalayer ({error}); give a "
            "path with a / in it, a URL, or save one: Datalayer(url=...).save(NAME)"
        ) from error
    assert isinstance(found, Datalayer), "called from synchronous code"
    return found
