"""Control calls: requests to a server for its health, models and version, apart from those for rows."""

from __future__ import annotations

import json
import os
import re
import ssl
from dataclasses import dataclass
from typing import Any

import aiohttp

from vllm_tasks.engines.http.credentials import Credentials
from vllm_tasks.engines.http.failures import MENDED_BY, Unreachable, may_pass
from vllm_tasks.engines.http.urls import Endpoint
from vllm_tasks.errors import InvalidCall

CONTROL_TIMEOUT = 10.0
"""Seconds for a control call (health, models)."""
CONTROL_BYTES = 2**20
"""Bytes of the response to a control call that are read."""
MODELS, VERSION = "/v1/models", "/version"
STRUCTURED, STRUCTURED_SINCE = "structured_outputs", (0, 12)
"""A sampling parameter, and the version of vLLM before which servers silently ignored it."""

NO_TEMPLATE = re.compile(
    r"must provide a chat template|chat_template is not set|(no|not have a|without a|missing) chat.template",
    re.I,
)
"""The words for a model without a chat template: those of vLLM (with transformers 4.44 and later), of earlier
versions, and of gateways."""


@dataclass(frozen=True)
class Served:
    """The models that a server lists: all `names` and the `root` of the model (its folder, or its own name)
    as messages show them, and the `model` that rows use (None: it is not listed)."""

    endpoint: Endpoint
    names: tuple[str, ...]
    model: str | None
    root: str | None = None

    def __str__(self) -> str:
        return rendered(self.names) + (f" ({self.root!r:.200})" if self.root else "")


class Control:
    """Sends control calls with the same credentials."""

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials
        self.tls = ssl.create_default_context()  # for rows and control calls; obeys SSL_CERT_FILE
        self._is_vllm: dict[Endpoint, bool] = {}  # by the last list of models of each server

    async def check_health(self, endpoint: Endpoint) -> None:
        """Raise `Unreachable` unless the server is healthy or has no /health."""
        status, _ = await self._send(endpoint, "/health")
        if status >= 500:
            raise Unreachable(f"HTTP {status} from {endpoint.shown('/health')}")

    async def served(self, endpoint: Endpoint, model: str | None) -> Served | None:
        """The models that the server lists; None if `model` is given and the server lists nothing.

        Raises `InvalidCall` if `model` is None and the server lists none or several, `Unreachable` if it
        cannot respond now.
        """
        try:
            status, content = await self._listing(endpoint)
        except Unreachable as error:
            if model is not None:
                return None
            raise Unreachable(f"{error}; pass model='...' to skip this request") from error
        roots = models_in(json_in(content)) if status == 200 else {}
        # For messages alone: a key such as "x" is part of many names, and requests have them as they are.
        names = tuple(map(self.credentials.hidden_in, roots))
        if model is not None:
            return Served(endpoint, names, model if model in roots else None) if names else None
        reply = f"HTTP {status} from {endpoint.shown(MODELS)}: {self.credentials.hidden_in(content)[:300]!r}"
        if may_pass(status):
            raise Unreachable(reply)
        if not names:
            raise InvalidCall(
                f"{endpoint} does not report its model; check api_url and api_key, or pass "
                f"model='...' ({reply})"
            )
        if len(names) > 1:
            raise InvalidCall(
                f"{endpoint} serves {rendered(names)}: choose one, as in model={names[0]!r:.200}"
            )
        ((only, root),) = roots.items()
        return Served(endpoint, names, only, root and self.credentials.hidden_in(root))

    async def has_chat_template(self, endpoint: Endpoint, model: str) -> bool | None:
        """Whether the server has a chat template for the model; None if unknown, as behind a gateway.

        Only vLLM is asked, because another server may take the message for a prompt.
        """
        if endpoint not in self._is_vllm:
            await self._listing(endpoint)
        if not self._is_vllm.get(endpoint):
            return None
        message = {"role": "user", "content": "Hello"}
        status, content = await self._send(endpoint, "/tokenize", {"model": model, "messages": [message]})
        found = json_in(content)
        if status == 200 and isinstance(found, dict) and found.get("count"):
            return True
        return False if status == 400 and lacks_template(content.decode(errors="replace")) else None

    async def check_served(self, endpoint: Endpoint, model: str, max_tokens: int | None) -> None:
        """Raise `InvalidCall` if the server is a vLLM that lacks the model, or whose context is shorter than
        an answer may be. Another server, such as a gateway, may serve more than it lists."""
        status, content = await self._listing(endpoint)
        if status != 200 or not self._is_vllm[endpoint]:
            return
        cards = {card["id"]: card for card in cards_in(json_in(content)) if isinstance(card.get("id"), str)}
        if model not in cards:
            raise InvalidCall(
                f"{endpoint} serves {rendered(tuple(map(self.credentials.hidden_in, cards)))}, and the model "
                f"{model!r:.200} does not exist there; check api_url and model"
            )
        longest = cards[model].get("max_model_len")
        if max_tokens is not None and isinstance(longest, int) and max_tokens > longest:
            raise InvalidCall(
                f"max_tokens={max_tokens} cannot be greater than max_model_len={longest} at {endpoint}: vLLM "
                "refuses every such row; lower max_tokens, or start vLLM with a larger --max-model-len"
            )

    async def facts(self, endpoint: Endpoint, model: str) -> dict[str, str]:
        """The `root` of the model and the server's `version`, as far as the server reports them."""
        root = models_in(await self._get(endpoint, MODELS)).get(model)
        version = (await self._get(endpoint, VERSION)).get("version")
        known = {"root": root, "version": version}
        return {name: value for name, value in known.items() if isinstance(value, str) and value}

    async def vllm_version(self, endpoint: Endpoint) -> str | None:
        """The version of vLLM; None if the server cannot respond now or is something else, such as a gateway,
        which may have a version of its own."""
        try:
            await self._listing(endpoint)
        except Unreachable:
            return None
        version = (await self._get(endpoint, VERSION)).get("version") if self._is_vllm.get(endpoint) else None
        return version if isinstance(version, str) else None

    async def check_structure(self, endpoint: Endpoint) -> None:
        """Raise `InvalidCall` if the server is a vLLM that ignores `structured_outputs`."""
        version = await self.vllm_version(endpoint)
        if version and (release_of(version) or STRUCTURED_SINCE) < STRUCTURED_SINCE:
            raise InvalidCall(
                f"{endpoint} runs vLLM {version}, which ignores {STRUCTURED}: update it to vLLM 0.12 or "
                "later, or use output_schema or response_format"
            )

    async def _listing(self, endpoint: Endpoint) -> tuple[int, bytes]:
        """The status and content of the server's list of models, which tells whether it is vLLM."""
        status, content = await self._send(endpoint, MODELS)
        if status == 200:
            cards = cards_in(json_in(content))
            self._is_vllm[endpoint] = "vllm" in [card.get("owned_by") for card in cards]
        return status, content

    async def _get(self, endpoint: Endpoint, path: str) -> dict[str, Any]:
        """The JSON object at `path`; an empty one if the server has none or cannot be reached.

        A failure does not count against the server, because a gateway may pass on only the paths of rows.
        """
        try:
            _, content = await self._send(endpoint, path)
        except Unreachable:
            return {}
        found = json_in(content)
        return found if isinstance(found, dict) else {}

    async def _send(self, endpoint: Endpoint, path: str, body: Any = None) -> tuple[int, bytes]:
        """Send a control call (a POST with `body`) on a connection of its own; returns status and body.

        Redirects are not followed: the credentials must not travel to another host.
        """
        url = endpoint.shown(path)
        connector = aiohttp.TCPConnector(ssl=self.tls)
        timeout = aiohttp.ClientTimeout(total=CONTROL_TIMEOUT)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.request(
                    "GET" if body is None else "POST", endpoint.url_of(path), json=body,
                    headers=self.credentials.headers(), allow_redirects=False, **endpoint.through,
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
        except aiohttp.ClientHttpProxyError as error:
            raise of_proxy(url, error) from None
        except aiohttp.ClientSSLError as error:
            raise untrusted(url, error) from error
        except aiohttp.ClientError as error:
            raise Unreachable(f"no answer from {url}: {self.credentials.hidden_in(_why(error))}") from error


def release_of(version: str) -> tuple[int, int] | None:
    """(0, 12) of "0.12.1"; None for a build of no release, such as "0.1.dev1", whose numbers say nothing."""
    found = re.match(r"(\d+)\.(\d+)(?!.*dev)", version)
    return (int(found[1]), int(found[2])) if found else None


def json_in(content: bytes) -> Any:
    """The decoded JSON value, or None if `content` is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def lacks_template(words: str) -> bool:
    """Whether a refusal says that the model has no chat template."""
    return NO_TEMPLATE.search(words) is not None


def cards_in(listing: Any) -> list[dict[str, Any]]:
    """The models in a response to /v1/models, as far as it has the form of one."""
    listed = listing.get("data") if isinstance(listing, dict) else None
    return [card for card in listed if isinstance(card, dict)] if isinstance(listed, list) else []


def models_in(listing: Any) -> dict[str, str | None]:
    """The root (None: not given) of each model in a response to /v1/models, by the model's name."""
    roots = {c["id"]: c.get("root") for c in cards_in(listing) if isinstance(c.get("id"), str)}
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


def of_proxy(url: str, error: aiohttp.ClientHttpProxyError) -> Exception:
    """The error for a proxy that makes no connection to `url`.

    Danger: the text of `error` has the URL of the proxy, perhaps with its password, so it is not chained.
    """
    words = f"HTTP {error.status} from the proxy on the way to {url}"
    return InvalidCall(f"{words}; {MENDED_BY[407]}") if error.status == 407 else Unreachable(words)


def _why(error: aiohttp.ClientError) -> str:
    """The system's own message if it has one ("Connection refused"), which aiohttp leaves out."""
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return f"{type(error).__name__}: {error}"
