"""The JSON texts of a file: JSON lines, or the objects of a document, with their line numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import TextIOWrapper
from itertools import chain
from typing import Any

from vllm_tasks.datalayer.sources import Unreadable
from vllm_tasks.datalayer.sources.byte_stream import Damaged
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.read_options import ReadOptions
from vllm_tasks.datalayer.sources.text_file import text_of
from vllm_tasks.datalayer.values import from_json

CHUNK = 1 << 20
"""Characters of a document that are read at once."""
LONGEST = 1 << 30
"""Maximum characters of an object in a document."""
NEAR_END = 20
"""Characters at the end of a chunk in which a literal, number or escape of JSON may be incomplete."""


def json_texts(file: DataFile, options: ReadOptions, unreadable: Unreadable) -> Iterator[tuple[int, str]]:
    """(line, text) of each JSON text, without blank lines. Lost rows go to `unreadable`.

    A `.json` file has JSON lines if its first line is an object. Otherwise it is one document: an array of
    objects, or objects one after another. An error in a document ends it, because the beginning of the next
    object is unknown.
    """
    line = 0
    with text_of(file, options, newline="\n") as text:
        try:
            for line, found in _texts(file, text, unreadable):
                yield line, found
        except Damaged as e:
            unreadable.add(f"{file.display}, after line {line}", f"the file is damaged here: {e}")


def _texts(file: DataFile, text: TextIOWrapper, unreadable: Unreadable) -> Iterator[tuple[int, str]]:
    if file.kind == "jsonl":
        yield from _lines(text)
        return
    head = ""
    while (more := text.readline(CHUNK)) and not (head := head + more).strip():
        pass
    if _is_object(head):
        blank = head.count("\n") - head.lstrip().count("\n")
        lines = chain(["\n"] * blank, [head.lstrip()], text)
        yield from _lines(lines)
    else:
        yield from _Document(file, text, head, unreadable).objects()


def _lines(text: Any) -> Iterator[tuple[int, str]]:
    for line, found in enumerate(text, 1):
        if not found.isspace():
            yield line, found


def _is_object(text: str) -> bool:
    try:
        return isinstance(from_json(text), dict)
    except (ValueError, RecursionError):
        return False


class _Document:
    """A text with objects, in an array or one after another, read in chunks."""

    def __init__(self, file: DataFile, text: TextIOWrapper, head: str, unreadable: Unreadable) -> None:
        self.file, self.text, self.unreadable = file, text, unreadable
        self.buffer = head
        self.at = 0
        self.line = 1
        self.decode = json.JSONDecoder(parse_int=len).raw_decode  # a number may have any length

    def objects(self) -> Iterator[tuple[int, str]]:
        in_array = False
        while self._skip(" \t\r\n," if in_array else " \t\r\n"):
            sign = self.buffer[self.at]
            if sign == ("]" if in_array else "["):
                in_array = not in_array
                self.at += 1
                continue
            end = self._end()
            if end is None:
                return
            yield self.line, self.buffer[self.at : end]
            self._go(end)
        if in_array:
            self._lost("the file ends within its array; it is truncated")

    def _skip(self, signs: str) -> bool:
        """Skip these characters; returns whether anything follows."""
        while True:
            rest = self.buffer[self.at : self.at + 1]
            if rest and rest not in signs:
                return True
            if rest:
                self._go(self.at + 1)
            elif not self._more():
                return False

    def _go(self, at: int) -> None:
        self.line += self.buffer.count("\n", self.at, at)
        self.at = at

    def _more(self) -> bool:
        """Double the buffer, so that a long object is not parsed often."""
        rest = self.buffer[self.at :]
        more = self.text.read(max(CHUNK, len(rest)))
        self.buffer, self.at = rest + more, 0
        return bool(more)

    def _end(self) -> int | None:
        """The position after the value that begins here; None, after reporting it, if there is no end."""
        while True:
            try:
                return self.decode(self.buffer, self.at)[1]
            except RecursionError:
                why, truncated = "nested too deeply", False
            except json.JSONDecodeError as e:
                truncated = e.msg.startswith("Unterminated") or e.pos > len(self.buffer) - NEAR_END
                why = f"no JSON: {e.msg}"
            except ValueError as e:
                why, truncated = str(e), False
            if truncated and len(self.buffer) - self.at > LONGEST:
                why = f"an object has more than {LONGEST >> 30} GiB, or a text in it has no end"
                truncated = False
            if not truncated or not self._more():
                self._lost(why)
                return None

    def _lost(self, why: str) -> None:
        self.unreadable.add(
            f"{self.file.display}, line {self.line}",
            f"{why}; nothing after this object can be read. Correct it, or use .jsonl with one object a line",
        )
