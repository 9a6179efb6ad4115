"""A gateway as a process of its own, which a test may kill: it forwards each request to one server.

`python -m tests.servers.gateway PORT SERVER`. It reads a request to its end before it forwards it, and an
answer before it returns it, as gateways do that look into them; a server that is away is a 502.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

SESSION = web.AppKey("session", aiohttp.ClientSession)
OWN = {"host", "content-length", "connection", "transfer-encoding"}
"""Headers of a connection, which are not forwarded."""


async def session(app: web.Application) -> AsyncIterator[None]:
    """The connections to the server, for as long as the gateway runs."""
    async with aiohttp.ClientSession(sys.argv[2]) as app[SESSION]:
        yield


async def forward(request: web.Request) -> web.Response:
    headers = {name: value for name, value in request.headers.items() if name.lower() not in OWN}
    content = await request.read()
    client = request.app[SESSION]
    try:
        async with client.request(request.method, request.path_qs, headers=headers, data=content) as reply:
            body = await reply.read()
            return web.Response(body=body, status=reply.status, content_type=reply.content_type)
    except aiohttp.ClientError as error:
        return web.Response(text=str(error), status=502)


def main() -> None:
    app = web.Application()
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", forward)
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None)


if __name__ == "__main__":
    main()
