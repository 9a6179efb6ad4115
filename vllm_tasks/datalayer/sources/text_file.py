"""The text of a data file in its encoding, where bytes that are wrong for it fail the rows that use them."""

from __future__ import annotations

import codecs
import io
from typing import IO

from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.read_options import UTF8, ReadOptions
from vllm_tasks.errors import InvalidCall

WRONG_BYTES = "vllm_tasks.wrong_bytes"
"""How decoders treat bytes that are no text: each becomes half a character, which no prompt may have. As
Python's surrogateescape, but for the bytes below 128 too, which UTF-16 may have wrong."""
UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _halves(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) for byte in wrong), error.end


codecs.register_error(WRONG_BYTES, _halves)


def has_half(text: str) -> bool:
    """Whether `text` has half a character, its own or for a wrong byte."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def opened(file: DataFile, encoding: str) -> IO[bytes]:
    """The file's bytes; raises `InvalidCall` for UTF-16 that is to be read as UTF-8."""
    stream = file.open()
    # BufferedReader: shows what comes without taking it.
    if encoding == UTF8 and stream.peek(2)[:2] in UTF16_BOMS:  # type: ignore[attr-defined]
        stream.close()
        raise InvalidCall(
            f"{file.shown!r} begins as UTF-16 does, not UTF-8; say so: "
            f'Datalayer(..., read={{{file.stem!r:.100}: {{"encoding": "utf-16"}}}})'
        )
    return stream


def decoder_of(encoding: str) -> str:
    """The codec that also leaves out a byte order mark."""
    return "utf-8-sig" if encoding == UTF8 else encoding


def text_of(file: DataFile, options: ReadOptions, newline: str) -> io.TextIOWrapper:
    """The file's text; `newline` as `open` has it."""
    return io.TextIOWrapper(
        opened(file, options.encoding), decoder_of(options.encoding), WRONG_BYTES, newline
    )
