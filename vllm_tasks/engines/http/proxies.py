"""The proxy on the way to a server, as HTTP_PROXY, HTTPS_PROXY and NO_PROXY name it.

aiohttp's own way (`trust_env`) is not used: it would send rows for this very machine to the proxy, look the
variables up for every row, and let a password of ~/.netrc replace what the caller has set.
"""

from __future__ import annotations

from base64 import b64encode
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from yarl import URL

from vllm_tasks.engines.http.credentials import AUTHORIZATION
from vllm_tasks.errors import InvalidCall


def proxy_of(url: str) -> str | None:
    """Return the URL of the proxy for `url`; None for none, as always on the way to this machine.

    Raises `InvalidCall` for a proxy that does not speak HTTP, or whose URL is wrong.
    """
    parts = urlsplit(url)
    host, found = parts.hostname or "", getproxies()
    proxy = found.get(parts.scheme)
    if not proxy or _is_here(host) or proxy_bypass(parts.netloc) or _is_excluded(host, found.get("no", "")):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    try:
        kind, _ = URL(proxy).scheme, URL(proxy).port
    except ValueError:  # whose words have the password
        raise InvalidCall(
            f"{parts.scheme.upper()}_PROXY in the environment is not a URL such as "
            "http://user:password@host:3128; special characters in the password must be percent-encoded"
        ) from None
    if kind not in ("http", "https"):
        raise InvalidCall(
            f"{parts.scheme.upper()}_PROXY in the environment names a proxy of the kind {kind!r}, and rows "
            f"can go through http and https proxies only: name such a one, or add {host!r} to NO_PROXY"
        )
    return proxy


def sent_through(proxy: str | None) -> dict[str, Any]:
    """Return the options of an aiohttp request that goes through this proxy.

    The user and password are apart: aiohttp repeats the URL of a proxy in its errors.
    """
    if proxy is None:
        return {}
    url = URL(proxy)
    if url.user is None and url.password is None:
        return {"proxy": url}
    encoded = b64encode(f"{url.user or ''}:{url.password or ''}".encode()).decode()
    # aiohttp sends it as `Proxy-Authorization`, in the request or, for https, to open the tunnel.
    return {"proxy": url.with_user(None), "proxy_headers": {AUTHORIZATION: f"Basic {encoded}"}}


def _is_here(host: str) -> bool:
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def _is_excluded(host: str, no_proxy: str) -> bool:
    """Whether NO_PROXY has a network with this address, which Python's own `proxy_bypass` does not read."""
    for entry in no_proxy.split(","):
        with suppress(ValueError):
            if ip_address(host) in ip_network(entry.strip(), strict=False):
                return True
    return False
