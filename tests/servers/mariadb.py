"""A real MariaDB server for the tests: Debian's binary, a folder and a socket of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

OPTIONS = ("--skip-grant-tables", "--innodb-use-native-aio=0", "--innodb-buffer-pool-size=32M")


def binary() -> str | None:
    """The path of the server, if it is installed."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
    return shutil.which("mariadbd", path=path) or shutil.which("mysqld", path=path)


@contextmanager
def running() -> Iterator[str]:
    """The URL of an empty database, on a server that ends with the block; raises `FileNotFoundError`."""
    if (server := binary()) is None:
        raise FileNotFoundError("needs MariaDB: apt-get install mariadb-server")
    folder = Path(tempfile.mkdtemp(prefix="vllm-tasks-maria-"))
    (folder / "data").mkdir()
    common = [server, "--no-defaults", f"--datadir={folder}/data", *OPTIONS]
    if os.getuid() == 0:
        common.append("--user=root")
    process = None
    try:
        with (folder / "log").open("w") as log:
            made = "CREATE DATABASE mysql;"
            subprocess.run(
                [*common, "--bootstrap"], input=made, text=True, stdout=log, stderr=log, check=True
            )
            served = [*common, f"--socket={folder}/s", "--skip-networking", f"--pid-file={folder}/pid"]
            process = subprocess.Popen(served, stdout=log, stderr=log)
        url = f"mysql+pymysql://root@localhost/tests?unix_socket={folder}/s&charset=utf8mb4"
        _wait(url, folder / "s", process)
        yield url
    finally:
        if process is not None:
            process.kill()
            process.wait()
        shutil.rmtree(folder)


def _wait(url: str, socket: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server accepts connections, and create the empty database."""
    for _ in range(300):
        if socket.exists():  # pymysql leaves a socket open where it finds nobody
            break
        time.sleep(0.1)
        if process.poll() is not None:
            raise RuntimeError("MariaDB does not start")
    engine = sa.create_engine(url.replace("/tests?", "/?"))
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE DATABASE tests")
    engine.dispose()
