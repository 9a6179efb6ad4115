"""Reads the base URL and the protocol of a server from its URL."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from vllm_tasks.engines import wire
from vllm_tasks.errors import InvalidCall


def split_urls(value: str | list[str]) -> tuple[tuple[str, ...], wire.Protocol]:
    """Split URLs (a list, or separated by commas) into the servers' base URLs and their protocol.

    A path in front of the protocol's own is part of the base URL, as behind a gateway. Raises
    `InvalidCall` for a URL without http(s) scheme or host, with a query, or for mixed protocols.
    """
    given = [u.strip() for u in (value.split(",") if isinstance(value, str) else value)]
    split = [_split_url(url) for url in given if url]
    protocols = {protocol for _, protocol in split}
    if len(protocols) > 1:
        redacted = [_redacted(url) for url in given]
        raise InvalidCall(
            f"api_url {redacted} mixes the protocols {sorted(protocols)}; give all servers the same path"
        )
    return tuple(base for base, _ in split), protocols.pop() if protocols else "openai"


def _split_url(url: str) -> tuple[str, wire.Protocol]:
    if "@" in url:
        raise InvalidCall(
            f"api_url {_redacted(url)!r} contains a user or password, which messages would show; use api_key"
        )
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")  # as the name look-up does later
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise InvalidCall(
            f"api_url {_redacted(url)!r}: {error}; expected a URL such as http://127.0.0.1:8000"
        ) from error
    if not complete:
        raise InvalidCall(f"api_url {_redacted(url)!r} needs a scheme and a host: http://127.0.0.1:8000")
    if parts.query or parts.fragment:
        raise InvalidCall(f"api_url {_redacted(url)!r} has a query or a fragment, which no request carries")
    path = parts.path.rstrip("/")
    known = next(known for known in wire.PATHS if path.endswith(known))
    return f"{parts.scheme}://{parts.netloc}{path.removesuffix(known)}", wire.PATHS[known]


def _redacted(url: str) -> str:
    """A URL for an error message, without the parts that may contain a password or a key."""
    return re.sub("[?#].*", "?...", re.sub(".*@", "...@", url), flags=re.DOTALL)


def origins(urls: Iterable[str]) -> set[tuple[str, str | None, int | None]]:
    """The scheme, host and port of each base URL."""
    split = [urlsplit(url) for url in urls]
    ports = {"http": 80, "https": 443}
    return {(parts.scheme, parts.hostname, parts.port or ports[parts.scheme]) for parts in split}
