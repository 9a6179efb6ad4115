"""Rows that are processed on a work pool: they travel as finished prompts and come back as answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from vllm_tasks.calls.call import Call
from vllm_tasks.errors import VllmTasksError
from vllm_tasks.placement import payload, storage
from vllm_tasks.placement.parameters import parameters
from vllm_tasks.placement.part import Part
from vllm_tasks.placement.payload import Model
from vllm_tasks.placement.runs import Runs
from vllm_tasks.placement.target import Target, target_of
from vllm_tasks.rows import Conversation, Request, Result, RowError

logger = logging.getLogger(__name__)


def routed(model: Model, call: Call) -> Call:
    """Return `call`, processed on the model's work pool if it has one.

    Args:
        model: The model; its hints or the settings name the pool.
        call: A call of this model.

    Returns:
        `call` itself if the step runs here, else a copy that sends its requests to the pool.

    Raises:
        InvalidCall: The pool does not exist, or it would drop one of the hints.
    """
    if (target := target_of(model)) is None:
        return call
    return replace(call, answerer=lambda requests: _on_pool(target, model, call.sampling, requests))


def _on_pool(
    target: Target, model: Model, sampling: Mapping[str, Any], requests: Sequence[Request | RowError]
) -> list[Result]:
    """The results of `requests`, processed by a flow run on `target`; errors among them stay as they are."""
    sent = [request for request in requests if isinstance(request, Request)]
    if not sent:
        return [request for request in requests if isinstance(request, RowError)]
    rows = storage.store(_as_data(sent, sampling))
    try:
        call = {"work": "rows", "rows": rows}
        part = Part(f"{model.identifier} - {len(sent):,} rows", parameters(call, model, None))
        (outcome,) = Runs(target, [part], repeatable=True).outcomes()
        assert outcome  # only a part beside others may have none
    finally:
        storage.discard(rows)
    path = payload.answers_path(outcome)
    try:
        payload.value_of(outcome)
    except VllmTasksError as error:
        try:
            error.results = _results(path, requests)
        except VllmTasksError as lost:  # what failed first is what the caller has to know
            logger.warning("the answers of the rows that were processed could not be loaded: %s", lost)
        raise error
    return cast(list[Result], _results(path, requests))


def _as_data(requests: Sequence[Request], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The prompts, the sets of parameters (that of the call first), and the position of each row's set."""
    sets = {id(each): each for each in (sampling, *(request.sampling for request in requests))}
    places = {key: i for i, key in enumerate(sets)}
    # Texts travel as such: the flow run there knows whether they become chat.
    prompts = [r.prompt.text if isinstance(r.prompt, Conversation) else r.prompt for r in requests]
    return {
        "prompts": prompts,
        "parameters": [dict(each) for each in sets.values()],
        "of": [places[id(request.sampling)] for request in requests],
    }


def _results(path: str | None, requests: Sequence[Request | RowError]) -> list[Result | None] | None:
    """The answers that the storage has at `path`, merged with the rows that have no prompt."""
    if path is None:
        return None
    answers = iter(payload.results_of(storage.load(path)))
    storage.discard(path)
    found = [request if isinstance(request, RowError) else next(answers) for request in requests]
    # The flow run counted only the rows that were sent to it.
    return [replace(r, index=i) if isinstance(r, RowError) else r for i, r in enumerate(found)]
