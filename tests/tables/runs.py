"""Runs over a table: the prompts that were sent, changed models, answers by script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.places import Place
from tests.servers.scripted_server import Asked, Reply, ScriptedServer, usual
from vllm_tasks import InvalidCall, VllmAPI
from vllm_tasks.results import Report


def changed(model: VllmAPI, **fields: Any) -> VllmAPI:
    """The same model with other fields, checked as when made."""
    given = {name: getattr(model, name) for name in model.model_fields_set}
    return VllmAPI(**{**given, **fields})


class Sent:
    """The prompts that reached the server since the last call of this."""

    def __init__(self, server: ScriptedServer) -> None:
        self._server, self._seen = server, 0

    def __call__(self) -> list[str]:
        posts = self._server.posts
        new, self._seen = posts[self._seen :], len(posts)
        return sorted(asked.prompt for asked in new)


def ask(model: VllmAPI, **options: Any) -> Report:
    return model.predict_in_db("text", "rows", **{"max_failed": None, **options})


def says(text: str | Callable[[Asked], str]) -> Callable[[Asked], Reply | None]:
    """A script whose every answer has this text."""

    def script(asked: Asked) -> Reply | None:
        if "prompt" not in (asked.body or {}):
            return None
        reply = usual(asked)
        for choice in reply.body["choices"]:
            choice["text"] = text if isinstance(text, str) else text(asked)
        return reply

    return script


def there(place: Place) -> list[Any]:
    try:
        return place.outputs()
    except InvalidCall:  # not made yet
        return []
