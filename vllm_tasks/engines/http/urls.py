"""Reads the endpoint and the protocol of a server from its URL."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from vllm_tasks.engines import wire
from vllm_tasks.engines.http.proxies import sent_through
from vllm_tasks.errors import InvalidCall

VERSION = re.compile(r"/v\d+$")
"""The version of an API at the end of a base URL, as in /v1 or /api/v3."""
SECRET = re.compile(
    r"(?i)(^|[-_.])(key|token|secret|sig|signature|pass|passwd|password|passphrase|pwd|pw|auth|authorization"
    r"|bearer|code|credentials?|jwt|sas|session|session_?id)$|apikey$"
)
"""Names of query parameters whose values are secrets."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server is reached. As a text it is the server's base URL, without the query."""

    server: str
    """The base of the paths that only vLLM has, such as /health."""
    api: str
    """The base of the paths of OpenAI's protocol: that of vLLM is `server` and /v1."""
    query: str = field(default="", repr=False)
    proxy: str | None = field(default=None, repr=False)
    """The URL of the proxy on the way, perhaps with its password."""

    @functools.cached_property
    def through(self) -> dict[str, Any]:
        """The options of an aiohttp request that goes through the proxy."""
        return sent_through(self.proxy)

    def url_of(self, path: str) -> str:
        """The URL of one of vLLM's paths, such as /v1/models, as it is requested."""
        return f"{self.shown(path)}?{self.query}" if self.query else self.shown(path)

    def shown(self, path: str) -> str:
        """The same URL for messages."""
        return self.api + path.removeprefix("/v1") if path.startswith("/v1/") else self.server + path

    def __str__(self) -> str:
        return self.server


def split_urls(value: str | list[str]) -> tuple[tuple[Endpoint, ...], wire.Protocol]:
    """Split URLs (a list, or separated by commas) into the servers' endpoints and their protocol.

    A path in front of the protocol's own is part of the base URL, as behind a gateway. Raises
    `InvalidCall` for a URL without http(s) scheme or host, with a secret, or for mixed protocols.
    """
    given = [u.strip() for u in (value.split(",") if isinstance(value, str) else value)]
    split = [_split_url(url) for url in given if url]
    protocols = {protocol for _, protocol in split}
    if len(protocols) > 1:
        redacted = [_redacted(url) for url in given]
        raise InvalidCall(
            f"api_url {redacted} mixes the protocols {sorted(protocols)}; give all servers the same path"
        )
    return tuple(endpoint for endpoint, _ in split), protocols.pop() if protocols else "openai"


def _split_url(url: str) -> tuple[Endpoint, wire.Protocol]:
    if "@" in url.partition("?")[0]:
        raise InvalidCall(
            f"api_url {_redacted(url)!r} contains a user or password, which messages would show; use "
            "basic_auth='user:password'"
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
    if parts.fragment:
        raise InvalidCall(f"api_url {_redacted(url)!r} has a fragment, which no request carries")
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if SECRET.search(name):
            raise InvalidCall(
                f"api_url {_redacted(url)!r} has {name!r} in its query, which a block would keep in readable "
                "form: send it as a header, headers={...}, or as api_key"
            )
    path = parts.path.rstrip("/")
    known = next(known for known in wire.PATHS if path.endswith(known))
    base = f"{parts.scheme}://{parts.netloc}"
    return _endpoint(base, path.removesuffix(known), known, parts.query), wire.PATHS[known]


def _endpoint(base: str, root: str, known: str, query: str) -> Endpoint:
    """The endpoint at `root`, a path from which the protocol's own, `known`, is removed.

    /v1 stands between the two where neither a version of the API nor a complete path says otherwise.
    """
    server = VERSION.sub("", root)
    if known == "/generate" or (not known and server == root):
        return Endpoint(base + root, f"{base}{root}/v1", query)
    return Endpoint(base + server, base + root, query)


def _redacted(url: str) -> str:
    """A URL for an error message, without the parts that may contain a password or a key."""
    return re.sub("[?#].*", "?...", re.sub(".*@", "...@", url), flags=re.DOTALL)


def origins(endpoints: Iterable[Endpoint]) -> set[tuple[str, str | None, int | None]]:
    """The scheme, host and port of each endpoint."""
    split = [urlsplit(endpoint.server) for endpoint in endpoints]
    ports = {"http": 80, "https": 443}
    return {(parts.scheme, parts.hostname, parts.port or ports[parts.scheme]) for parts in split}
