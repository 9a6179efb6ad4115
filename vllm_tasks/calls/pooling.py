"""The tasks of a model that return numbers: their answers, and what does not go together with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_tasks.calls.datatypes import OUTPUT, AnswerType
from vllm_tasks.calls.sampling_table import POOLING_REQUEST
from vllm_tasks.datalayer.selection import CLASS_COLUMNS, OutputColumn
from vllm_tasks.rows import Choice, Task

TEXTS_ONLY = {
    "datatype": "sets the type of generated text",
    "output_schema": "constrains generated text",
    "flatten": "makes rows of a list in generated text",
    "stream": "receives generated text token by token",
    "images": "is part of a chat message",
    "audio": "is part of a chat message",
    "video": "is part of a chat message",
    "keep": "names columns of generated text",
    "check": "checks generated text",
    "repair": "repeats generated text",
    "resample": "repeats generated text",
}
"""Fields of models that are for generating text alone, with the reason."""


def returns_numbers(task: Task | None) -> bool:
    """Return whether a model with this task returns numbers instead of text; None is `generate`."""
    return task in POOLING_REQUEST


def refuse_text_fields(task: Task, given: Iterable[str]) -> None:
    """Raise ValueError for the first of the fields `given` that is for generated text alone."""
    for name in given:
        if name in TEXTS_ONLY:
            raise ValueError(f"{name} {TEXTS_ONLY[name]}, and task={task!r} returns numbers: leave it out")


def task_type(task: Task) -> AnswerType:
    """Return the answer type of a task that returns numbers."""
    columns, read = {
        "embed": ((OutputColumn(OUTPUT, "vector"),), _vector),
        "classify": (CLASS_COLUMNS, _classes),
    }.get(task, ((OutputColumn(OUTPUT, "float"),), _number))
    return AnswerType(
        columns, read, identity=lambda: {"task": task}, by_name=len(columns) > 1, may_be_list=False
    )


def _vector(choice: Choice) -> list[float]:
    assert choice.data is not None, "the engine has read a response of this task"
    return choice.data


def _number(choice: Choice) -> float:
    return _vector(choice)[0]


def _classes(choice: Choice) -> dict[str, Any]:
    """The probabilities are in the order of the model's configuration, whose names no server sends."""
    probabilities = _vector(choice)
    best = max(probabilities)
    # A model whose configuration names no classes has their numbers.
    label = choice.text or str(probabilities.index(best))
    return {"label": label, "probability": best, "probabilities": probabilities}
