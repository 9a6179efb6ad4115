"""The tables of the reference agree with the code: names, order and defaults."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from docs import figures
from tests.test_docs import settings
from vllm_tasks import (
    Datalayer,
    Dataset,
    Metric,
    RowError,
    Validation,
    VllmAPI,
    VllmModel,
    predict_in_db,
    validate,
)
from vllm_tasks.calls.kept import Keep, Kept
from vllm_tasks.datalayer.selection import CLASS_COLUMNS
from vllm_tasks.errors import VllmTasksError
from vllm_tasks.settings import Settings

DOCS = Path(__file__).parent.parent / "docs"
CODE = re.compile(r"`([^`]+)`")
SHARED = VllmAPI.model_fields.keys() & VllmModel.model_fields.keys()
VARIABLE = re.compile(r"^\| `(VLLM_TASKS_\w+)` \|([^|]*)\|", re.MULTILINE)


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    text = "\n" + (DOCS / page).read_text(encoding="utf-8")
    _, found, below = text.partition(f"\n{heading}\n")
    assert found, f"{page} has no {heading!r}"
    table = re.search(r"(^\|.*\n)+", below, re.MULTILINE)
    assert table is not None
    lines = [re.split(r"(?<!\\)\|", line.strip()[1:-1]) for line in table[0].splitlines()]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def parsed(cell: str) -> Any:
    """A default as the page writes it."""
    found = CODE.fullmatch(cell)
    return {"required": ..., "made": "made"}.get(cell, cell if found is None else found[1])


def default_of(model: type[BaseModel], name: str) -> Any:
    field = model.model_fields[name]
    if field.is_required():
        return ...
    if field.default is PydanticUndefined:
        return "made"
    return json.dumps(field.default) if isinstance(field.default, str) else repr(field.default)


@pytest.mark.parametrize(
    ("heading", "model", "names"),
    [
        ("## Both models", VllmAPI, SHARED),
        ("## VllmAPI", VllmAPI, VllmAPI.model_fields.keys() - SHARED),
        ("## VllmModel", VllmModel, VllmModel.model_fields.keys() - SHARED),
    ],
    ids=["both", "VllmAPI", "VllmModel"],
)
def test_parameters(heading: str, model: type[BaseModel], names: set[str]) -> None:
    """Every parameter is listed once, with its default."""
    found = {
        CODE.findall(name)[0]: parsed(default)
        for name, default, _ in rows("reference/parameters.md", heading)
    }
    assert found == {name: default_of(model, name) for name in names}


@pytest.mark.parametrize("model", [Validation, Dataset, Metric])
def test_fields_of_a_validation(model: type[BaseModel]) -> None:
    """Every field is listed in order, with its default."""
    found = {
        CODE.findall(name)[0]: parsed(default)
        for name, default, _ in rows("reference/arguments.md", f"### {model.__name__}")
    }
    assert list(found.items()) == [(name, default_of(model, name)) for name in model.model_fields]


def test_settings() -> None:
    """Every variable is listed once, with its default."""
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    found = {name: parsed(default.strip()) for name, default in VARIABLE.findall(page)}
    assert found.keys() == settings()
    code = {f"VLLM_TASKS_{name.upper()}": field.default for name, field in Settings.model_fields.items()}
    for name, default in found.items():
        value = code[name]
        said = "" if value in ("", None) else value if isinstance(value, str) else json.dumps(value)
        assert default == re.sub(r"\.0$", "", said), name


@pytest.mark.parametrize(
    ("heading", "task"), [("## predict_in_db", predict_in_db), ("## validate", validate)]
)
def test_arguments(heading: str, task: Any) -> None:
    """Every argument of the task is listed in order, with its default."""
    parameters = list(inspect.signature(task.fn).parameters.values())[1:]
    said = {
        CODE.findall(name)[0]: parsed(default)
        for name, default, _ in rows("reference/arguments.md", heading)
        if name != "any other"
    }
    code = {
        p.name: ...
        if p.default is p.empty
        else json.dumps(p.default)
        if isinstance(p.default, str)
        else repr(p.default)
        for p in parameters
        if p.kind is not p.VAR_KEYWORD
    }
    assert said == code
    assert list(said) == list(code)


def test_metrics() -> None:
    """Every built-in metric is listed, and the options on the page exist."""
    found: dict[str, str] = {}
    for names, _, options in rows("reference/metrics.md", "# Metrics"):
        found.update(dict.fromkeys(CODE.findall(names), options))
    assert found.keys() == set(figures.built_in())
    others = {"choices", "delimiter", "model", "rubric"}  # of the requests, not of the score
    for name, options in found.items():
        known = set(inspect.signature(figures.score_of(name)).parameters) | others
        named = re.findall(r"`(\w+)`(?=[ :,]|$)", re.sub(r"\(.*?\)|: a list of .*", "", options))
        assert set(named) <= known, name


def test_errors() -> None:
    """All kinds of row errors are listed in the order of the code, and all exceptions."""
    kinds = [CODE.findall(kind)[0] for kind, _ in rows("reference/errors.md", "## Kinds of row errors")]
    assert kinds == list(get_args(get_type_hints(RowError)["kind"]))
    exceptions = {CODE.findall(name)[0] for name, _ in rows("concepts/errors.md", "# What an error is")}
    own = [e for e in descendants(VllmTasksError) if e.__module__ == VllmTasksError.__module__]
    public = {e.__name__ for e in own if not e.__name__.startswith("_")}
    assert exceptions == public


def descendants(kind: type) -> set[type]:
    return {each for child in kind.__subclasses__() for each in {child} | descendants(child)}


def test_hints_and_write_options() -> None:
    """Every hint of `compute_kwargs` and every option of `model_update_kwargs` is listed."""
    table = {hint for names, *_ in rows("how-to/gpus.md", "## Hints") for hint in CODE.findall(names)}
    assert table | {"work_pool", "work_queue", "deployment"} == known("compute_kwargs")
    options = {CODE.findall(name)[0] for name, *_ in rows("how-to/outputs.md", "## Name the table")}
    assert options == known("model_update_kwargs")


def known(field: str) -> set[str]:
    """The names that a model accepts in a field, from its own refusal of another name."""
    with pytest.raises(ValueError, match="known are") as error:
        VllmAPI(identifier="m", **{field: {"nothing": 1}})
    return set(re.findall(r"\w+", str(error.value).partition("known are")[2].partition("[type=")[0]))


def test_read_options() -> None:
    """Each option of a text file is one that a datalayer takes."""
    values = {"encoding": "latin-1", "delimiter": ";", "quote": "'", "escape": "\\", "header": False}
    names = [CODE.findall(name)[0] for name, *_ in rows("how-to/sources.md", "## Read options")]
    assert names == [*values, "null_values"]
    Datalayer(url="data", read={"t": {**values, "null_values": ["-"]}})


def test_kept_columns() -> None:
    """Each name of `keep` is listed in the order of the code, with its column and its type."""
    types = {"str": "text", "json": "JSON", "float": "float"}
    names = get_args(Keep)
    said = [
        [CODE.findall(name)[0], CODE.findall(column)[0], kind]
        for name, column, kind, _ in rows("reference/outputs.md", "## Columns of `keep`")
    ]
    columns = Kept(names).columns
    assert said == [[f'"{n}"', c.name, types[c.kind]] for n, c in zip(names, columns, strict=True)]


def test_output_columns(tmp_path: Path, server: Any) -> None:
    """The columns of a real outputs table are those of the page."""
    (tmp_path / "t.csv").write_text("id,text\n1,one\n")
    db = Datalayer(url=str(tmp_path))
    model = VllmAPI(identifier="m", api_url=server.url)
    model.predict_in_db("text", "t", db=db)
    page = [
        name for names, *_ in rows("reference/outputs.md", "# Output columns") for name in CODE.findall(names)
    ]
    of_others = {"output_schema", "_position", "_review", *(column.name for column in CLASS_COLUMNS)}
    said = [name for name in page if name not in of_others]
    assert sorted(said) == sorted(set(db.outputs("m").column_names) - {"id"})


def test_metric_examples() -> None:
    """Each metric has one; that the values are right follows from the page being as it is generated."""
    named = [CODE.findall(cells[0])[0] for cells in rows("reference/metrics.md", "## An example of each")]
    assert sorted(named) == sorted(figures.built_in())


def test_numbers_of_answers() -> None:
    """The notations on the page have the numbers that it says."""
    for texts, number in rows("reference/metrics.md", "## The number of an answer"):
        for text in CODE.findall(texts):
            assert figures.score_of("numeric_match")(f"So it is {text}", number), text
