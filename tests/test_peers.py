"""The comparison with other tools, in its short form: the tiny model, few rows, one round."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.peers import chart, plan
from benchmarks.peers.usage import Meter
from benchmarks.workload import output_tokens

ROOT = Path(__file__).parents[1]
ASKED = ("LLM.generate", "ours: predict")
"""Two engines: what it costs to start all of them CI has no time for."""


@pytest.mark.engine
@pytest.mark.long
def test_a_short_run_writes_its_part_of_the_page(tiny_model: Path, tmp_path: Path) -> None:
    """Each side has its line, made exactly the requested tokens, and shows its handling of a bad row."""
    page = tmp_path / "RESULTS.md"
    command = [sys.executable, "-m", "benchmarks.peers", "--short", "--output", str(page)]
    subprocess.run(
        [*command, "--model", str(tiny_model), "--only", "short", "bad", *ASKED], cwd=ROOT, check=True
    )
    found = page.read_text()
    assert "not run" not in found  # a side that made another number of tokens is not run
    assert f"32 rows, {32 * plan.TOKENS} output tokens a round" in found
    lines = re.findall(r"^\| (?:\*\*)?(.+?)(?:\*\*)? \| [\d.]+ \| [\d.]+ \| \d+ \|", found, re.MULTILINE)
    assert {*lines} == {
        "LLM.generate",
        "older: LLM.generate, chunks of 4",
        "ours: predict_batches",
        "ours: predict_in_db",
    }
    assert "| ours: predict_in_db | 99 | 1 | 0 | every row ends |" in found
    assert "| LLM.generate | 0 | 0 | 100 |" in found
    assert page.with_suffix(".svg").read_text().startswith("<svg")


def test_the_picture_is_of_the_tables_on_the_page() -> None:
    """A group that is measured alone leaves the bars of the others as they are."""
    assert results.FILE.with_suffix(".svg").read_text() == chart.draw(results.read())


def test_every_round_has_other_prompts_and_the_same_lengths() -> None:
    """No prefix cache has a row of an earlier round, so rounds can be compared."""
    asked = plan.parse(["--rows", "64"])
    for workload in plan.WORKLOADS:
        first, second = asked.rows(workload, 1), asked.rows(workload, 2)
        assert {row.prompt for row in first}.isdisjoint(row.prompt for row in second)
        assert output_tokens(first) == output_tokens(second)


def test_the_meter_counts_processes_below_that_have_ended() -> None:
    """CPU seconds of a child that a side starts and waits for are the side's."""
    busy = "import time\nwhile time.process_time() < 1.5: pass"
    side = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}]); print('done'); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-uc", side], text=True, **pipes) as process:
        with Meter(process.pid) as meter:
            assert process.stdout.readline() == "done\n"
        process.communicate("end\n")
    assert meter.usage().client > 0.5
    assert meter.usage().engine == 0
