"""The JSON texts of a file: lines of JSON, or the objects of a document, with the lines where they begin."""

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
"""Characters of an object in a document at most."""
NEAR_END = 20
"""Characters that the longest literal, number's end or escape of JSON may lack at the end of a chunk."""


def json_texts(file: DataFile, options: ReadOptions, unreadable: Unreadable) -> Iterator[tuple[int, str]]:
    """(line, text) of each; lines that are blank are none. What is lost for good goes to `unreadable`.

    A file `.json` has lines of JSON when its first one is an object, else it is one document: an array of
    objects, or objects one after another. A fault in a document ends it, since nothing says where the next
    object begins.
    """
    line = 0
    with text_of(file, options, newline="\n") as text:
        try:
            for line, found in _texts(file, text, unreadable):
                yield line, found
        except Damaged as e:
            unreadable.add(f"{file.display}, behind line {line}", f"the file is damaged here: {e}")


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
    """A text that holds objects, in an array or one after another; read in chunks."""

    def __init__(self, file: DataFile, text: TextIOWrapper, head: str, unreadable: Unreadable) -> None:
        self.file, self.text, self.unreadable = file, text, unreadable
        self.buffer = head
        self.at = 0
        self.line = 1
        self.decode = json.JSONDecoder().raw_decode

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
            self._lost("the file ends within its array; it is cut")

    def _skip(self, signs: str) -> bool:
        """Whether anything is behind these signs."""
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
        """Read as much again as there is; so a long object is not tried often."""
        rest = self.buffer[self.at :]
        more = self.text.read(max(CHUNK, len(rest)))
        self.buffer, self.at = rest + more, 0
        return bool(more)

    def _end(self) -> int | None:
        """Behind the value that begins here; None when there is no end, which is reported."""
        while True:
            try:
                return self.decode(self.buffer, self.at)[1]
            except RecursionError:
                why, cut = "nested too deeply", False
            except json.JSONDecodeError as e:
                cut = e.msg.startswith("Unterminated") or e.pos > len(self.buffer) - NEAR_END
                why = f"no JSON: {e.msg}"
            except ValueError as e:
                why, cut = str(e), False
            if cut and len(self.buffer) - self.at > LONGEST:
                why, cut = f"an object has more than {LONGEST >> 30} GiB, or a text in it has no end", False
            if not cut or not self._more():
                self._lost(why)
                return None

    def _lost(self, why: str) -> None:
        self.unreadable.add(
            f"{self.file.display}, line {self.line}",
            f"{why}; nothing behind this object can be read. Mend it, or write one object a line, as .jsonl",
        )
