"""The hosts that files may be read from: a site that limits places lets none lead into its own network."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fsspec.registry import get_filesystem_class
from fsspec.utils import get_protocol

from vllm_tasks.errors import InvalidCall
from vllm_tasks.places import is_local, without_secrets
from vllm_tasks.settings import site_settings

if TYPE_CHECKING:
    import aiohttp

WEB = ("http", "https")
NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv6 addresses that a gateway turns into IPv4 ones."""


def options_of(what: str, uri: str) -> dict[str, Any]:
    """Return the options for fsspec that keep a URI within the site's places; empty if it has none.

    Raises `InvalidCall` as `check_host` does.
    """
    if is_local(uri) or not site_settings().places:
        return {}
    check_host(what, uri)
    return {"get_client": checked_client} if is_web(uri) else {}


def check_host(what: str, uri: str) -> None:
    """Raise `InvalidCall` for a URI whose host is this machine, on its own link, or in a private network.

    There, services listen that trust everybody who can reach them, such as a cloud's metadata. A host in a
    private network is allowed if one of the places names it. A store whose URIs name no host is not checked.
    """
    host = _host(uri)
    if host is None:
        return
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except (OSError, ValueError) as error:
        raise InvalidCall(f"{what} {without_secrets(uri)!r:.200}: its host is not known: {error}") from error
    if own := sorted(address for address in map(str, found) if _is_refused(address, host)):
        raise InvalidCall(
            f"{what} {without_secrets(uri)!r:.200} is at {own}, a loopback, link-local or private address, "
            "and nothing is read from these where the site limits places: have the site add the host to "
            "VLLM_TASKS_PLACES, as 'https://host/', if it is in a private network, or give a path"
        )


async def checked_client(**options: Any) -> aiohttp.ClientSession:
    """Return fsspec's client for the web, which follows no redirect, and checks an address when it connects.

    A name may lead somewhere else a moment after `check_host` has looked it up.
    """
    import aiohttp
    from aiohttp.abc import ResolveResult

    class Resolver(aiohttp.ThreadedResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            found = await super().resolve(host, port, family)
            if any(_is_refused(each["host"], host) for each in found):
                raise OSError(f"{host!r} leads to a loopback, link-local or private address")
            return found

    async def refuse(*_: object) -> None:
        raise OSError("it redirects to another address, and none is followed where the site limits places")

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(refuse)
    connector = aiohttp.TCPConnector(resolver=Resolver())
    return aiohttp.ClientSession(connector=connector, trace_configs=[trace], **options)


def is_web(uri: str) -> bool:
    """Whether a URI is read over HTTP or HTTPS."""
    return get_protocol(uri).lower() in WEB


def _host(uri: str) -> str | None:
    """The host of a URI, as the client reads it that connects there: parsers disagree about odd ones."""
    if is_web(uri):
        from yarl import URL

        return URL(uri).host or ""
    kind = get_filesystem_class(get_protocol(uri))
    named: str | None = kind._get_kwargs_from_urls(uri).get("host")
    return named


def _is_refused(address: str, host: str) -> bool:
    found = _inner(ipaddress.ip_address(address.partition("%")[0]))
    if found.is_loopback or found.is_link_local or found.is_unspecified:
        return True
    named = {urlsplit(place).hostname for place in site_settings().places if "://" in place}
    return not (found.is_global or host.lower() in named) or found.is_multicast


def _inner(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Any:
    """The IPv4 address that an IPv6 address stands for, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    is_old = int(address) >> 32 == 0 and int(address) > 1  # ::127.0.0.1, but neither :: nor ::1
    return address.ipv4_mapped or address.sixtofour or (last if address in NAT64 or is_old else address)
