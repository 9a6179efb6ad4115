"""The folders and URIs that a site allows for the files that models, artifacts and tables name."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol

from vllm_tasks.errors import InvalidCall
from vllm_tasks.settings import site_settings

USERINFO = re.compile(r"://([^/\s@]*:\S*|[^/\s]*)@")
QUERY = re.compile(r"(://[^?#\s]*)[?#][^\s'\"]*")


def check_place(what: str, uri: str) -> None:
    """Raise `InvalidCall` for a file or folder outside the places that the site allows.

    A local path is checked after its links are followed, a URI by its beginning, segment by segment. A URI
    with `..` or `::` is in no place: `..` leads out of a folder, `::` into another filesystem.
    """
    places = site_settings().places
    if not places or any(_is_in(uri, place) for place in places):
        return
    raise InvalidCall(
        f"{what} {without_secrets(uri)!r:.200} is outside the places that this site allows, {places}; "
        "move it there, or have the site add its folder, or the beginning of its URI, to VLLM_TASKS_PLACES "
        "(a JSON list)"
    )


def without_secrets(text: str) -> str:
    """Return `text` with `scheme://user:password@host/path?query` as `scheme://host/path?...`.

    A password may have any characters: this function removes too much rather than leave a part of it.
    """
    return QUERY.sub(r"\1?...", USERINFO.sub("://", text))


def has_password(uri: str) -> bool:
    """Return whether a password follows the scheme: any text with a colon before an `@`."""
    found = USERINFO.search(uri)
    return found is not None and ":" in found[1]


def _is_in(uri: str, place: str) -> bool:
    if is_local(uri) and is_local(place):
        return _is_below(_real(uri), _real(place))
    if is_local(uri) or "::" in uri or ".." in unquote(uri).replace("\\", "/").split("/"):
        return False
    return _is_below(uri, place)


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")


def is_local(uri: str) -> bool:
    return get_protocol(uri) in ("file", "local")


def _real(path: str) -> str:
    return os.path.realpath(local_path(path))


def local_path(uri: str) -> str:
    """Return the path of a local URI."""
    return str(LocalFileSystem._strip_protocol(uri))
