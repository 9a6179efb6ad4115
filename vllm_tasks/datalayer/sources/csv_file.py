"""A CSV file: the names of its columns, and its records of any length."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TextIO

from vllm_tasks.datalayer.sources.csv_blocks import NotUtf8
from vllm_tasks.datalayer.sources.csv_pass import (
    LONGEST,
    UNCLOSED,
    Bad,
    Lost,
    Pass,
    Records,
    TooLong,
    key_cells,
)
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.read_options import ReadOptions
from vllm_tasks.datalayer.sources.text_file import text_of
from vllm_tasks.errors import InvalidCall

BLOCK = 1 << 20
"""Bytes that are parsed at once, unless a record is longer."""
GROWTH = 4
SIGNS = {"csv": ",", "tsv": "\t"}
csv.field_size_limit(max(csv.field_size_limit(), 1 << 26))
"""Python's reader allows 128 KiB a cell by default. The limit is global to the process, so it is only raised.
The reader counts the cells of a first record without names, which may be large."""


class CsvFile:
    """A file of the kind csv or tsv."""

    def __init__(self, file: DataFile, options: ReadOptions) -> None:
        self.file, self.options = file, options
        self.delimiter = options.delimiter or SIGNS[file.kind]

    def names(self) -> list[str]:
        """The columns' names in their order; none for an empty file. Raises `InvalidCall` for a header that
        cannot be read."""
        if isinstance(self.options.header, list):
            return self.options.header
        with text_of(self.file, self.options, newline="") as text:
            try:
                first = next((cells for cells in self._cells(text) if cells), [])
            except csv.Error as e:
                raise InvalidCall(
                    f"the first record of {self.file.display!r} cannot be read: {e}; is a quote not closed? "
                    "Correct it, or give the quote or the delimiter: read={table: {'quote': ''}}"
                ) from e
        return first if self.options.header else [f"column{i}" for i in range(len(first))]

    def cells(self, bad: Sequence[Bad], places: Sequence[int | None]) -> list[list[bytes | None]]:
        """The cells of each bad record at these places; None if it has none."""
        return key_cells(bad, self.options, self.delimiter, places)

    def _cells(self, text: TextIO) -> Iterator[list[str]]:
        quote = self.options.quote
        return csv.reader(
            text,
            delimiter=self.delimiter,
            quotechar=quote or None,
            quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
            escapechar=self.options.escape or None,
            strict=True,
        )

    def records(self, width: int, wanted: Sequence[int]) -> Iterator[Records | Lost]:
        """All records of `width` cells except the header, with their cells at the places `wanted`; at the end
        a `Lost` if the rest of the file is unreadable."""
        good, bad = int(self.options.header is True), 0
        size, widened = BLOCK, False
        while size <= LONGEST:
            try:
                with closing(
                    Pass(self.file, self.options, self.delimiter, width, wanted, size, widened)
                ) as one_pass:
                    for found in _behind(one_pass.records(), good, bad):
                        yield found
                        if isinstance(found, Records):
                            good, bad = good + found.good.num_rows, bad + len(found.bad)
                return
            except TooLong:
                size *= GROWTH
            except NotUtf8:
                widened = True
        yield Lost(good + bad + 1, f"the record has more than {LONGEST >> 30} GiB, or {UNCLOSED}")


def _behind(found: Iterator[Records | Lost], good: int, bad: int) -> Iterator[Records | Lost]:
    """Skip the first `good` and `bad` records, which an earlier pass returned or which are the header."""
    for some in found:
        if isinstance(some, Records) and (good or bad):
            rows = min(good, some.good.num_rows)
            skipped = min(bad, len(some.bad))
            good, bad = good - rows, bad - skipped
            some = Records(some.good.slice(rows), some.bad[skipped:], some.first + rows + skipped)
        yield some
