"""Attacks of a row or a block that names a host, a pipe or a link, where the site limits places."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.calls.prompting import refusal
from tests.calls.test_media import PNG, with_media
from vllm_tasks import Datalayer, InvalidCall
from vllm_tasks.calls.prompts import load_artifact
from vllm_tasks.hosts import check_host


class Listener:
    """A port of this machine that counts who connects, and says nothing."""

    def __init__(self) -> None:
        self.connected = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        while True:
            try:
                self._socket.accept()[0].close()
            except OSError:
                return
            self.connected += 1

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Nobody may connect to it, although the site allows the whole web."""
    monkeypatch.setenv("VLLM_TASKS_PLACES", json.dumps(["http://", "https://", "ftp://", "webhdfs://"]))
    made = Listener()
    yield made
    made.close()


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:{port}/x.png",
        "http://127.1:{port}/x.png",
        "http://2130706433:{port}/x.png",
        "http://0x7f000001:{port}/x.png",
        "http://0:{port}/x.png",
        "http://localhost:{port}/x.png",
        "http://allowed@127.0.0.1:{port}/x.png",
        "http://allowed:x@127.0.0.1:{port}/x.png",
        "http://127.0.0.1:{port}\\@allowed/x.png",
        "http://127.0.0.1:{port}#@allowed/x.png",
        "http://[::ffff:127.0.0.1]:{port}/x.png",
        "HTTP://127.0.0.1:{port}/x.png",
        "simplecache::http://127.0.0.1:{port}/x.png",
        "ftp://127.0.0.1:{port}/x.png",
        "ftp://allowed@127.0.0.1:{port}/x.png",
        "webhdfs://127.0.0.1:{port}/x.png",
    ],
)
def test_no_spelling_connects_to_this_machine(listener: Listener, uri: str) -> None:
    """The row has an error, and the port has seen nobody."""
    assert refusal(with_media()({"photo": uri.format(port=listener.port)}))
    assert listener.connected == 0


def test_a_name_that_moves_after_it_was_checked_connects_to_nobody(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first look-up gives an address of the internet, and the next one that of this machine."""
    addresses, real = ["8.8.8.8", "127.0.0.1"], socket.getaddrinfo

    def moving(host: Any, *given: Any, **options: Any) -> Any:
        return real(addresses.pop(0) if host == "moving.example" else host, *given, **options)

    monkeypatch.setattr(socket, "getaddrinfo", moving)
    said = refusal(with_media()({"photo": f"http://moving.example:{listener.port}/x.png"}))
    assert not addresses
    assert "cannot be read" in said
    assert listener.connected == 0


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:{port}/x", "http://localhost:{port}/x", "ftp://127.0.0.1:{port}/x"]
)
def test_no_table_and_no_artifact_is_read_from_this_machine(listener: Listener, uri: str) -> None:
    """Of a block, or of the arguments of a run: db, source, artifacts, prompt files."""
    url = uri.format(port=listener.port)
    lake = Datalayer(url=url)  # type: ignore[arg-type]  # becomes a SecretStr
    for read in (
        lake.tables,
        lambda: lake.source("rows"),
        lambda: load_artifact(url, "str"),
        lambda: load_artifact(url, "str", "prompt_file"),
    ):
        with pytest.raises(InvalidCall, match="a loopback, link-local or private address"):
            read()
    assert listener.connected == 0


@pytest.mark.parametrize("address", ["10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "224.0.0.1"])
def test_a_private_address_is_read_if_a_place_names_it(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """A whole protocol does not name it."""
    real, asked = socket.getaddrinfo, []

    def at_address(host: Any, *given: Any, **options: Any) -> Any:
        asked.append(host)
        return real(address if host == "pictures.example" else host, *given, **options)

    monkeypatch.setattr(socket, "getaddrinfo", at_address)
    record = {"photo": f"http://pictures.example:{listener.port}/x.png"}
    assert "VLLM_TASKS_PLACES, as 'https://host/'" in refusal(with_media()(record))
    if address != "224.0.0.1":
        monkeypatch.setenv("VLLM_TASKS_PLACES", '["http://pictures.example/"]')
        check_host("photo", record["photo"])
    assert "pictures.example" in asked


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """To open a pipe lasts until somebody writes into it, and a row may name one anywhere."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    for name in ("pipe.png", "link.png", ""):
        assert "is not a file" in refusal(with_media()({"photo": str(tmp_path / name)}))
    assert "is not a file" in refusal(with_media()({"photo": f"file://{tmp_path}/pipe.png"}))
    (tmp_path / "cat.png").write_bytes(PNG)
    assert with_media()({"photo": str(tmp_path / "cat.png")})
