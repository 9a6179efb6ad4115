"""One pass of Arrow's parser over a CSV file, from its first record."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv

from vllm_tasks.datalayer.sources.csv_blocks import Blocks
from vllm_tasks.datalayer.sources.csv_quotes import STRAY, Quotes
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.read_options import ReadOptions
from vllm_tasks.errors import InvalidCall

LONGEST = 1 << 30
"""Maximum bytes of a record: Arrow counts them in 32 bits."""
UNCLOSED = "a quote opens in this record and is not closed: the rest of the file is one cell"


class TooLong(Exception):
    """A record is longer than a block."""


@dataclass(frozen=True)
class Bad:
    """A record with too many or too few cells, or with text behind a closing quote."""

    number: int
    cells: int
    text: str
    """With `STRAY` where such text begins."""


@dataclass(frozen=True)
class Records:
    """Records that were read together. Numbers count from 1, including the header but not blank lines."""

    good: pa.RecordBatch
    """Binary columns, named by their positions in the file: "0", "3"."""
    bad: Sequence[Bad]
    first: int
    """Number of records before `good`."""

    def number(self, row: int) -> int:
        """The number of the record at this row of `good`."""
        number = self.first + row + 1
        for bad in self.bad:
            number += bad.number <= number
        return number


@dataclass(frozen=True)
class Lost:
    """The file cannot be read from this record on."""

    number: int
    why: str


def numbered(width: int) -> list[str]:
    """Names of columns by their positions."""
    return [str(i) for i in range(width)]


def parsing(options: ReadOptions, delimiter: str, invalid: Any = None) -> pa.csv.ParseOptions:
    """How the parser separates records and cells."""
    return pa.csv.ParseOptions(
        delimiter=delimiter,
        quote_char=options.quote or False,
        escape_char=options.escape or False,
        newlines_in_values=True,
        invalid_row_handler=invalid,
    )


def as_bytes(options: ReadOptions, included: list[str]) -> pa.csv.ConvertOptions:
    """Cells as they are in the file; an empty cell without quotes is NULL."""
    return pa.csv.ConvertOptions(
        column_types=dict.fromkeys(included, pa.binary()),
        include_columns=included,
        null_values=options.null_values,
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )


def key_cells(
    bad: Sequence[Bad], options: ReadOptions, delimiter: str, places: Sequence[int | None]
) -> list[list[bytes | None]]:
    """The cells of each bad record at these places; None if it has none, or one with text behind a quote."""
    found: list[list[bytes | None]] = [[None] * len(places) for _ in bad]
    for width in {each.cells for each in bad}:
        alike = [i for i, each in enumerate(bad) if each.cells == width]
        there = {i: str(place) for i, place in enumerate(places) if place is not None and place < width}
        if not there:
            continue
        text = "\n".join(bad[i].text for i in alike).encode("utf-8", "surrogateescape")
        table = pa.csv.read_csv(
            pa.BufferReader(text),
            read_options=pa.csv.ReadOptions(
                use_threads=False, block_size=len(text) + 1, column_names=numbered(width)
            ),
            parse_options=parsing(options, delimiter),
            convert_options=as_bytes(options, list(there.values())),
        )
        for at, name in there.items():
            for i, cell in zip(alike, table[name].to_pylist(), strict=True):
                found[i][at] = None if cell is not None and STRAY.encode() in cell else cell
    return found


class Pass:
    """Reads the columns at the places `wanted` from records of `width` cells, in blocks of `size` bytes."""

    def __init__(
        self,
        file: DataFile,
        options: ReadOptions,
        delimiter: str,
        width: int,
        wanted: Sequence[int],
        size: int,
        widened: bool,
    ) -> None:
        self.display, self.width, self.delimiter = file.display, width, delimiter
        self.bad: list[Bad] = []
        self.complete = False
        """Whether the mark after the last record was found as a separate record."""
        # A quote that is escaped may be anywhere.
        quotes = Quotes(options.quote, delimiter, width) if options.quote and not options.escape else None
        self.blocks = Blocks(file, options, size, widened, quotes)
        try:
            self.reader = self._parser(options, delimiter, [str(i) for i in wanted or (0,)])
        except BaseException:
            self.blocks.close()
            raise

    def _parser(self, options: ReadOptions, delimiter: str, included: list[str]) -> Any:
        return self._tried(
            lambda: pa.csv.open_csv(
                self.blocks,
                # With threads, Arrow does not number bad records. A block is what one `read` returns.
                read_options=pa.csv.ReadOptions(
                    use_threads=False, block_size=LONGEST, column_names=numbered(self.width)
                ),
                parse_options=parsing(options, delimiter, self._invalid),
                convert_options=as_bytes(options, included),
            )
        )

    def _invalid(self, row: Any) -> str:
        widened = self.blocks.widened
        text = row.text.encode("latin-1").decode("utf-8", "surrogateescape") if widened else row.text
        if text == self.blocks.mark:
            self.complete = True
        else:
            cells = row.actual_columns - text.count(STRAY) * (self.width + 1)
            text = text.replace(self.delimiter * (self.width + 1) + STRAY, STRAY)
            self.bad.append(Bad(row.number, cells, text))
        return "skip"

    def _tried(self, call: Any) -> Any:
        self.blocks.awaited()
        try:
            return call()
        except pa.ArrowInvalid as e:
            if "straddl" in str(e):
                raise TooLong from e
            raise InvalidCall(f"{self.display!r} cannot be read as CSV: {str(e)[:200]}") from e

    def _batch(self) -> pa.RecordBatch | None:
        try:
            found = self._tried(self.reader.read_next_batch)
        except StopIteration:
            return None
        self.blocks.taken()
        return _narrowed(found) if self.blocks.widened else found

    def records(self) -> Iterator[Records | Lost]:
        """All records, at the end perhaps a `Lost`. Raises `TooLong` and `NotUtf8` when it meets them."""
        before = 0
        batch = self._batch()
        while batch is not None:
            following = self._batch()  # read ahead, because the last batch is treated differently
            lost = None
            if following is None:
                batch, lost = self._ended(batch, before)
            found = Records(batch, self._bad_until(before + batch.num_rows, following is None), before)
            yield found
            if lost:
                yield lost
            before += batch.num_rows + len(found.bad)
            batch = following

    def _bad_until(self, number: int, last: bool) -> list[Bad]:
        """The bad records before or right after the good record of this number, counted without bad ones."""
        found: list[Bad] = []
        while self.bad and (last or self.bad[0].number <= number + len(found) + 1):
            found.append(self.bad.pop(0))
        return found

    def _ended(self, batch: pa.RecordBatch, before: int) -> tuple[pa.RecordBatch, Lost | None]:
        """The last batch without the mark, and a `Lost` if the mark became part of a record."""
        damage = self.blocks.damage
        why = UNCLOSED if damage is None else f"the file is damaged in or behind this record: {damage}"
        number = before + batch.num_rows + len(self.bad)
        if self.complete:
            return batch, None if damage is None else Lost(number + 1, why)
        if self.bad and self.blocks.mark in self.bad[-1].text:
            return batch, Lost(self.bad.pop().number, why)
        if self.width == 1 and batch.num_rows and batch.column(0)[-1].as_py() == self.blocks.mark.encode():
            return batch.slice(0, batch.num_rows - 1), None if damage is None else Lost(number, why)
        return batch.slice(0, max(0, batch.num_rows - 1)), Lost(number, why)

    def close(self) -> None:
        """End the reading, even while Arrow reads ahead."""
        self.blocks.close()
        self.reader.close()


def _narrowed(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The original bytes of a batch read from widened `Blocks`."""
    columns = [
        pa.array([None if v is None else v.decode().encode("latin-1") for v in c.to_pylist()], pa.binary())
        for c in batch.columns
    ]
    return pa.record_batch(columns, names=batch.schema.names)
