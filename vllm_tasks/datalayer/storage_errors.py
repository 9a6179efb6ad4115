"""Errors of delta-rs, DuckDB and fsspec as the package's own, in plain words and without credentials."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import duckdb
import pyarrow as pa
from deltalake.exceptions import CommitFailedError, DeltaError, DeltaProtocolError

from vllm_tasks.errors import InvalidCall, TablesUnavailable
from vllm_tasks.places import without_secrets

COLOURS = re.compile("\x1b\\[[0-9;]*m|↳")
"""Terminal colours and arrows in errors of delta-rs."""
REMOTE = re.compile(r"(\w+ Error: )?Traceback \(.*?\n(?P<words>\S[^\n]*)", re.DOTALL)
"""DuckDB's error when an fsspec filesystem fails: a traceback that ends with the filesystem's message."""
PYTHON = " Detail: Python exception: "
"""The words before the traceback that Arrow appends to an error of ours in a stream."""
SAID_BY_DUCKDB = re.compile(r"([A-Z]\w+ )+Error: ")
TEMPORARY = re.compile(
    "^(IO|HTTP|Out of Memory|INTERRUPT|Connection) Error"
    "|^Invalid Input Error: reading the stream registered as .* failed: IOError"
    "|^External error: .*Object Store error: "
)
"""Temporary errors of DuckDB: its own, and those of files that Arrow reads for it."""
UNSUPPORTED = re.compile("Unsupported: |Invalid protocol|[Cc]atalog version|Unsupported table features")
"""Parts of delta-rs's errors about a table whose format it does not support."""
DENIED = re.compile("permission denied|access ?denied|forbidden|read-?only ?file ?system", re.IGNORECASE)


def plain(error: BaseException) -> str:
    """The message of an error on one line, without credentials in URLs."""
    words = str(error)
    if match := REMOTE.match(words):
        words = match["words"]
    words = " ".join(COLOURS.sub("", words).split()).partition(PYTHON)[0]
    return without_secrets(words) or type(error).__name__


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Translate errors of files, delta-rs, Arrow and DuckDB into ours, with their own messages.

    Each library passes on the others' errors as its own, so only the messages distinguish them. Everything
    is temporary except refused access and DuckDB's errors about a statement or the contents of a file.
    """
    try:
        yield
    except CommitFailedError:
        raise
    except (DeltaError, OSError, duckdb.Error, pa.ArrowException) as e:
        words = plain(e)
        if isinstance(e, PermissionError) or DENIED.search(words):
            raise InvalidCall(f"{doing}: not allowed: {words}") from e
        raise (InvalidCall if _is_permanent(e, words) else TablesUnavailable)(f"{doing}: {words}") from e


def _is_permanent(error: Exception, words: str) -> bool:
    if isinstance(error, DeltaProtocolError) or (isinstance(error, DeltaError) and UNSUPPORTED.search(words)):
        return True
    if isinstance(error, DeltaError) or REMOTE.match(str(error)) or TEMPORARY.search(words):
        return False
    # A failure in the middle of a stream arrives as Arrow's OSError with DuckDB's message.
    return not isinstance(error, OSError) or bool(SAID_BY_DUCKDB.match(words))
