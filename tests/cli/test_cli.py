"""`python -m vllm_tasks`: what its commands print, and how they exit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from deltalake import write_deltalake
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.cli.conftest import Command, write
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, refused, usual


def test_a_job_is_run_resumed_and_looked_at(command: Command, job: Path, server: ScriptedServer) -> None:
    """The second run finds all rows done; the counts are those of the table."""
    server.script = lambda request: refused(400, "no") if request.prompt == "Tag: t1" else None
    job.write_text(job.read_text() + "max_failed: 1\n")
    first = json.loads(command("run", str(job), "--json")[1])
    assert (first["succeeded"], first["failed"]) == (3, 1)
    assert command("run", str(job))[0] == 0
    assert len(server.posts) == 4
    found = json.loads(command("show", "tagger", "--db", "data/", "--json")[1])
    assert (found["rows"], found["failed"], found["errors"]) == (4, 1, {"refused": 1})
    assert "tagger: 3 outputs, 1 errors\n  refused: 1" in command("show", "tagger", "--db", "data/")[1]


@pytest.mark.parametrize("name", ["run", "preview", "estimate", "check"])
def test_rows_may_be_read_elsewhere(
    command: Command, server: ScriptedServer, tmp_path: Path, name: str
) -> None:
    """A job may read a store that cannot keep outputs."""
    with duckdb.connect(str(tmp_path / "crm.duckdb")) as store:
        store.sql("CREATE TABLE notes AS SELECT i AS id, 'n' || i AS text FROM range(8) t(i)")
    job = write(tmp_path, server, "X: text\nselect: notes\nsource: duckdb:///crm.duckdb\ndb: data/\n")
    code, printed = command(name, str(job))
    assert code == 0, printed
    assert (name == "check") is not any(post.prompt == "Tag: n1" for post in server.posts)


def test_a_preview_commits_nothing(command: Command, job: Path, tmp_path: Path) -> None:
    """It prints prompts and answers of the first rows."""
    code, printed = command("preview", str(job), "--rows", "2")
    assert code == 0
    assert "prompt: Tag: t1" in printed
    assert "t2" not in printed
    assert not list((tmp_path / "data").glob("_outputs__*"))


def test_an_estimate_commits_nothing(command: Command, job: Path, tmp_path: Path) -> None:
    """It prints counts and cost, for people and for programs."""
    job.write_text(job.read_text() + "prices: {per_million_prompt_tokens: 1000000}\n")
    code, printed = command("estimate", str(job))
    assert (code, "rows to process: 4 of 4" in printed, "cost: 12.00" in printed) == (0, True, True)
    found = json.loads(command("estimate", str(job), "--sample", "8", "--json")[1])
    assert (found["missing"], found["completion_tokens"]["value"]) == (4, 20)
    assert not list((tmp_path / "data").glob("_outputs__*"))


def test_a_check_sends_no_row(command: Command, job: Path, server: ScriptedServer) -> None:
    """It names the model, how texts are sent, and the versions."""
    code, printed = command("check", str(job))
    assert code == 0
    assert "ok: scripted-model, served by model scripted-model" in printed
    assert "texts are sent as plain text" in printed
    assert "prefect 3." in printed
    assert not server.posts


def test_a_validation_below_its_limits_exits_with_its_own_code(
    command: Command, server: ScriptedServer, tmp_path: Path
) -> None:
    """Scores are printed and recorded either way."""

    def right(request: Asked) -> Reply | None:
        if request.body is None or ("prompt" not in request.body and "messages" not in request.body):
            return None
        reply = usual(request)
        reply.body["choices"][0]["text"] = "a"
        return reply

    server.script = right
    job = write(
        tmp_path,
        server,
        "db: data/\nvalidation:\n  datasets: [{identifier: known, select: tickets}]\n"
        "  metrics: [{identifier: accuracy}]\n  key: [text, label]\n  thresholds: {accuracy: 0.4}\n",
    )
    code, printed = command("validate", str(job))
    assert (code, "accuracy" in printed) == (0, True)
    job.write_text(job.read_text().replace("0.4", "0.9"))
    code, printed = command("validate", str(job))
    assert code == 5
    assert "accuracy" in printed
    assert "error: tagger did not pass" in printed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("X: text", "Y: text"), "has no parameter 'Y'"),
        (("select: tickets\n", ""), "'select' is missing"),
        (("X: text", "X: [text"), "is not YAML"),
        (("X: text", "X: text\nlimit: 0"), "limit"),
        (("X: text", "X: text\nlimt: 3"), "did you mean 'limit'"),
        (("select: tickets", "select: tikcets"), "did you mean 'tickets'"),
    ],
)
def test_what_is_wrong_in_a_job_is_named(
    printed_of_refused: Callable[..., str], change: tuple[str, str], said: str
) -> None:
    """A wrong job exits with 2 and sends no row."""
    assert said in printed_of_refused(change)


@pytest.mark.parametrize("other", ["limit: 2", "ids: [1]", "overwrite: true", "refresh: changed"])
def test_an_estimate_does_not_guess_which_rows_another_job_would_process(
    printed_of_refused: Callable[..., str], other: str
) -> None:
    """It counts the rows without an output or error."""
    assert f"has {other.partition(':')[0]}" in printed_of_refused(
        ("X: text", f"X: text\n{other}"), "estimate"
    )


def test_a_server_that_is_away_is_for_later(
    command: Command, job: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exit code tells a scheduler to try again."""
    monkeypatch.setenv("VLLM_TASKS_GRACE_PERIOD", "0")
    server.stop()
    assert command("run", str(job))[0] == 3
    server.start()


def test_more_failed_rows_than_allowed_have_a_code_of_their_own(
    command: Command, job: Path, server: ScriptedServer
) -> None:
    """What was finished is committed all the same."""
    server.script = lambda request: refused(400, "no") if request.prompt in ("Tag: t1", "Tag: t2") else None
    code, printed = command("run", str(job))
    assert code == 4
    assert "error: 2 of" in printed
    assert json.loads(command("show", "tagger", "--db", "data/", "--json")[1])["rows"] == 4


@pytest.mark.parametrize(
    ("more", "said"), [("shards: 2", "has shards=2"), ("pool", "names the work pool or deployment 'gpus'")]
)
def test_a_job_for_a_work_pool_is_refused(
    command: Command, job: Path, server: ScriptedServer, more: str, said: str
) -> None:
    """It would run on this machine, without a word."""
    text = job.read_text()
    pool = text.replace("identifier: tagger,", "identifier: tagger, compute_kwargs: {work_pool: gpus},")
    job.write_text(pool if more == "pool" else f"{text}{more}\n")
    code, printed = command("run", str(job))
    assert code == 2
    assert said in printed
    assert not server.posts


def test_a_job_that_asks_a_person_is_refused(
    command: Command, tmp_path: Path, server: ScriptedServer
) -> None:
    """Nobody could answer a command; its file is for a deployment."""
    validation = "{datasets: [{identifier: d, select: t}], metrics: [{identifier: accuracy}], key: [a, b]}"
    job = write(tmp_path, server, f"validation: {validation}\non_gate_failed: ask\napproval_timeout: 60\n")
    code, printed = command("validate", str(job))
    assert code == 2
    assert "has on_gate_failed: ask" in printed
    assert not server.posts


@pytest.mark.parametrize("words", [("rnu", "job.yaml"), ("run",), ("run", "job.yaml", "--jsn")])
def test_a_wrong_command_line_exits_as_a_wrong_call(command: Command, words: tuple[str, ...]) -> None:
    """The message names what is wrong."""
    assert command(*words)[0] == 2


def test_outputs_of_a_table_with_a_name_of_its_own(command: Command, job: Path) -> None:
    """`--table` is the name that the model gives its outputs."""
    own = "identifier: tagger, model_update_kwargs: {table: tags},"
    job.write_text(job.read_text().replace("identifier: tagger,", own))
    assert command("run", str(job))[0] == 0
    assert "4 outputs" in command("show", "tagger", "--db", "data/", "--table", "tags")[1]
    write_deltalake("data/other", pa.table({"id": [1]}))
    code, printed = command("show", "tagger", "--db", "data/", "--table", "other")
    assert (code, "not an outputs table" in printed) == (2, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("X: text", "X: text\nlimit: yes"), "limit"),
        (("X: text", "X: text\nmax_failed: '5'"), "max_failed"),
        (("X: text", "X: text\nlimit: 2024-02-30"), "is not YAML"),
        (("identifier: tagger", "1: x, identifier: tagger"), "1 is not the name of a field"),
        (("X: text", "X: text\nsampling: {shard: [0, 2]}"), "an argument of predict_in_db"),
        (("model: {", "model: {api_key: sEcReT, promt: x, "), "promt"),
        (("db: data/", "db: {url: 'postgresql://u:sEcReT@h/x', ulr: 1}"), "ulr"),
        (("db: data/", "limit: 0\ndb: 'postgresql://u:sEcReT@h/x'"), "limit"),
    ],
)
def test_a_value_is_what_it_seems_to_be_and_no_secret_is_printed(
    printed_of_refused: Callable[..., str], change: tuple[str, str], said: str
) -> None:
    """What YAML reads as something else is refused, in one line without the values of other parameters."""
    printed = printed_of_refused(change)
    assert said in printed
    assert "sEcReT" not in printed


def test_a_schema_may_refer_within_itself(command: Command, job: Path) -> None:
    """`$ref` is no saved block there, and no Prefect server is needed."""
    schema = (
        "output_schema: {type: object, properties: {a: {$ref: '#/$defs/A'}}, $defs: {A: {type: string}}},"
    )
    job.write_text(job.read_text().replace("identifier: tagger,", f"identifier: tagger, {schema}"))
    code, printed = command("check", str(job))
    assert (code, "ok: scripted-model" in printed) == (0, True), printed


@pytest.mark.usefixtures("command")
def test_output_that_nobody_reads_is_no_failure(job: Path, tmp_path: Path) -> None:
    """As before `head`: the job is done."""
    words = [sys.executable, "-m", "vllm_tasks", "run", str(job)]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 0, said
    assert "BrokenPipe" not in said


def test_a_prefect_server_that_is_away_is_for_later(
    command: Command, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saved block cannot be loaded then."""
    job.write_text("model: vllm-api/tagger\nX: text\nselect: tickets\n")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert command("run", str(job))[0] == 3


def test_a_saved_block_that_is_not_there_is_named(command: Command, job: Path) -> None:
    """A text for the model that is no block's name says what one looks like."""
    job.write_text("model: tagger\nX: text\nselect: tickets\n")
    code, printed = command("run", str(job))
    assert code == 2
    assert "write vllm-api or vllm-model, a slash and its name" in printed


def test_it_is_there_as_a_module() -> None:
    """`python -m vllm_tasks --help` lists the commands."""
    done = subprocess.run([sys.executable, "-m", "vllm_tasks", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("run", "preview", "validate", "show", "check", "pools"))
