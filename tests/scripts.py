"""Scripts that a test runs as a user would, and may interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefect.settings import PREFECT_API_URL


@contextmanager
def running_script(folder: Path, text: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs `text` with this session's Prefect server; killed when it outlives the block."""
    file = folder / "script.py"
    file.write_text(text)
    url = PREFECT_API_URL.value()  # else it would start a server of its own, and leave it behind
    assert url
    process = subprocess.Popen(
        [sys.executable, str(file), *arguments],
        env={**os.environ, "PREFECT_API_URL": url},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
