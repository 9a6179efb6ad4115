"""The bytes of a CSV file in blocks, for Arrow's parser, with a mark behind the last record."""

from __future__ import annotations

import codecs
import secrets
import threading

from vllm_tasks.datalayer.sources.byte_stream import Damaged
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.read_options import ReadOptions
from vllm_tasks.datalayer.sources.text_file import WRONG_BYTES, decoder_of, opened

AHEAD = 3
"""Blocks that Arrow may have beyond the batches it has given. It reads ahead by 32 when it is let."""
STALLED = 0.05
"""Seconds after which a block more is given to a parser that somebody waits for."""


class NotUtf8(Exception):
    """A text has half a character or a wrong byte, with which Arrow could not report a bad record."""


class Blocks:
    """A file as Arrow reads it: UTF-8 without a byte order mark; `NotUtf8` where that cannot be, unless it is
    `widened`: each byte of UTF-8, good or wrong, is a character of its own.

    Behind the end stands a record that is nowhere else, `mark`. Where the parser does not find it as a record
    of its own, the last record has swallowed it: a quote in it was never closed, or the file is damaged.
    """

    def __init__(self, file: DataFile, options: ReadOptions, size: int, widened: bool) -> None:
        self.size, self.widened = size, widened
        self.mark = f"vllm tasks end {secrets.token_hex(16)}"
        self.damage: str | None = None
        self.closed = False
        self.raw = opened(file, options.encoding)
        self.decoder = codecs.getincrementaldecoder(decoder_of(options.encoding))(WRONG_BYTES)
        self._given = self._taken = 0
        self._ended = False
        self._awaited = False
        self._change = threading.Condition()

    def readable(self) -> bool:
        return True

    def read(self, _most: int = -1) -> bytes:
        """The next block, as soon as the parser should have it."""
        with self._change:
            while not self._wanted():
                if not self._change.wait(STALLED) and self._awaited:
                    break
            self._given += 1
        return b"" if self.closed else self._next()

    def _wanted(self) -> bool:
        return self.closed or self._given - self._taken < AHEAD

    def awaited(self) -> None:
        """Somebody waits for a batch."""
        self._awaited = True

    def taken(self) -> None:
        """A batch came: there is one for each block."""
        with self._change:
            self._awaited = False
            self._taken += 1
            self._change.notify_all()

    def _next(self) -> bytes:
        while not self._ended:
            if block := self._encoded(self._read()):
                return block
        return b""

    def _read(self) -> bytes:
        """`size` bytes, fewer at the end of the file."""
        found = bytearray()
        while len(found) < self.size and not self._ended:
            try:
                more = self.raw.read1(self.size - len(found))
            except Damaged as e:
                self.damage = str(e)
                more = b""
            found += more
            self._ended = not more
        return bytes(found)

    def _encoded(self, found: bytes) -> bytes:
        text = self.decoder.decode(found, self._ended)
        try:
            found = text.encode()
        except UnicodeEncodeError as e:
            if not self.widened:
                raise NotUtf8 from e
            found = text.encode("utf-8", WRONG_BYTES)
        if self.widened:
            found = found.decode("latin-1").encode()
        if not self._ended:
            return found
        # Without a line break behind damage: the record that is cut there is none.
        return found + f"{'' if self.damage else chr(10)}{self.mark}\n".encode()

    def close(self) -> None:
        with self._change:
            self.closed = True
            self._change.notify_all()
        self.raw.close()
