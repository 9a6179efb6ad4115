"""A real S3 server on loopback for the tests: moto's, with one bucket."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3fs

from tests.servers.ports import free_port

LAKE = "s3://bucket/lake"


@contextmanager
def running() -> Iterator[str]:
    """The URL of an empty lake, to which the environment leads meanwhile."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    env = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
            yield LAKE
    finally:
        server.kill()
        server.wait()


def put(file: Path, url: str) -> None:
    """Copy a file to the bucket."""
    s3fs.S3FileSystem(skip_instance_cache=True).pipe(url, file.read_bytes())
