"""The text of a data file in its encoding, where bytes that are wrong for it fail the rows that use them."""

from __future__ import annotations

import codecs
import io

from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.read_options import UTF8, ReadOptions
from vllm_tasks.errors import InvalidCall

WRONG_BYTES = "vllm_tasks.wrong_bytes"
"""How decoders treat bytes that are no text: each becomes half a character, which no prompt may have. As
Python's surrogateescape, but for the bytes below 128 too, which UTF-16 may have wrong."""
UTF16_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _halves(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeDecodeError):
        return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end
    if isinstance(error, UnicodeEncodeError):
        halves = error.object[error.start : error.end]
        return b"".join(_bytes(ord(half)) for half in halves), error.end
    raise error


def _bytes(half: int) -> bytes:
    """The wrong byte that it stands for; else those that UTF-8 does not have, which are wrong again."""
    byte = half - 0xDC00
    return bytes([byte]) if 0x80 <= byte <= 0xFF else chr(half).encode("utf-8", "surrogatepass")


codecs.register_error(WRONG_BYTES, _halves)


def has_half(text: str) -> bool:
    """Whether `text` has half a character, its own or for a wrong byte."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def opened(file: DataFile, encoding: str) -> io.BufferedReader:
    """The file's bytes; raises `InvalidCall` for UTF-16 that is to be read as UTF-8."""
    stream = file.open()
    if encoding == UTF8 and stream.peek(2)[:2] in UTF16_BOMS:
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
