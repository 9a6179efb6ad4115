"""The identity of a call's source that outputs store: a table's name, or a statement's hash.

It is a logical name, not a place: a lake or database that was moved with its outputs, or has another host
name, is still the same source, and so is a table named by its path. An edited statement is another source,
even if only its WHERE changed: only its author knows whether it returns the same rows under the same keys,
and answers must not silently be taken for those of other rows.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from urllib.parse import unquote, urlsplit

from vllm_tasks.datalayer import is_lake
from vllm_tasks.datalayer.sources.endings import ENDINGS
from vllm_tasks.datalayer.sql_tokens import tokens

LONGEST = 200
"""Maximum characters of a name that is kept unchanged."""
DEFAULT_SCHEMAS = {"postgresql": "public.", "sqlite": "main."}
FILE = re.compile(rf"(?P<table>.*[^/])\.(?:{'|'.join(ENDINGS)})(?:\.(?:gz|zst))?", re.I)
WHOLE_FOLDER = re.compile(r"(?P<folder>.*[^/])/(?:\*\*/)?\*(?:\.\w+)*")
"""A glob of all files in a folder: the same as the folder's own name."""


def source_id(select: str, url: str, source_url: str | None = None) -> str:
    """The table or path that `select` names, or `query-` and a hash of its statement.

    `url` is that of the datalayer with the outputs, `source_url` that of the one that is read, if it is
    another. In that case the last part of its path counts, too, since outputs do not move with it.
    """
    read = source_url or url
    name = f"query-{_hash(' '.join(tokens(select)))}" if is_statement(select) else _table(select, read)
    if source_url is None or place(source_url) == place(url):
        return name
    last = posixpath.basename(unquote(urlsplit(place(source_url)).path).rstrip("/"))
    return f"{last}/{name}" if last else name


def place(url: str) -> str:
    """A datalayer's URL in normal form: a folder or a database file is given by its absolute path."""
    url = url.strip()
    scheme, separator, path = url.partition(":///")
    if separator and scheme in ("sqlite", "duckdb"):
        return f"{scheme}:///{os.path.abspath(os.path.expanduser(path))}"
    return url.rstrip("/") if "://" in url else os.path.abspath(os.path.expanduser(url))


def is_statement(select: str) -> bool:
    """Whether `select` is SQL and not the name of a table, which may contain spaces."""
    found = tokens(select) if re.search(r"\s", select.strip()) else []
    return bool(found) and found[0].upper() in {"SELECT", "WITH", "FROM", "VALUES", "TABLE", "("}


def _table(select: str, url: str) -> str:
    name = select.strip()
    if is_lake(url):
        name = _path(name, url)
    else:
        name = name.removeprefix(DEFAULT_SCHEMAS.get(urlsplit(url).scheme.partition("+")[0], "\0"))
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 13]}-{_hash(name)}"


def _path(name: str, url: str) -> str:
    """A table, path or glob in a lake, relative to it and without the ending of a file."""
    for root in {url, os.path.abspath(os.path.expanduser(url)) if "://" not in url else url}:
        name = name.removeprefix(f"{root.rstrip('/')}/")
    name = posixpath.normpath(name)
    if match := WHOLE_FOLDER.fullmatch(name):
        return match["folder"]
    return match["table"] if (match := FILE.fullmatch(name)) else name


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
