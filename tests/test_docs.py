"""The code blocks of README and documentation run as they are printed, and print the output on the page.

Python runs, from the first block of a page to the last. Commands of a shell are parsed: each program, its
subcommand and its options exist. YAML is read as deployments or triggers of Prefect.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.flows import load_flow_from_entrypoint

from benchmarks import __main__ as benchmarks
from benchmarks import options as bench_options
from benchmarks.peers import plan as peers
from docs import figures
from tests.conftest import IN_PREFECT
from tests.eventually import LONG_ENOUGH
from tests.lettered import by_words, lettered
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, usual
from vllm_tasks import reference_set
from vllm_tasks._cli import app as command_line
from vllm_tasks._cli import job
from vllm_tasks.calls.classes import LAST_LINE
from vllm_tasks.flows.batch_predict import batch_predict
from vllm_tasks.flows.validate_model import validate_model
from vllm_tasks.pools import __main__ as pools
from vllm_tasks.settings import Settings

pytestmark = IN_PREFECT

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COPIED = ("project/changelog.md", "project/results.md", "project/security.md", "design.md")
"""Pages that include other files, and the page for developers."""
PAGES = [
    ROOT / "README.md",
    ROOT / "vllm_tasks" / "_cli" / "template" / "README.md",
    *sorted(p for p in DOCS.rglob("*.md") if str(p.relative_to(DOCS)) not in COPIED),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL
)
SERVER = "http://127.0.0.1:8000"
"""The address of `vllm serve` on the pages."""
PUBLIC = {
    "vllm_tasks": {
        *("VllmAPI", "VllmModel", "Datalayer", "Artifact", "Dataset", "Metric", "Validation"),
        *(
            "predict",
            "predict_batches",
            "predict_in_db",
            "validate",
            "compare",
            "preview",
            "estimate",
            "serve",
        ),
        *("Classes", "DataType", "Request", "RowError", "InvalidCall", "GateFailed"),
        *("batch_request", "export_batch", "export_batch_results", "reference_set"),
    },
    "vllm_tasks.errors": {"VllmTasksError", "RowErrors", "TooManyFailed", "ServerUnavailable"},
    "vllm_tasks.tasks": {"completions"},
}
"""The names that pages may import, by module."""
ANSWERS = {
    "Translate to French: good morning": "bonjour",
    "Translate to French: one": "un",
    "Translate to French: two": "deux",
    "good morning": "bonjour",
    "bread in Italian": "pane",
    "What animal is this?": "cat",
    "Answer in German": "Passwort zurücksetzen.",
    "Is this urgent? Answer yes or no.\nThe printer is on fire": "yes",
    "Is this ticket urgent? Answer yes or no.\nThe printer is on fire": "yes",
    "Answer yes or no": "no",
    "yes or no.\nI do not know": "I do not know.",
    "Answer again, with the corrected answer": "no",
    "How many percent?": "50%",
    "Who is it, and how old?": '{"name": "Ada", "age": 36}',
    "List the goods": '["bread", "salt"]',
    "capital of France": "Paris.",
    "capital of Italy": "Rome.",
    "capital of Spain": "Madrid.",
    "capital of Japan": "Kyoto.",
}
"""The answers of the model on the pages; the longest text that occurs in a prompt decides."""
LETTERS = {"printer is on fire": (0.97, 0.03), "Dark mode": (0.1, 0.9), "It is slow": (0.6, 0.4)}
"""How probable the model on the pages finds the letters of classes."""
README_ANSWERS = {
    "capital of France": "The capital of France is Paris.",
    "colour is a ruby": "A ruby is a deep, fiery, and often fiery-red gemstone.",
    "2 + 2": 'The answer is "2 + 2 = 4."',
}
"""Answers of SmolLM2-135M-Instruct from a real server."""


def blocks(page: Path, language: str) -> list[tuple[int, str, str]]:
    """(line, text, output) of each block in a language; a text block is the output of the block before it."""
    text = page.read_text(encoding="utf-8")
    found: list[tuple[int, str, str, str]] = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        if match["language"] == "text":
            assert found, f"{page.name}, line {line}: a text block says what a block before it prints"
            line, code, _, of = found.pop()
            found.append((line, code, body, of))
        else:
            found.append((line, body, "", match["language"]))
    return [(line, code, prints) for line, code, prints, of in found if of == language]


def model_of(answers: dict[str, str]) -> Callable[[Asked], Reply | None]:
    """A server's script: the answers of the model that the pages were written with."""

    def answer(asked: Asked) -> Reply | None:
        if asked.path not in ("/v1/completions", "/v1/chat/completions"):
            return None
        if isinstance(asked.prompt, str) and asked.prompt.endswith(LAST_LINE):  # else token ids
            return lettered(by_words(LETTERS))(asked)
        known = [words for words in answers if words in asked.prompt]
        if not known:
            return None
        reply = usual(asked)
        for choice in reply.body["choices"]:
            text = answers[max(known, key=len)]
            choice.update({"text": text} if "text" in choice else {"message": {"content": text}})
        return reply

    return answer


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_prints_what_the_page_says(
    page: Path, tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of a page run in one folder, from the first to the last, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_TASKS_API_URL", server.url)
    server.script = model_of(ANSWERS | (README_ANSWERS if page.name == "README.md" else {}))
    # A file, as for a script: the source of its functions is read from it.
    script = tmp_path / f"{page.stem.replace('-', '_')}_page.py"
    names: dict[str, Any] = {"__name__": script.stem, "__file__": str(script)}
    monkeypatch.setitem(sys.modules, script.stem, type(sys)(script.stem))
    source = ""
    for line, code, expected in blocks(page, "python"):
        # Blank lines before it, so that an error names the line of the page.
        source += "\n" * (line - 1 - source.count("\n")) + code.replace(SERVER, server.url)
        script.write_text(source, encoding="utf-8")
        printed = io.StringIO()
        alone = "\n" * (line - 1) + code.replace(SERVER, server.url)
        with contextlib.redirect_stdout(printed):
            exec(compile(alone, str(script), "exec"), names)
        if expected:
            assert printed.getvalue() == expected, f"{page.name}, line {line}"
        else:
            assert not printed.getvalue(), f"{page.name}, line {line} prints what the page does not say"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_pages_import_public_names(page: Path) -> None:
    """Pages import a few names from the package and a few modules, and nothing that may move."""
    for line, code, _ in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm_tasks"):
                unknown = {name.name for name in node.names} - set(PUBLIC.get(node.module or "", ()))
                assert not unknown, f"{page.name}, line {line}: {node.module} has no public {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_is_checked(page: Path) -> None:
    """Every block has a language, and there are no other languages."""
    languages = {match["language"] for match in BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert languages <= {"python", "sh", "yaml", "toml", "text"}


# ---------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page: Path) -> None:
    """Each line is a valid command: its program, subcommand and options exist."""
    for line, text, prints in blocks(page, "sh"):
        if prints and " --set " in text:
            of_reference_set(prints)
        elif prints and "make demo" in text:
            of_demo(prints)
        for command in text.splitlines():
            words = shlex.split(command, comments=True)
            if not words:
                continue
            assert words[0] in PROGRAMS, f"{page.name}, line {line}: {command}"
            PROGRAMS[words[0]](words[1:])


def of_demo(prints: str) -> None:
    """The quoted output of the demo has its headings, and a count that adds up."""
    source = (ROOT / "flows" / "demo.py").read_text()
    for heading in re.findall(r"^\S.*:$", prints, re.MULTILINE):
        assert heading in source
    right, rows, share = re.search(r"all +(\d+) of (\d+) = ([\d.]+)%", prints).groups()  # type: ignore[union-attr]
    assert f"{int(right) / int(rows):.1%}" == f"{share}%"
    questions = (ROOT / "flows" / "data" / "questions.jsonl").read_text()
    assert int(rows) == len(questions.splitlines())
    for question in re.findall(r"\] (.+?) ->", prints):
        assert question in questions


def of_reference_set(prints: str) -> None:
    """The quoted values have the metrics of the set, and its number of rows."""
    name, metrics = prints.split(": ")[1], re.findall(r": (\w+) [\d.]+ \(", prints)
    found = reference_set(name)  # type: ignore[arg-type]
    assert metrics == [metric.identifier for metric in found.validation.metrics]
    assert prints.count(f"n={len(found.rows)})") == len(metrics)


def make(words: list[str]) -> None:
    target, *variables = words
    makefile = (ROOT / "Makefile").read_text()
    pattern = re.sub(r"^bench-.+", "bench-%", target)
    assert re.search(rf"^{re.escape(pattern)}:", makefile, re.MULTILINE), f"make has no target {target!r}"
    if pattern == "bench-%":
        assert target.removeprefix("bench-") in benchmarks.MEASURES
    arguments = shlex.split(next((v.removeprefix("ARGS=") for v in variables), ""))
    if arguments:
        ARGUMENTS[target](arguments)


ARGUMENTS: dict[str, Callable[[list[str]], object]] = {
    "pools": pools.parse,
    "bench": lambda words: bench_options.parse(words, tuple(benchmarks.MEASURES)),
    "peers": peers.parse,
}


def pip(words: list[str]) -> None:
    assert words[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[1:]:
        name, _, extras = word.rstrip("]").partition("[")
        if name in ("vllm-tasks", "."):
            assert set(filter(None, extras.split(","))) <= project["optional-dependencies"].keys()


def python(words: list[str]) -> None:
    """`python -m module --option value`: the module is there and has the option."""
    if words[0].endswith(".py"):  # of the folder that `init` writes
        assert words == ["tickets.py"]
        return
    assert words[0] == "-m"
    if words[1] == "vllm.entrypoints.openai.api_server":
        vllm(["serve", *words[2:]])
        return
    if words[1] == "vllm_tasks":
        command_line.app.parse_args(words[2:])
        return
    source = file_of(words[1]).read_text()
    if "import serve\n" in source:
        source += file_of("vllm_tasks.flows._serve").read_text()
    for option in (word for word in words[2:] if word.startswith("-")):
        assert f'"{option}"' in source, f"{words[1]} has no option {option}"


def file_of(module: str) -> Path:
    """The file of a module, or of the command of a package."""
    path = module.replace(".", "/")
    for file in (ROOT / f"{path}.py", ROOT / path / "__main__.py"):
        if file.exists():
            return file
    raise AssertionError(f"there is no module {module}")


def prefect(words: list[str]) -> None:
    subcommand = []
    for word in (word for word in words if word != "--no-prompt"):
        if word.startswith("-") or "." in word:
            break
        subcommand.append(word)
    assert "--no-prompt" not in words or "--prompt" in help_of()
    text = help_of(*subcommand)
    for option in (word for word in words if word.startswith("-") and word != "--no-prompt"):
        assert re.search(rf"(^|[\s,]){option}\b", text, re.MULTILINE), f"prefect {subcommand}: {option}"


@cache
def help_of(*subcommand: str) -> str:
    command = [sys.executable, "-m", "prefect", *subcommand, "--help"]
    wide = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_ENOUGH, env=wide)
    assert done.returncode == 0, f"prefect {' '.join(subcommand)}: {done.stdout}{done.stderr}"
    return done.stdout


def vllm(words: list[str]) -> None:
    """`vllm serve MODEL`: an option is a field of its arguments, which are read and not imported."""
    assert words[0] == "serve"
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return
    folder = Path(found.submodule_search_locations[0])
    files = [folder / "engine" / "arg_utils.py", *folder.glob("entrypoints/**/cli_args.py")]
    source = "".join(file.read_text() for file in files)
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"^    {option[2:].replace('-', '_')}\s*:", source, re.MULTILINE), option


def docker(words: list[str]) -> None:
    assert words[0] == "build"
    dockerfile = (ROOT / "Dockerfile").read_text()
    for word in words:
        if re.fullmatch(r"[A-Z]+=.+", word):
            assert f"ARG {word.partition('=')[0]}=" in dockerfile
        assert not word.startswith("-") or word in ("-t", "--build-arg")


def export(words: list[str]) -> None:
    for word in words:
        name, equals, _ = word.partition("=")
        assert equals
        assert name == "PATH" or name.startswith("PREFECT_") or name in settings()


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "make": make,
    "pip": pip,
    "python": python,
    "prefect": prefect,
    "vllm": vllm,
    "docker": docker,
    "export": export,
}


def settings() -> set[str]:
    """The variables that the code reads."""
    return {f"VLLM_TASKS_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_settings_that_pages_name_exist(page: Path) -> None:
    """A variable that nothing reads would have no effect."""
    named = set(re.findall(r"VLLM_TASKS_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")))
    assert named <= settings()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_toml_names_settings(page: Path) -> None:
    for _, text, _ in blocks(page, "toml"):
        assert tomllib.loads(text)["integrations"]["vllm_tasks"].keys() <= Settings.model_fields.keys()


# ---------------------------------------------------------------------- YAML


def yaml_blocks() -> Iterator[tuple[str, dict[str, Any]]]:
    for page, name in zip(PAGES, NAMES, strict=True):
        for line, text, _ in blocks(page, "yaml"):
            yield f"{name}, line {line}", yaml.safe_load(text)


@pytest.mark.parametrize(("where", "data"), list(yaml_blocks()), ids=[where for where, _ in yaml_blocks()])
def test_yaml_is_what_prefect_reads(where: str, data: dict[str, Any], tmp_path: Path) -> None:
    """Deployments name existing flows and parameters; triggers are valid for Prefect, job files for us."""
    if "model" in data:
        file = tmp_path / "job.yaml"
        file.write_text(yaml.safe_dump(data))
        job.read(file, batch_predict if "select" in data else validate_model)
        return
    example = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    assert data.keys() <= example.keys() | {"triggers"}, where
    for deployment in data.get("deployments", ()):
        known = set().union(*example["deployments"])
        assert deployment.keys() <= known, where
        flow = load_flow_from_entrypoint(deployment["entrypoint"])
        for schedule in deployment.get("schedules", ()):
            assert schedule["parameters"].keys() <= flow.parameters.properties.keys(), where
    for trigger in data.get("triggers", ()):
        DeploymentEventTrigger.model_validate({"type": "event", **trigger})


# ---------------------------------------------------------------------- links and copies


def test_links_of_the_readme_lead_somewhere() -> None:
    """Each link is a complete address, or a file of the repository."""
    for link in re.findall(r"\]\((\S+?)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert link.startswith("https://") or (ROOT / link.partition("#")[0]).is_file(), link


def test_the_readme_is_short() -> None:
    """The README is a first page, not a manual."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


def test_figures_are_copied() -> None:
    """`make docs-figures` changes nothing: no figure was written by hand, and llms.txt lists all pages."""
    for page, text in figures.written().items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: run `make docs-figures`"


def test_every_page_is_in_the_site_and_answers_one_question() -> None:
    """The question is the first line of the page."""
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.SafeLoader)
    listed = {page for _, page in figures.pages_of(site["nav"]) if page is not None}
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert not [page for page in listed - set(COPIED) if not figures.question_of(DOCS / page)]


def test_examples_are_named_as_they_are() -> None:
    """Every file of examples/ that a page names exists."""
    for page in PAGES:
        for name in re.findall(r"examples/(\w+\.\w+)", page.read_text(encoding="utf-8")):
            assert (ROOT / "examples" / name).exists(), f"{page.name}: {name}"
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs")], "the notebook is kept without outputs"
