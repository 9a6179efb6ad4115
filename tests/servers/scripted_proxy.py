"""A real proxy on loopback: it tunnels every CONNECT to one server, whatever host it names."""

from __future__ import annotations

import socket
import socketserver
import threading
from contextlib import suppress
from typing import Self


class ScriptedProxy(socketserver.ThreadingTCPServer):
    """`status` other than 200 refuses the tunnel. `seen` has the heads of all requests."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, target: tuple[str, int], status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Tunnel)
        self.target, self.status = target, status
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        return f"http://user:pa55word@127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), name="scripted-proxy").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Tunnel(socketserver.BaseRequestHandler):
    server: ScriptedProxy

    def handle(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := self.request.recv(2**16)):
                return
            head += data
        self.server.seen.append(head.decode())
        self.request.sendall(f"HTTP/1.1 {self.server.status} As scripted\r\n\r\n".encode())
        if self.server.status != 200:
            return
        with socket.create_connection(self.server.target) as target:
            back = threading.Thread(target=pass_on, args=(target, self.request))
            back.start()
            pass_on(self.request, target)
            back.join()


def pass_on(one: socket.socket, other: socket.socket) -> None:
    """Forward everything, to the end."""
    with suppress(OSError):
        while data := one.recv(2**16):
            other.sendall(data)
    with suppress(OSError):
        other.shutdown(socket.SHUT_WR)
