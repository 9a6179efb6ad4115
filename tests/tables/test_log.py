"""What a run displays without Prefect, in a terminal and elsewhere."""

from __future__ import annotations

import asyncio
import logging
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.places import Place
from tests.servers.scripted_server import Asked, ScriptedServer
from vllm_tasks.tables import Log
from vllm_tasks.tables.progress import Progress

SCRIPT = """
import logging, sys, threading
from vllm_tasks import VllmAPI
threading.Timer(2, lambda: logging.getLogger("vllm_tasks.anything").warning("look here")).start()
model = VllmAPI(identifier="m", api_url=sys.argv[1], max_in_flight=16)
print(model.predict_in_db("text", "rows", db=sys.argv[2]).succeeded)
"""
PRINTING = """
import atexit, logging, tempfile, threading
file = tempfile.NamedTemporaryFile()
handler = logging.FileHandler(file.name)
logging.getLogger().addHandler(handler)
atexit.register(lambda: print(*[line for line in open(file.name) if "look here" in line], end=""))
threading.Timer(3, print, ["a line of the script"]).start()
"""
FIGURES = r"\d+ of 100 rows done, 0 failed, [\d.]+ rows/s"


async def slowly(request: Asked) -> None:
    if request.body:
        await asyncio.sleep(0.8)


@pytest.fixture
def job(server: ScriptedServer, tmp_path: os.PathLike[str]) -> list[str]:
    """A command that processes 100 rows in about six seconds."""
    place = Place(str(tmp_path))
    place.fill_texts(*(f"t{i}" for i in range(100)))
    server.script = slowly
    return [sys.executable, "-c", SCRIPT, server.url, place.url]


def test_a_terminal_has_one_live_line(job: list[str]) -> None:
    """It is redrawn in place, a warning of the package stands above it, and it ends with all rows done."""
    terminal, far = pty.openpty()
    with subprocess.Popen(job, stdout=far, stderr=far, env={**os.environ, "TERM": "xterm"}) as process:
        os.close(far)
        seen = b""
        with suppress(OSError):  # the terminal is closed with the process
            while piece := os.read(terminal, 2**16):
                seen += piece
    os.close(terminal)
    assert process.returncode == 0
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", seen.decode())
    lines = plain.replace("\r\n", "\n").split("\n")
    states = [state for line in lines for state in line.split("\r") if re.match(FIGURES, state)]
    assert len(states) > 3
    assert states[-1].startswith("100 of 100 rows done")
    assert sum("look here" in line for line in lines) == 1
    assert lines[-2:] == ["100", ""]


def test_elsewhere_there_are_lines_of_the_log(job: list[str]) -> None:
    """The first comes within seconds, without any setting of logging."""
    said = subprocess.run(job, capture_output=True, text=True).stderr
    assert len(re.findall(FIGURES, said)) >= 2


def test_a_setting_silences_progress(job: list[str]) -> None:
    """Warnings are logged all the same."""
    quiet = {**os.environ, "VLLM_TASKS_LOG_LEVEL": "WARNING"}
    said = subprocess.run(job, capture_output=True, text=True, env=quiet).stderr
    assert "rows done" not in said
    assert "look here" in said


def test_a_run_needs_no_standard_error(job: list[str]) -> None:
    """As of a daemon: it is closed."""
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *job]
    assert subprocess.run(command, capture_output=True, text=True).stdout.endswith("100\n")


def test_what_a_script_prints_goes_where_it_would_go_and_other_handlers_have_their_lines(
    job: list[str],
) -> None:
    """The live line takes neither a redirected standard output nor the lines of a log file."""
    terminal, far = pty.openpty()
    imports = "from vllm_tasks import VllmAPI\n"
    script = job[2].replace(imports, imports + PRINTING)  # Prefect sets up logging when it is imported
    with subprocess.Popen([*job[:2], script, *job[3:]], stdout=subprocess.PIPE, stderr=far) as process:
        os.close(far)
        with suppress(OSError):
            while os.read(terminal, 2**16):
                pass
        assert process.stdout is not None
        printed = process.stdout.read().decode()
    os.close(terminal)
    assert printed.splitlines() == ["a line of the script", "100", "look here"]


def test_lines_come_less_often_as_a_run_grows_old(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After 3 s, each time that the run is twice as old, and at least every 30 s."""
    now = 0.0
    monkeypatch.setattr("vllm_tasks.tables.log.time.monotonic", lambda: now)
    caplog.set_level(logging.INFO, "vllm_tasks")
    log = Log()
    lines = []
    for now in range(1, 150):
        log.progress(Progress(10, 1, 0, 1, 1.0))
        if caplog.records:
            lines.append(now)
            caplog.clear()
    assert lines == [3, 6, 12, 24, 48, 78, 108, 138]
