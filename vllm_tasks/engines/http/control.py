"""What a server says of itself: its health, its models, its version. Control calls, off the rows' way."""

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
"""Largest answer to a control call that is read."""

NO_TEMPLATE = re.compile(
    r"must provide a chat template|chat_template is not set|(no|not have a|without a|missing) chat.template",
    re.I,
)
"""How servers say that a model has no chat template: vLLM (of transformers 4.44 and later), those before it,
and what stands in front of them."""

Words = TypeVar("Words", str, bytes)


@dataclass(frozen=True)
class Key:
    """The bearer token, or none. It goes into the header and nowhere else."""

    secret: str | None = field(repr=False)

    def headers(self) -> dict[str, str]:
        """Raises `InvalidCall` for a key that a header cannot carry, such as one with a line end."""
        if not self.secret:
            return {}
        if not re.fullmatch("[!-~]+", self.secret):
            raise InvalidCall(
                "api_key has a space, a line end or another character that an HTTP header cannot carry; "
                "a key read from a file needs .strip()"
            )
        return {"Authorization": f"Bearer {self.secret}"}

    def hidden_in(self, words: Words) -> Words:
        """What a server said, without the key, should it have echoed it, as it is or as JSON has it."""
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
    """What a server says that it serves: all names, of which rows ask for `model` (None: not among them),
    and that one's `root` (its folder, or its own name)."""

    url: str
    names: tuple[str, ...]
    model: str | None
    root: str | None = None

    def __str__(self) -> str:
        return shown(self.names) + (f" ({self.root!r:.200})" if self.root else "")


class Control:
    """Control calls with this key."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.tls = ssl.create_default_context()  # for rows and control calls alike; obeys SSL_CERT_FILE

    async def check_health(self, url: str) -> None:
        """Raise `Unreachable` unless the server says that it is well, or has no /health."""
        status, _ = await self._ask(f"{url}/health")
        if status >= 500:
            raise Unreachable(f"HTTP {status} from {url}/health")

    async def served(self, url: str, model: str | None) -> Served | None:
        """What the server lists; None where the model is named and it lists nothing.

        Raises `InvalidCall` where none is named and the server lists none or several, `Unreachable` when it
        cannot tell now.
        """
        try:
            status, content = await self._ask(f"{url}/v1/models")
        except Unreachable as error:
            if model is not None:
                return None
            raise Unreachable(f"{error}; with model='...' it need not be asked") from error
        roots = models_in(json_in(self.key.hidden_in(content))) if status == 200 else {}
        names = tuple(roots)
        if model is not None:
            return Served(url, names, model if model in names else None) if names else None
        said = f"HTTP {status} from {url}/v1/models: {self.key.hidden_in(content)[:300]!r}"
        if status >= 500 or status in (408, 429):
            raise Unreachable(said)
        if not names:
            raise InvalidCall(
                f"the server does not tell its model; check api_url and api_key, or pass model='...' ({said})"
            )
        if len(names) > 1:
            raise InvalidCall(f"{url} serves {shown(names)}: say which is meant, model={names[0]!r:.200}")
        return Served(url, names, names[0], roots[names[0]])

    async def has_chat_template(self, url: str, model: str) -> bool | None:
        """Whether the server has a chat template for the model, None where it does not tell, as a gateway."""
        message = {"role": "user", "content": "Hello"}
        status, content = await self._ask(f"{url}/tokenize", {"model": model, "messages": [message]})
        told = json_in(content)
        if status == 200 and isinstance(told, dict) and told.get("count"):
            return True
        return False if status == 400 and lacks_template(content.decode(errors="replace")) else None

    async def facts(self, url: str, model: str) -> dict[str, str]:
        """The `root` of the model and the server's `version`, where it tells them."""
        root = models_in(await self._told(f"{url}/v1/models")).get(model)
        version = (await self._told(f"{url}/version")).get("version")
        known = {"root": root, "version": version}
        return {name: value for name, value in known.items() if isinstance(value, str) and value}

    async def _told(self, url: str) -> dict[str, Any]:
        """A JSON object, empty from a server that has none to give, or that cannot be reached for it.

        That does not count against the server: a gateway may let through only what rows need.
        """
        try:
            _, content = await self._ask(url)
        except Unreachable:
            return {}
        told = json_in(content)
        return told if isinstance(told, dict) else {}

    async def _ask(self, url: str, body: Any = None) -> tuple[int, bytes]:
        """Status and body of a control call, with a body a POST, on a connection of its own.

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
    """A JSON value, None for what is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def lacks_template(words: str) -> bool:
    """Whether a refusal is that the model has no chat template."""
    return NO_TEMPLATE.search(words) is not None


def models_in(told: Any) -> dict[str, str | None]:
    """The root, where told, of each model in an answer to /v1/models, by its name."""
    listed = told.get("data") if isinstance(told, dict) else None
    entries = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    roots = {e["id"]: e.get("root") for e in entries if isinstance(e.get("id"), str)}
    return {name: root if isinstance(root, str) else None for name, root in roots.items()}


def shown(names: tuple[str, ...]) -> str:
    """Names of models in an error, however many and long they are."""
    return ", ".join(f"{name!r:.200}" for name in names[:20]) + ", ..." * (len(names) > 20)


def untrusted(url: str, error: Exception) -> InvalidCall:
    """No encrypted connection comes about, and waiting would not help."""
    return InvalidCall(
        f"no encrypted connection to {url}: {error}; name the authority of its certificate in SSL_CERT_FILE, "
        "or correct api_url"
    )


def _why(error: aiohttp.ClientError) -> str:
    """The system's words where it has some ("Connection refused"), which aiohttp leaves out."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return f"{type(error).__name__}: {error}"
