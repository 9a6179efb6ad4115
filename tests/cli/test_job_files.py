"""A job file is read as a person means it, or refused with the line, the value and the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.conftest import IN_PREFECT
from tests.servers.scripted_server import ScriptedServer
from vllm_tasks import Datalayer, VllmAPI

pytestmark = IN_PREFECT
BOMB = "[&a0 [x, x], " + ", ".join(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)) + "]"
"""A line that stands for 2 to the power of 41 values."""
MERGES = "[&m0 {n: 1}, " + ", ".join(f"&m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in range(1, 40)) + "]"
"""A line that stands for 2 to the power of 39 keys."""


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_may_have_the_mark_of_its_encoding(
    command: Command, job: Path, server: ScriptedServer, encoding: str
) -> None:
    """As editors on Windows write it."""
    job.write_text(job.read_text().replace("Tag:", "Größe:"), encoding=encoding)
    assert command("run", str(job))[0] == 0
    assert sorted(each.prompt for each in server.posts)[0] == "Größe: t0"


def test_another_encoding_is_refused(command: Command, job: Path) -> None:
    """The message names the encoding to use."""
    job.write_text(job.read_text().replace("Tag:", "Größe:"), encoding="latin-1")
    code, printed = command("run", str(job))
    assert (code, "is not YAML in UTF-8" in printed) == (2, True)


def test_values_are_those_of_yaml_1_2(command: Command, job: Path, server: ScriptedServer) -> None:
    """`no` is a text, and a number needs no dot before its exponent."""
    job.write_text(job.read_text() + "sampling: {stop: [no, off], top_p: 1e-1}\nids: [0, +2]\n")
    assert command("run", str(job))[0] == 0
    assert sorted(each.prompt for each in server.posts) == ["Tag: t0", "Tag: t2"]
    assert server.posts[0].body["stop"] == ["no", "off"]
    assert server.posts[0].body["top_p"] == 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("X: text", "X: text\nX: label"), "line 3: the key 'X' is there twice; remove one"),
        (
            ("model: {", "model: {api_key: sEcReT, api_key: oThEr, "),
            "line 1: the key 'api_key' is there twice",
        ),
        (("X: text", "X: text\nsampling: {<<: {n: 1}, seed: 1, seed: 2}"), "the key 'seed' is there twice"),
        (("X: text", "X: text\nids: [010]"), "line 3: '010' may be a number or a text; write 10 for"),
        (("X: text", "X: text\nids: [2024_01]"), "'2024_01' may be a number or a text"),
        (("X: text", "X: text\nids: [0o17]"), "write 15 for the number, or put it in quotes"),
        (("X: text", "X: text\noverwrite: yes"), "write true or false"),
        (("X: text", "X: text\npredict_id: 2024"), "put it in quotes"),
        (("model: {", "model: {api_key: sEcReT, oThEr: ], "), "is not YAML"),
        (("X: text", f"X: text\ncontext: {BOMB}"), "has more than 1,000,000 values"),
        (("X: text", f"X: text\ncontext: {MERGES}"), "line 3: << merges more than 10,000 keys"),
        (("X: text", "X: text\ncontext: &a [*a]"), "an alias inside of what it stands for"),
        (("X: text", "X: text\nsampling: &a {x: {y: *a}}"), "an alias inside of what it stands for"),
        (("X: text", "X: text\nids: !!python/object/apply:os.getcwd []"), "is not YAML"),
        (("X: text", "X: text\n---\nX: text"), "is not YAML"),
        (("X: text", "X: text\nids: !set [1]"), "is not YAML"),
    ],
)
def test_what_may_mean_something_else_is_refused(
    printed_of_refused: Callable[..., str], change: tuple[str, str], said: str
) -> None:
    """Nothing is sent, and no other value of the line is printed."""
    printed = printed_of_refused(change)
    assert said in printed
    assert "sEcReT" not in printed
    assert "oThEr" not in printed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Path:
    """The folder of a saved datalayer, `tables-of-a-job`, with the table of the tests."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "tickets.jsonl").write_text('{"id": 1, "text": "t1"}\n')
    Datalayer(url=str(folder)).save("tables-of-a-job")  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("ref", ["vllm-api/of-a-job", "{$ref: {block_document_slug: vllm-api/of-a-job}}"])
def test_a_saved_model_is_named_as_elsewhere(
    command: Command, server: ScriptedServer, tmp_path: Path, saved: Path, ref: str
) -> None:
    """By a text, or by the reference that deployments use."""
    VllmAPI(identifier="m", api_url=server.url, db=Datalayer(url=str(saved))).save("of-a-job", overwrite=True)  # type: ignore[arg-type]
    (tmp_path / "job.yaml").write_text(f"model: {ref}\nX: text\nselect: tickets\noverwrite: true\n")
    assert command("run", "job.yaml")[0] == 0
    assert [each.prompt for each in server.posts] == ["t1"]


@pytest.mark.parametrize(
    "db", ["vllm-datalayer/tables-of-a-job", "{$ref: {block_document_slug: vllm-datalayer/tables-of-a-job}}"]
)
def test_a_saved_datalayer_may_be_that_of_the_model(
    command: Command, server: ScriptedServer, tmp_path: Path, saved: Path, db: str
) -> None:
    """It is no folder named `vllm-datalayer`."""
    model = f"{{identifier: nested, api_url: '{server.url}', db: {db}}}"
    (tmp_path / "job.yaml").write_text(f"model: {model}\nX: text\nselect: tickets\noverwrite: true\n")
    assert command("run", "job.yaml")[0] == 0
    assert Datalayer(url=str(saved)).outputs("nested").num_rows == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("model", ["[a]", "null", "5"])
def test_a_model_of_another_form_is_refused(command: Command, tmp_path: Path, model: str) -> None:
    """The message says how to write it."""
    (tmp_path / "job.yaml").write_text(f"model: {model}\nX: text\nselect: tickets\n")
    code, printed = command("run", "job.yaml")
    assert code == 2
    assert "write the fields, or name a saved block, vllm-api/NAME" in printed


@pytest.mark.parametrize(
    "ref",
    [
        "{$ref: {block_document_id: 3fa85f64-5717-4562-b3fc-2c963f66afa6}}",
        "{$ref: {block_document_slug: vllm-datalayer/tables-of-a-job}}",
        "{$ref: {block_document_slug: vllm-api/of-a-job}, identifier: m}",
        "{$ref: vllm-api/of-a-job}",
    ],
)
def test_a_reference_of_another_form_is_refused(command: Command, tmp_path: Path, ref: str) -> None:
    """The message says how to write it."""
    (tmp_path / "job.yaml").write_text(f"model: {ref}\nX: text\nselect: tickets\n")
    code, printed = command("run", "job.yaml")
    assert code == 2
    assert "write vllm-api/NAME or vllm-model/NAME" in printed
