r"""Text behind a closing quote of a CSV: no cell can be read from it as it was meant.

`"say \"hi\""` is such a cell, where the program that wrote it escapes quotes by backslashes, as Spark and
MySQL do. Arrow would end the quotes at the second one, and say nothing.
"""

from __future__ import annotations

import re

import numpy as np

STRAY = "\0vllm tasks: text behind a quote\0"
"""Stands behind the closing quote in the text of such a record."""


class Quotes:
    """Follows the quotes of a file from block to block, as Arrow does."""

    def __init__(self, quote: str, delimiter: str, width: int) -> None:
        """`width` is the number of cells that a record has."""
        sign, separator = re.escape(quote.encode()), re.escape(delimiter.encode())
        self._sign = quote.encode()
        self._opening = re.compile(b"%b(?<=[%b\r\n]%b)" % (sign, separator, sign))
        self._inside = re.compile(b"[^%b]*+(?:%b%b[^%b]*+)*+" % (sign, sign, sign, sign))
        self._beside = np.zeros(256, bool)
        """The bytes that may stand before an opening quote, and behind a closing one."""
        self._beside[list((quote + delimiter + "\r\n").encode())] = True
        # With so many cells more, Arrow reports the record, whatever its number of cells is.
        self._mark = (delimiter * (width + 1) + STRAY).encode()
        self._held = b"\n"
        """The byte before the next block; and the quotes that end a block, as what follows decides them."""
        self._open = False
        """Whether the next block begins within quotes."""

    def marked(self, block: bytes) -> bytes:
        """`block` with a mark behind each closing quote that has text behind it.

        Quotes at its end are returned with the next block. The last block must not end with one.
        """
        before, block = self._held[:1], self._held[1:] + block
        text = block.rstrip(self._sign)
        self._held = (text[-1:] or before) + block[len(text) :]
        if not self._open and self._sign not in text:
            return text
        return text if self._regular(before + text) else self._walked(before + text)

    def _regular(self, text: bytes) -> bool:
        """Whether each quote opens or closes a cell, or is one of two. The first byte is before the block."""
        signs = np.frombuffer(text, np.uint8)
        quotes = np.flatnonzero(signs[1:] == self._sign[0]) + 1
        opening, closing = quotes[int(self._open) :: 2], quotes[1 - int(self._open) :: 2]
        if not (self._beside[signs[opening - 1]].all() and self._beside[signs[closing + 1]].all()):
            return False
        self._open = self._open != bool(len(quotes) % 2)
        return True

    def _walked(self, text: bytes) -> bytes:
        """As `marked`, quote by quote; the first byte is before the block."""
        parts: list[bytes] = []
        at = done = 1
        while True:
            if not self._open:
                opening = self._opening.search(text, at)
                if opening is None:
                    break
                at, self._open = opening.end(), True
            inside = self._inside.match(text, at)
            assert inside is not None  # it may be empty
            at = inside.end()
            if at == len(text):
                break
            at, self._open = at + 1, False
            if not self._beside[text[at]]:
                parts += [text[done:at], self._mark]
                done = at
        return b"".join([*parts, text[done:]])
