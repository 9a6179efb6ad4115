"""What the URL of a server says: where it is, and which protocol it speaks."""

from __future__ import annotations

from urllib.parse import urlsplit

from vllm_tasks.engines import wire
from vllm_tasks.errors import InvalidCall


def split_urls(value: str | list[str]) -> tuple[tuple[str, ...], wire.Protocol]:
    """Base URLs of one or several servers (a list, or separated by commas) and their protocol.

    What a path has before the protocol's own belongs to the base, as behind a gateway. Raises
    `InvalidCall` for a URL without http(s) scheme or host, with a query, or for mixed protocols.
    """
    given = [u.strip() for u in (value.split(",") if isinstance(value, str) else value)]
    split = [_split_url(url) for url in given if url]
    protocols = {protocol for _, protocol in split}
    if len(protocols) > 1:
        raise InvalidCall(
            f"api_url {value!r} mixes the protocols {sorted(protocols)}; give all servers the same path"
        )
    return tuple(base for base, _ in split), protocols.pop() if protocols else "openai"


def _split_url(url: str) -> tuple[str, wire.Protocol]:
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:
        raise InvalidCall(f"api_url {url!r}: {error}; expected as in http://127.0.0.1:8000") from error
    if not complete:
        raise InvalidCall(f"api_url {url!r} needs a scheme and a host, as in http://127.0.0.1:8000")
    if "@" in parts.netloc:
        raise InvalidCall("api_url holds a user or password, which messages would show; use api_key")
    if parts.query or parts.fragment:
        raise InvalidCall(f"api_url {url!r} has a query or a fragment, which no request would carry")
    base = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
    path = next((known for known in wire.PATHS if known and base.endswith(known)), "")
    return base.removesuffix(path), wire.PATHS[path]
