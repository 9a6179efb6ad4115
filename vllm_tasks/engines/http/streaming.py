"""Streamed answers, put together: what came in pieces becomes what would have come whole.

For gateways that close a connection on which nothing moves for a while. The pieces are server-sent events
(https://html.spec.whatwg.org/multipage/server-sent-events.html) in OpenAI's format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vllm_tasks.engines.wire import UNFIT, WrongShape, wrong

EVENTS = "text/event-stream"
"""Content type of an answer that comes in pieces."""
LAST = b"[DONE]"
"""The event after which nothing comes."""
INDEXED = {"choices", "tool_calls"}
GROWING = {"text", "content", "reasoning", "reasoning_content", "refusal", "arguments"}
"""Texts of which each piece is the next part. Other texts and numbers are whole when they come."""


class Ended(Exception):
    """A stream ended before its answer did."""


def streamed(body: dict[str, Any]) -> dict[str, Any]:
    """The body of a request whose answer shall come in pieces, with the counts of tokens as the last one."""
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


class Pieces:
    """The answer of one stream, as far as it has come."""

    def __init__(self) -> None:
        self._answer: dict[str, Any] = {}
        self._unread = b""
        self._ended = False
        self.last = b""
        """What came in the newest event."""

    def take(self, content: bytes) -> None:
        """Add what came next; raises `WrongShape` for what is no piece of an answer."""
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
                raise WrongShape(f"a piece of the stream does not fit those before it: {error!r}") from error

    def _events(self, content: bytes) -> Iterator[bytes]:
        """The data of the complete events. Comments, by which gateways keep connections, have none."""
        *lines, self._unread = (self._unread + content).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()

    @property
    def status(self) -> int:
        """200, or the HTTP status of an error that came in place of the rest."""
        error = self._answer.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and 400 <= code < 600:
            return code
        return 500 if error else 200

    def whole(self) -> dict[str, Any]:
        """The answer in the shape of one that was not streamed; raises `Ended` where its end is missing."""
        if self.status != 200:
            return self._answer
        choices = self._answer.get("choices") or []
        if not self._ended or not all(choice.get("finish_reason") for choice in choices):
            raise Ended("the stream ended before the answer did")
        for choice in choices:
            if "delta" in choice:
                choice["message"] = message = choice.pop("delta")
                for call in message.get("tool_calls") or ():
                    call.pop("index", None)
        return self._answer


def grow(answer: dict[str, Any], piece: dict[str, Any]) -> None:
    """Add a piece: what has an index to what is there by that index, lists and growing texts at the end."""
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
