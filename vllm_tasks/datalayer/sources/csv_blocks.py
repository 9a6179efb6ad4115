"""The bytes of a CSV file in blocks for Arrow's parser, with a mark after the last record."""

from __future__ import annotations

import codecs
import secrets
import threading

from vllm_tasks.datalayer.sources.byte_stream import Damaged
from vllm_tasks.datalayer.sources.csv_quotes import Quotes
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.read_options import ReadOptions
from vllm_tasks.datalayer.sources.text_file import WRONG_BYTES, decoder_of, opened

AHEAD = 3
"""Blocks that Arrow may have beyond the batches it has returned. Without a limit it reads 32 ahead."""
STALLED = 0.05
"""Seconds after which the parser gets one more block if someone waits for a batch."""


class NotUtf8(Exception):
    """A text has a lone surrogate or a wrong byte, with which Arrow cannot report a bad record."""


class Blocks:
    """A file as Arrow reads it: UTF-8 without a byte order mark. Raises `NotUtf8` if it is something else,
    unless it is `widened`: then each byte, good or wrong, becomes one character.

    A unique record, `mark`, is appended. If the parser does not find it as a separate record, it is part of
    the last record: a quote there was never closed, or the file is damaged.
    """

    def __init__(
        self, file: DataFile, options: ReadOptions, size: int, widened: bool, quotes: Quotes | None
    ) -> None:
        self.size, self.widened, self.quotes = size, widened, quotes
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
        """The next block, once the parser should get it."""
        with self._change:
            while not self._wanted():
                if not self._change.wait(STALLED) and self._awaited:
                    break
            self._given += 1
        return b"" if self.closed else self._next()

    def _wanted(self) -> bool:
        return self.closed or self._given - self._taken < AHEAD

    def awaited(self) -> None:
        """Note that someone waits for a batch."""
        self._awaited = True

    def taken(self) -> None:
        """Note that a batch was returned; there is one for each block."""
        with self._change:
            self._awaited = False
            self._taken += 1
            self._change.notify_all()

    def _next(self) -> bytes:
        while not self._ended:
            block = self._encoded(self._read())
            if block := self.quotes.marked(block) if self.quotes else block:
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
        # After damage there is no line break, so that the truncated record does not count as a record.
        return found + f"{'' if self.damage else chr(10)}{self.mark}\n".encode()

    def close(self) -> None:
        with self._change:
            self.closed = True
            self._change.notify_all()
        self.raw.close()
