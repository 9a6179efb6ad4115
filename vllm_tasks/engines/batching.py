"""From the rows of a call to chunks in flight and back, in input order."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from vllm_tasks.engines import Done, Engine
from vllm_tasks.errors import VllmTasksError
from vllm_tasks.rows import Request, Result, RowError

T = TypeVar("T")


async def answer(
    engine: Engine,
    requests: Sequence[Request | RowError],
    max_batch_size: int | None,
    done: Done = lambda _i, _result: None,
) -> list[Result]:
    """Answer N requests through `engine` and return N results in input order.

    `done(i, result)` hears of each answer at once, on the engine loop. A request that is a `RowError`
    already keeps its place and is not told of. Equal requests are asked once where
    their answers must be equal, requests with a common prefix go out side by side, and the
    engine's window is kept full with chunks of `max_batch_size` rows (None: one chunk).
    """
    results: list[Result | None] = [r if isinstance(r, RowError) else None for r in requests]

    def deliver(result: Result, positions: Sequence[int]) -> None:
        for i in positions:
            own = dataclasses.replace(result, index=i) if isinstance(result, RowError) else result
            results[i] = own
            done(i, own)

    def send(chunk: Sequence[tuple[Request, list[int]]], group: asyncio.TaskGroup) -> None:
        open_rows = len(chunk)

        def settle(i: int, result: Result) -> None:
            nonlocal open_rows
            open_rows -= 1
            engine.window.leave()
            deliver(result, chunk[i][1])

        task = group.create_task(engine.generate([request for request, _ in chunk], settle))
        # A callback, not a `finally`: a task cancelled before its first step runs neither.
        task.add_done_callback(lambda _: engine.window.leave(open_rows))

    try:
        async with asyncio.TaskGroup() as group:
            for chunk in chunks(side_by_side(fold(requests)), max_batch_size):
                await engine.window.enter(len(chunk))
                send(chunk, group)
    except ExceptionGroup as failures:
        first = _first(failures)
        error = copy.copy(first)  # other calls that failed for the same reason have results of their own
        if isinstance(error, VllmTasksError):
            error.results = results
        raise error from first.__cause__  # and not from the group
    assert None not in results, "an engine returned from generate() before its last row was done"
    return cast(list[Result], results)


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    """Chunks (and an engine's own tasks) that fail together fail for the same reason, the call's."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


def fold(requests: Sequence[Request | RowError]) -> list[tuple[Request, list[int]]]:
    """Group equal requests that have one answer; each group with its positions in `requests`."""
    groups: dict[str, tuple[Request, list[int]]] = {}
    alone: list[tuple[Request, list[int]]] = []
    for i, request in enumerate(requests):
        if isinstance(request, RowError):
            continue
        if is_deterministic(request.sampling):
            groups.setdefault(_text_of(request), (request, []))[1].append(i)
        else:
            alone.append((request, [i]))
    return [*groups.values(), *alone]


def is_deterministic(sampling: Mapping[str, Any]) -> bool:
    """Whether equal prompts must get equal answers: greedy, and one choice.

    The temperature must be given: the default of a server or model is not known here.
    """
    return sampling.get("temperature") == 0 and sampling.get("n") in (None, 1)


def side_by_side(folded: Sequence[tuple[Request, T]]) -> list[tuple[Request, T]]:
    """Sort by text, so that vLLM's prefix cache meets prompts with a common prefix together."""
    return sorted(folded, key=lambda entry: _text_of(entry[0]))


def sending_order(requests: Sequence[Request]) -> Iterator[int]:
    """The positions of requests in the order in which `answer` sends them."""
    for _, positions in side_by_side(fold(requests)):
        yield from positions


def chunks(items: Sequence[T], size: int | None) -> Iterator[Sequence[T]]:
    """Consecutive slices of `size` items, the last one shorter; None gives one slice."""
    step = size or max(len(items), 1)
    for start in range(0, len(items), step):
        yield items[start : start + step]


def _text_of(request: Request) -> str:
    """A text that equal requests of one call share, and that begins as their tokens do."""
    if isinstance(request.prompt, str):
        return "t" + request.prompt
    return "m" + json.dumps(request.prompt)
