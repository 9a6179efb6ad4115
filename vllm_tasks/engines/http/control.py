"""Control calls: requests to a server for its health, models and version, apart from those for rows."""

from __future__ import annotations

import json
import os
import re
import ssl
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from vllm_tasks.engines.http.failures import Unreachable
from vllm_tasks.errors import InvalidCall

CONTROL_TIMEOUT = 10.0
"""Seconds for a control call (health, models)."""
CONTROL_BYTES = 2**20
"""Bytes of the response to a control call that are read."""

NO_TEMPLATE = re.compile(
    r"must provide a chat template|chat_template is not set|(no|not have a|without a|missing) chat.template",
    re.I,
)
"""The words for a model without a chat template: those of vLLM (with transformers 4.44 and later), of earlier
versions, and of gateways."""

Words = TypeVar("Words", str, bytes)


@dataclass(frozen=True)
class Key:
    """The bearer token, or none. It is sent in the header and appears nowhere else."""

    secret: str | None = field(repr=False)

    def headers(self) -> dict[str, str]:
        """The header for a request. Raises `InvalidCall` for a key that a header cannot carry."""
        if not self.secret:
            return {}
        if not re.fullmatch("[!-~]+", self.secret):
            raise InvalidCall(
                "api_key has a space, a line end or another character that an HTTP header cannot carry; "
                "a key read from a file needs .strip()"
            )
        return {"Authorization": f"Bearer {self.secret}"}

    def hidden_in(self, words: Words) -> Words:
        """The words of a server without the key, which it may have echoed, verbatim or as JSON."""
        if not self.secret:
            return words
        if isinstance(words, bytes):
            return self.hidden_in(words.decode("latin1")).encode("latin1")
        in_json = json.dumps(self.secret)[1:-1]
        for form in (self.secret, in_json, in_json.replace("/", r"\/")):
            words = words.replace(form, "***")
        return words


@dataclass(frozen=True)
class Served:
    """The models that a server lists: all `names`, the `model` that rows use (None: it is not listed) and the
    `root` of that model (its folder, or its own name)."""

    url: str
    names: tuple[str, ...]
    model: str | None
    root: str | None = None

    def __str__(self) -> str:
        return rendered(self.names) + (f" ({self.root!r:.200})" if self.root else "")


class Control:
    """Sends control calls with one key."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.tls = ssl.create_default_context()  # for rows and control calls; obeys SSL_CERT_FILE

    async def check_health(self, url: str) -> None:
        """Raise `Unreachable` unless the server is healthy or has no /health."""
        status, _ = await self._send(f"{url}/health")
        if status >= 500:
            raise Unreachable(f"HTTP {status} from {url}/health")

    async def served(self, url: str, model: str | None) -> Served | None:
        """The models that the server lists; None if `model` is given and the server lists nothing.

        Raises `InvalidCall` if `model` is None and the server lists none or several, `Unreachable` if it
        cannot respond now.
        """
        try:
            status, content = await self._send(f"{url}/v1/models")
        except Unreachable as error:
            if model is not None:
                return None
            raise Unreachable(f"{error}; pass model='...' to skip this request") from error
        roots = models_in(json_in(self.key.hidden_in(content))) if status == 200 else {}
        names = tuple(roots)
        if model is not None:
            return Served(url, names, model if model in names else None) if names else None
        reply = f"HTTP {status} from {url}/v1/models: {self.key.hidden_in(content)[:300]!r}"
        if status >= 500 or status in (408, 429):
            raise Unreachable(reply)
        if not names:
            raise InvalidCall(
                f"{url} does not report its model; check api_url and api_key, or pass model='...' ({reply})"
            )
        if len(names) > 1:
            raise InvalidCall(f"{url} serves {rendered(names)}: choose one, as in model={names[0]!r:.200}")
        return Served(url, names, names[0], roots[names[0]])

    async def has_chat_template(self, url: str, model: str) -> bool | None:
        """Whether the server has a chat template for the model; None if unknown, as behind a gateway."""
        message = {"role": "user", "content": "Hello"}
        status, content = await self._send(f"{url}/tokenize", {"model": model, "messages": [message]})
        found = json_in(content)
        if status == 200 and isinstance(found, dict) and found.get("count"):
            return True
        return False if status == 400 and lacks_template(content.decode(errors="replace")) else None

    async def facts(self, url: str, model: str) -> dict[str, str]:
        """The `root` of the model and the server's `version`, as far as the server reports them."""
        root = models_in(await self._get(f"{url}/v1/models")).get(model)
        version = (await self._get(f"{url}/version")).get("version")
        known = {"root": root, "version": version}
        return {name: value for name, value in known.items() if isinstance(value, str) and value}

    async def _get(self, url: str) -> dict[str, Any]:
        """The JSON object at `url`; an empty one if the server has none or cannot be reached.

        A failure does not count against the server, because a gateway may pass on only the paths of rows.
        """
        try:
            _, content = await self._send(url)
        except Unreachable:
            return {}
        found = json_in(content)
        return found if isinstance(found, dict) else {}

    async def _send(self, url: str, body: Any = None) -> tuple[int, bytes]:
        """Send a control call (a POST with `body`) on a connection of its own; returns status and body.

        Redirects are not followed: the key must not travel to another host.
        """
        connector = aiohttp.TCPConnector(ssl=self.tls)
        timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.request(
                    "GET" if body is None else "POST", url, json=body, headers=self.key.headers(),
                    allow_redirects=False,
                ) as response,
            ):  # fmt: skip
                content = bytearray()
                async for part in response.content.iter_any():
                    content += part
                    if len(content) >= CONTROL_BYTES:
                        break
                return response.status, bytes(content)
        except TimeoutError as error:
            raise Unreachable(f"no answer from {url} within {CONTROL_TIMEOUT:g} s") from error
        except aiohttp.ClientSSLError as error:
            raise untrusted(url, error) from error
        except aiohttp.ClientError as error:
            raise Unreachable(f"no answer from {url}: {self.key.hidden_in(_why(error))}") from error


def json_in(content: bytes) -> Any:
    """The decoded JSON value, or None if `content` is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def lacks_template(words: str) -> bool:
    """Whether a refusal says that the model has no chat template."""
    return NO_TEMPLATE.search(words) is not None


def models_in(listing: Any) -> dict[str, str | None]:
    """The root (None: not given) of each model in a response to /v1/models, by the model's name."""
    listed = listing.get("data") if isinstance(listing, dict) else None
    entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    roots = {e["id"]: e.get("root") for e in entries if isinstance(e.get("id"), str)}
    return {name: root if isinstance(root, str) else None for name, root in roots.items()}


def rendered(names: tuple[str, ...]) -> str:
    """The names of models for an error message, bounded in number and length."""
    return ", ".join(f"{name!r:.200}" for name in names[:20]) + ", ..." * (len(names) > 20)


def untrusted(url: str, error: Exception) -> InvalidCall:
    """The error for a certificate that is not trusted, which waiting would not solve."""
    return InvalidCall(
        f"no encrypted connection to {url}: {error}; name the authority of its certificate in SSL_CERT_FILE, "
        "or correct api_url"
    )


def _why(error: aiohttp.ClientError) -> str:
    """The system's own message if it has one ("Connection refused"), which aiohttp leaves out."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return f"{type(error).__name__}: {error}"
