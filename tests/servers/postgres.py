"""A real PostgreSQL server for the tests: Debian's binaries, a folder and a socket of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import psutil
import sqlalchemy as sa

SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "max_connections": "100",
    "dynamic_shared_memory_type": "mmap",  # in the data folder: a killed server leaves none elsewhere
    "shared_memory_type": "mmap",
}


def binaries() -> Path | None:
    """The folder of the newest server, if one is installed."""
    found = [p.parent for p in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    on_path = shutil.which("postgres")
    if found:
        return max(found, key=lambda path: float(path.parent.name))
    return Path(on_path).resolve().parent if on_path else None


def binaries_with_pgvector() -> Path | None:
    """The folder of a server that has pgvector: an installed one, or that of the package `pgserver`."""
    for control in Path("/usr/share/postgresql").glob("*/extension/vector.control"):
        return Path("/usr/lib/postgresql", control.parents[1].name, "bin")
    package = find_spec("pgserver")
    return Path(package.origin).parent / "pginstall" / "bin" if package and package.origin else None


class Postgres:
    """One server, started; `new_database()` gives the URL of an empty database."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._folder = Path(tempfile.mkdtemp(prefix="vllm-tasks-pg-"))
        self._numbers = count()
        if os.getuid() == 0:
            self._folder.chmod(0o755)
            self._user = "postgres"
            shutil.chown(self._folder, self._user)
        else:
            self._user = ""
        self._run(
            "initdb", "--auth=trust", "--username=tests", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"
        )
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in SETTINGS.items())
        self.start()

    @property
    def data(self) -> Path:
        return self._folder / "data"

    @property
    def log(self) -> Path:
        return self._folder / "log"

    def url(self, database: str) -> str:
        return f"postgresql://tests@/{database}?host={self._folder}"

    def new_database(self) -> str:
        name = f"test{next(self._numbers)}"
        engine = sa.create_engine(
            self.url("postgres").replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        engine.dispose()
        return self.url(name)

    def start(self) -> None:
        """Return when the server accepts connections."""
        self._run("pg_ctl", "--wait", f"--log={self.log}", f"--options=-k {self._folder}", "start")

    def stop(self) -> None:
        """End connections and roll their transactions back, as a restart by an administrator does."""
        self._run("pg_ctl", "--wait", "--mode=fast", "stop")

    def kill(self) -> None:
        """SIGKILL to the server and to each of its processes; it has to recover when it starts again."""
        server = psutil.Process(int((self.data / "postmaster.pid").read_text().split()[0]))
        # The server first: it would take the death of a child for a crash, and start others.
        children = server.children()
        for process in (server, *children):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs([server, *children], timeout=10)

    def remove(self) -> None:
        """Stop it and leave nothing."""
        if (self.data / "postmaster.pid").exists():
            self._run("pg_ctl", "--wait", "--mode=immediate", "stop", check=False)
        shutil.rmtree(self._folder)

    def _run(self, program: str, *arguments: str, check: bool = True) -> None:
        command = [str(self._binaries / program), f"--pgdata={self.data}", *arguments]
        if self._user:
            command = ["runuser", "-u", self._user, "--", *command]
        with tempfile.TemporaryFile() as out:  # a pipe would stay open as long as the server
            done = subprocess.run(
                command, check=False, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd="/"
            )
            out.seek(0)
            if check and done.returncode:
                raise RuntimeError(f"{program}: {out.read().decode(errors='replace')}")


@contextmanager
def running(found: Path | None = None) -> Iterator[Postgres]:
    """A server that ends with the block; raises `FileNotFoundError` if none is installed."""
    if (found := found or binaries()) is None:
        raise FileNotFoundError("needs PostgreSQL: apt-get install postgresql")
    server = Postgres(found)
    try:
        yield server
    finally:
        server.remove()
