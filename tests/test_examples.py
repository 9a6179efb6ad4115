"""Each example runs unchanged and prints its results."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples import (
    classification,
    compare_models,
    embeddings,
    first_answers,
    prompt_function,
    scheduled_flow,
    structured_output,
    table,
    validation,
)
from tests.conftest import IN_PREFECT
from tests.lettered import by_words, lettered
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, usual
from vllm_tasks import VllmModel
from vllm_tasks.calls.classes import LAST_LINE

pytestmark = IN_PREFECT

EXAMPLES = Path(__file__).parent.parent / "examples"
WORDS = {
    "France": "Paris.",
    "Italy": "Rome",
    "Spain": "Madrid",
    "ruby": "Red.",
    "week": "Seven.",
    "2 + 2": "4",
}
"""The model of these tests knows little: what it answers where a word occurs in the prompt."""
STRUCTURED = {"product": "chair", "mood": "good", "stars": 5}


def knows(asked: Asked) -> Reply | None:
    """A small model that keeps to the requested structure."""
    if asked.path not in ("/v1/completions", "/v1/chat/completions"):
        return None
    structure = asked.body.get("structured_outputs") or {}
    if asked.prompt.endswith(LAST_LINE):
        return lettered(
            by_words({"crashes": (0.9, 0.05, 0.05), "How do I": (0.1, 0.1, 0.8)}, (0.3, 0.6, 0.1))
        )(asked)
    if asked.body.get("response_format"):
        text = json.dumps(STRUCTURED)
    elif "choice" in structure:
        text = next((c for c in structure["choice"] if c[:3] in asked.prompt.lower()), structure["choice"][0])
    else:
        text = next((answer for word, answer in WORDS.items() if word in asked.prompt), "I do not know.")
    reply = usual(asked)
    choice = reply.body["choices"][0]
    choice.update({"text": text} if "text" in choice else {"message": {"content": text}})
    return reply


def printed(work: Callable[[], object]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        work()
    return said.getvalue()


@pytest.fixture
def url(server: ScriptedServer) -> str:
    server.script = knows
    return server.url


def test_first_answers(url: str) -> None:
    """A question and its answer on each line."""
    said = printed(lambda: first_answers.main(url)).splitlines()
    assert said == [
        "What is the capital of France? -> Paris.",
        "What colour is a ruby? -> Red.",
        "How many days does a week have? -> Seven.",
    ]


def test_a_table(url: str, tmp_path: Path) -> None:
    """Keys stay as they are in the file; a line that cannot be read is an error of its row."""
    first, second, empty, *rows = printed(lambda: table.main(url, tmp_path)).splitlines()
    assert first == "first run: 3 outputs, 1 errors"
    assert second == "second run: 4 of 4 rows were up to date, none was sent"
    assert empty == ""
    assert [row.partition(" -> ")[0] for row in rows] == ["007", "008", "009", "010"]
    assert "cells" in rows[2]


def test_structured_output(url: str, tmp_path: Path) -> None:
    """A column for each property, with its type."""
    _, types, *rows = printed(lambda: structured_output.main(url, tmp_path)).splitlines()
    assert types == "{'product': 'string', 'mood': 'string', 'stars': 'int64'}"
    assert rows == [str({"id": i, **STRUCTURED}) for i in (1, 2, 3)]


def test_embeddings(server: ScriptedServer, tmp_path: Path) -> None:
    """A text is nearest to itself, and a second run sends nothing."""
    lamp = "Nice lamp, but it took three weeks."
    said = printed(lambda: embeddings.main(server.url, tmp_path, lamp)).splitlines()
    assert said[0] == "3 vectors of 4 numbers; again: 0 sent"
    assert said[1].startswith(f"{lamp} -> ")


def test_classification(url: str, tmp_path: Path) -> None:
    """A label and its probability on each line; rows that are not sure are for a person."""
    report, *rows = printed(lambda: classification.main(url, tmp_path)).splitlines()
    assert "2 are for review" in report
    assert rows == [
        "1 bug 0.90",
        "2 feature 0.60  <- for a person",
        "3 question 0.80",
        "4 feature 0.60  <- for a person",
    ]


def test_a_validation_with_a_gate(url: str, tmp_path: Path) -> None:
    """Three of eight answers are right; the second limit is one that no answer holds."""
    values = printed(lambda: validation.main(url, tmp_path)).splitlines()
    assert values[0].startswith("contains: 0.375 (")
    assert values[2] == "passed: True"
    assert values[3].startswith("GateFailed: capitals did not pass: capitals: output_tokens is 5")


def test_a_flow_with_a_schedule(url: str, tmp_path: Path) -> None:
    """The second night processes the new row only."""
    said = printed(lambda: scheduled_flow.main(url, tmp_path)).splitlines()
    assert [line for line in said if "night:" in line] == [
        "first night: 1 row processed",
        "second night: 1 row processed",
    ]
    assert said[-1].startswith("with --serve it runs on the schedule 0 2 * * *")


def test_two_models_compared(url: str, tmp_path: Path) -> None:
    """A line for each metric and model, against the first one."""
    head, *lines = printed(lambda: compare_models.main(url, tmp_path)).splitlines()
    assert head == "against greedy:"
    assert len(lines) == 4
    assert "p=" in lines[1]


def test_a_prompt_function_with_artifacts(url: str, server: ScriptedServer, tmp_path: Path) -> None:
    """The model gets rules, examples and text as a chat."""
    said = printed(lambda: prompt_function.main(url, tmp_path)).splitlines()
    assert [line.split(maxsplit=1)[1] for line in said] == prompt_function.TEXTS
    messages = server.posts[0].body["messages"]
    assert messages[0]["content"].endswith("Style: terse.")
    assert len(messages) == 2 + 2 * len(prompt_function.SHOTS)


def cells() -> str:
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    return "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")


def test_the_notebook(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook's cells run from the first to the last."""
    monkeypatch.setenv("VLLM_TASKS_API_URL", url)
    names: dict[str, Any] = {"__name__": "__main__"}
    said = printed(lambda: exec(cells(), names))
    assert "nothing is committed" in said
    assert "3 outputs, 0 rows were up to date" in said
    assert "1 Paris. (5 tokens)" in said
    assert "4 | stop | 5 tokens" in said


@pytest.mark.engine
def test_an_example_runs_the_engine_itself(local_model: VllmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a URL an example runs its own engine; here with the tests' tiny model."""

    def tiny(_: str, **fields: Any) -> VllmModel:
        return local_model.model_copy(update={"prompt": fields["prompt"]})

    monkeypatch.setattr(first_answers, "make_model", tiny)
    assert printed(lambda: first_answers.main()).count(" -> ") == 3


def test_every_example_is_tested() -> None:
    """A new example needs a test here."""
    tested = Path(__file__).read_text()
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"__init__", "which_model"}
    assert not [name for name in names if f"{name}.main(" not in tested]
