"""Assembles streamed answers into the response that would have come without streaming.

Streaming is for gateways that close a connection which is idle for a while. The pieces are server-sent events
(https://html.spec.whatwg.org/multipage/server-sent-events.html) in OpenAI's format.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from vllm_tasks.engines.wire import UNFIT, WrongShape, status_of, wrong

EVENTS = "text/event-stream"
"""Content type of a streamed answer."""
LAST = b"[DONE]"
"""The data of the last event."""
INDEXED = {"choices", "tool_calls"}
GROWING = {"text", "content", "reasoning", "reasoning_content", "refusal", "arguments"}
"""Fields whose text arrives in parts. Other texts and numbers arrive complete."""


class Ended(Exception):
    """A stream ended before the answer was complete."""


def streamed(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a request for a streamed answer, with the token counts in the last piece."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


class Pieces:
    """The answer of one stream, as far as it has arrived."""

    def __init__(self) -> None:
        self._answer: dict[str, Any] = {}
        self._unread = b""
        self._ended = False
        self.last = b""
        """The data of the newest event."""

    def take(self, content: bytes) -> None:
        """Add the next bytes of the stream. Raises `WrongShape` if they are not a piece of an answer."""
        for data in self._events(content):
            self.last = data
            if data == LAST:
                self._ended = True
                continue
            piece = json.loads(data)
            if not isinstance(piece, dict):
                wrong("an object", piece)
            try:
                grow(self._answer, piece)
            except UNFIT as error:
                raise WrongShape(f"a piece of the stream does not fit earlier pieces: {error!r}") from error

    def _events(self, content: bytes) -> Iterator[bytes]:
        """The data of the complete events. Comments, which keep a connection open, have no data."""
        *lines, self._unread = (self._unread + content).split(b"\n")
        for line in lines:
            field = line.removeprefix(codecs.BOM_UTF8)  # one may stand before the first
            if field.startswith(b"data:"):
                yield field.removeprefix(b"data:").strip()

    @property
    def status(self) -> int:
        """200, or the HTTP status of an error that arrived in the stream."""
        return status_of(self._answer)

    def complete(self) -> dict[str, Any]:
        """The answer in the shape of one that was not streamed. Raises `Ended` if its end is missing, and
        `WrongShape` if it has no such shape."""
        if self.status != 200:
            return self._answer
        choices = self._answer.get("choices") or []
        # `transformers serve` has no last event, but token counts, which come at the end too.
        has_end = self._ended or bool(self._answer.get("usage"))
        if not has_end or not all(choice.get("finish_reason") for choice in choices):
            raise Ended("the stream ended before the answer was complete")
        try:
            for choice in choices:
                if "delta" in choice:
                    choice["message"] = message = choice.pop("delta") or {}
                    for call in message.get("tool_calls") or ():
                        call.pop("index", None)
        except UNFIT as error:
            raise WrongShape(f"the stream is not an answer in pieces: {error!r}") from error
        return self._answer


def grow(answer: dict[str, Any], piece: dict[str, Any]) -> None:
    """Merge a piece into the answer: items by their index, lists and partial texts by appending."""
    for name, value in piece.items():
        before = answer.get(name)
        if name in INDEXED and value:
            answer[name] = _grown_each(before or [], value)
        elif value is None or before is None:
            answer[name] = before if value is None else value
        elif isinstance(value, dict):
            grow(before, value)
        elif isinstance(value, list):
            before.extend(value)
        else:
            answer[name] = before + value if name in GROWING else value


def _grown_each(items: list[dict[str, Any]], pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_index = {item["index"]: item for item in items}
    for piece in pieces:
        grow(by_index.setdefault(piece.get("index", 0), {"index": piece.get("index", 0)}), piece)
    return list(by_index.values())
