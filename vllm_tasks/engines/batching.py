"""Splits the rows of a call into chunks, sends them, and returns the results in input order."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from vllm_tasks.engines import Done, Engine
from vllm_tasks.errors import VllmTasksError
from vllm_tasks.rows import Request, Result, RowError

T = TypeVar("T")
FollowUp = Callable[[Request, Result], Request | Result]
"""Returns the request that is sent next for a row, or its final result."""


def final(_request: Request, result: Result) -> Result:
    """Take every result as final."""
    return result


async def generate(
    engine: Engine,
    requests: Sequence[Request | RowError],
    max_batch_size: int | None,
    done: Done = lambda _i, _result: None,
    follow_up: FollowUp = final,
) -> list[Result]:
    """Process N requests with `engine` and return N results in input order.

    `done(i, result)` is called for each final result as it arrives, on the engine loop. A request that
    already is a `RowError` is returned at its position, without a call of `done`. Equal requests whose
    answers must be equal are sent once, requests with a common prefix are sent next to each other, and the
    engine's window is kept full with chunks of `max_batch_size` rows (None: one chunk).
    """
    results: list[Result | None] = [r if isinstance(r, RowError) else None for r in requests]

    def deliver(result: Result, positions: Sequence[int]) -> None:
        for i in positions:
            own = dataclasses.replace(result, index=i) if isinstance(result, RowError) else result
            results[i] = own
            done(i, own)

    async def enter(chunk: Sequence[tuple[Request, list[int]]], group: asyncio.TaskGroup) -> None:
        await engine.window.enter(len(chunk))
        send(chunk, group)

    def send(chunk: Sequence[tuple[Request, list[int]]], group: asyncio.TaskGroup) -> None:
        open_rows = len(chunk)

        def settle(i: int, result: Result) -> None:
            nonlocal open_rows
            open_rows -= 1
            engine.window.leave()
            request, positions = chunk[i]
            next_ = follow_up(request, result)
            if not isinstance(next_, Request):
                deliver(next_, positions)
                return
            further = enter([(next_, positions)], group)
            try:
                group.create_task(further)
            except RuntimeError:  # the call is ending; raised here, it would end the engine of other calls
                further.close()

        task = group.create_task(engine.generate([request for request, _ in chunk], settle))
        # A callback, because a task that is cancelled before its first step never reaches a `finally`.
        task.add_done_callback(lambda _: engine.window.leave(open_rows))

    try:
        async with asyncio.TaskGroup() as group:
            for chunk in chunks(side_by_side(fold(requests)), max_batch_size):
                await enter(chunk, group)
    except ExceptionGroup as failures:
        first = _first(failures)
        error = copy.copy(first)  # other calls may have failed with it and attach their own results
        if isinstance(error, VllmTasksError):
            error.results = results
        raise error from first.__cause__  # not from the group
    assert None not in results, "an engine returned from generate() before its last row was done"
    return cast(list[Result], results)


def in_rounds(
    process: Callable[[Sequence[Request | RowError]], list[Result]],
    requests: Sequence[Request | RowError],
    follow_up: FollowUp = final,
) -> list[Result]:
    """Process N requests by a function of many, and then all that follow, until every result is final."""
    results: list[Result | None] = [None] * len(requests)
    left = dict(enumerate(requests))
    while left:
        try:
            found = process(list(left.values()))
        except VllmTasksError as error:
            for i, known in zip(left, error.results or (), strict=False):
                results[i] = known
            error.results = results
            raise
        for (i, request), result in zip(list(left.items()), found, strict=True):
            next_ = follow_up(request, result) if isinstance(request, Request) else result
            if isinstance(next_, Request):
                left[i] = next_
            else:
                del left[i]
                results[i] = dataclasses.replace(next_, index=i) if isinstance(next_, RowError) else next_
    return cast(list[Result], results)


def _first(failures: ExceptionGroup[Exception]) -> Exception:
    """The first failure: chunks (and an engine's own tasks) that fail together fail for the same reason."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


def fold(requests: Sequence[Request | RowError]) -> list[tuple[Request, list[int]]]:
    """Group equal requests that must have equal answers, each group with its positions in `requests`."""
    groups: dict[tuple[int, str, str], tuple[Request, list[int]]] = {}
    alone: list[tuple[Request, list[int]]] = []
    for i, request in enumerate(requests):
        if isinstance(request, RowError):
            continue
        must_be_equal = request.task != "generate" or is_deterministic(request.sampling)
        if must_be_equal and request.record is None:  # a check may tell rows apart
            # Rows with the same parameters share the mapping itself, which is cheaper to compare.
            equal = id(request.sampling), request.task, _text_of(request)
            groups.setdefault(equal, (request, []))[1].append(i)
        else:
            alone.append((request, [i]))
    return [*groups.values(), *alone]


def is_deterministic(sampling: Mapping[str, Any]) -> bool:
    """Whether equal prompts must get equal answers: greedy sampling of a single choice.

    The temperature must be given, because the default of the server or model is unknown here.
    """
    return sampling.get("temperature") == 0 and sampling.get("n") in (None, 1)


def side_by_side(folded: Sequence[tuple[Request, T]]) -> list[tuple[Request, T]]:
    """Sort by text, so that prompts with a common prefix hit vLLM's prefix cache."""
    return sorted(folded, key=lambda entry: _text_of(entry[0]))


def sending_order(requests: Sequence[Request]) -> Iterator[int]:
    """The positions of requests in the order in which `generate` sends them."""
    for _, positions in side_by_side(fold(requests)):
        yield from positions


def chunks(items: Sequence[T], size: int | None) -> Iterator[Sequence[T]]:
    """Consecutive slices of `size` items; the last one may be shorter. None gives one slice."""
    step = size or max(len(items), 1)
    for start in range(0, len(items), step):
        yield items[start : start + step]


def _text_of(request: Request) -> str:
    """A text that is equal for equal requests of one call, and begins the same where their tokens do."""
    if isinstance(request.prompt, str):
        return "t" + request.prompt
    return "m" + json.dumps(request.prompt)
