"""What commands print, and what they keep to themselves; how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from tests.cli.conftest import Command, write
from tests.eventually import LONG_ENOUGH
from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, refused, usual
from vllm_tasks import VllmAPI
from vllm_tasks._cli.looks import outputs_of
from vllm_tasks.datalayer.selection import OWN_COLUMNS

MODULE = [sys.executable, "-m", "vllm_tasks"]


def answering(text: str) -> Any:
    """A script whose answers are `text`."""

    def answer(asked: Asked) -> Reply | None:
        if asked.path != "/v1/completions":
            return None
        reply = usual(asked)
        reply.body["choices"][0]["text"] = text
        return reply

    return answer


@pytest.mark.usefixtures("command")
def test_a_terminal_that_lacks_characters_gets_others(
    job: Path, tmp_path: Path, server: ScriptedServer
) -> None:
    """A result that is complete is not lost for one character."""
    server.script = answering("Größe")
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C"}
    done = subprocess.run(
        [*MODULE, "preview", str(job)], cwd=tmp_path, env=env, capture_output=True, timeout=LONG_ENOUGH
    )
    assert done.returncode == 0, done.stderr
    assert b"answer: Gr??e" in done.stdout


def test_a_server_writes_nothing_to_the_terminal(command: Command, job: Path, server: ScriptedServer) -> None:
    """The name that it gives its model is shown, and not obeyed."""
    name = "red \x1b[31m"

    def script(asked: Asked) -> Reply | None:
        if (reply := answering("x")(asked)) is not None:
            reply.body["model"] = name
        return reply

    server.script = script
    assert command("run", str(job))[0] == 0
    printed = command("show", "tagger", "--db", "data/")[1]
    assert "by red \N{REPLACEMENT CHARACTER}[31m" in printed
    assert "\x1b" not in printed


def test_an_interrupt_during_the_imports_of_the_commands_is_quiet(tmp_path: Path) -> None:
    """They are imported before there is anything to commit."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "def interrupt(event, args):\n"
        "    if event == 'import' and args[0] == 'cyclopts' and args[0] not in sys.modules:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.addaudithook(interrupt)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*MODULE, "--help"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=LONG_ENOUGH,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_report_for_programs_has_no_answers(command: Command, job: Path, server: ScriptedServer) -> None:
    """Unless they are asked for: schedulers keep what a command prints."""
    server.script = answering("a pRiVaTe answer")
    job.write_text(job.read_text().replace("prompt:", "datatype: int, prompt:") + "max_failed: null\n")
    printed = command("run", str(job), "--json")[1]
    assert (json.loads(printed)["failed"], "pRiVaTe" in printed) == (4, False)
    job.write_text(job.read_text() + "retry_failed: true\n")
    printed = command("run", str(job), "--json", "--texts")[1]
    assert len(json.loads(printed)["worst"]) == 4
    assert "pRiVaTe" in printed


def test_a_validation_for_programs_has_no_answers(
    command: Command, server: ScriptedServer, tmp_path: Path
) -> None:
    """The worst rows have inputs, targets and answers."""
    server.script = answering("a pRiVaTe answer")
    job = write(
        tmp_path,
        server,
        "db: data/\nvalidation:\n  datasets: [{identifier: known, select: tickets}]\n"
        "  metrics: [{identifier: accuracy}]\n  key: [text, label]\n",
    )
    printed = command("validate", str(job), "--json")[1]
    assert json.loads(printed)["datasets"][0]["values"][0]["value"] == 0.0
    assert "pRiVaTe" not in printed
    printed = command("validate", str(job), "--json", "--texts")[1]
    assert len(json.loads(printed)["datasets"][0]["worst"]) == 4
    assert "pRiVaTe" in printed


def test_a_number_that_is_not_known_is_null(command: Command, server: ScriptedServer, tmp_path: Path) -> None:
    """JSON has no infinity, as the interval of a single row has it, and no nan."""
    job = write(
        tmp_path,
        server,
        "db: data/\nvalidation:\n  datasets: [{identifier: known, select: tickets, sample_size: 1}]\n"
        "  metrics: [{identifier: bleu}, {identifier: output_tokens}]\n  key: [text, label]\n",
    )
    printed = command("validate", str(job), "--json")[1]

    def no_json(word: str) -> float:
        raise ValueError(f"{word} is no JSON")

    bleu = json.loads(printed, parse_constant=no_json)["datasets"][0]["values"][0]
    assert (bleu["n"], bleu["low"], bleu["high"]) == (1, None, None)


def test_counts_are_those_of_the_rows(place: Place, server: ScriptedServer) -> None:
    """In every store, with several outputs of one row."""
    place.fill_texts(*(f"t{i}" for i in range(7)))

    def script(asked: Asked) -> Reply | None:
        return (
            refused(400, f"no {asked.prompt}")
            if asked.prompt in ("t1", "t4")
            else answering('["a", "b"]')(asked)
        )

    server.script = script
    model = VllmAPI(identifier="m", api_url=server.url, datatype="json", flatten=True)
    report = model.predict_in_db("text", "rows", db=place.db, max_failed=None)
    found = outputs_of("m", place.db)
    rows = [row for row in place.outputs() if not row["_position"]]
    assert (found.rows, found.failed, found.models) == (7, 2, ["scripted-model"])
    assert found.errors == dict(Counter(row["_error"].partition(":")[0] for row in rows if row["_error"]))
    assert (found.prompt_tokens, found.completion_tokens) == (report.prompt_tokens, report.completion_tokens)
    assert str(min(row["_created_at"] for row in rows))[:19] == str(found.first)[:19]
    assert str(max(row["_created_at"] for row in rows))[:19] == str(found.last)[:19]


def peak(folder: Path, predict_id: str) -> int:
    """The memory in bytes that `show` takes at most."""
    with subprocess.Popen(
        [*MODULE, "show", predict_id, "--db", str(folder)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert b"outputs" in process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


def test_a_large_table_is_not_read_into_memory(tmp_path: Path) -> None:
    """Its texts, which nothing counts, are left where they are."""
    kinds = {
        "str": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "timestamp": pa.timestamp("us", "UTC"),
    }
    columns = {"id": pa.nulls(1000, pa.int64()), "output": pa.array(["x" * 1000] * 1000)}
    columns |= {name: pa.nulls(1000, kinds[kind]) for name, kind in OWN_COLUMNS.items()}
    table = pa.table(columns)
    write_deltalake(tmp_path / "_outputs__small", table)
    write_deltalake(tmp_path / "_outputs__large", pa.concat_tables([table] * 400))
    assert peak(tmp_path, "large") - peak(tmp_path, "small") < 200 * 2**20  # its texts are 400 MB
