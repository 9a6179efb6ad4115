"""The text of a data file in its encoding; bytes that are wrong for it fail only the rows that use them."""

from __future__ import annotations

import codecs
import io

from vllm_tasks.datalayer.sources.data_file import POINTER, DataFile
from vllm_tasks.datalayer.sources.read_options import UTF8, ReadOptions
from vllm_tasks.errors import InvalidCall

WRONG_BYTES = "vllm_tasks.wrong_bytes"
"""Error handler of decoders: each wrong byte becomes a lone surrogate, which no prompt may have. It is like
Python's surrogateescape, but covers bytes below 128, too, which may be wrong in UTF-16."""
WIDE_MARKS = {
    "utf-32": codecs.BOM_UTF32_LE,  # before UTF-16, whose mark it begins with
    "utf-32-be": codecs.BOM_UTF32_BE,
    "utf-16": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
}
"""Byte order marks by the encoding to name in a refusal."""
NO_TEXT = {
    b"\x1f\x8b": ("compressed with gzip", "rename it to end in .gz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "rename it to end in .zst"),
    b"BZh91AY&": ("compressed with bzip2", "decompress it, or compress it with gzip (.gz) or zstd (.zst)"),
    b"\xfd7zXZ": ("compressed with xz", "decompress it, or compress it with gzip (.gz) or zstd (.zst)"),
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "extract its files"),
    b"PAR1\x15": ("Parquet", "rename it to end in .parquet"),
    b"ARROW1\0\0": ("Arrow IPC", "rename it to end in .arrow"),
}
"""By the first bytes of a file: what it is instead of text, and the way out."""
MARKS = {
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
"""Byte order marks that Python's codecs would return as a character."""


def _halves(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeDecodeError):
        return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end
    if isinstance(error, UnicodeEncodeError):
        halves = error.object[error.start : error.end]
        return b"".join(_bytes(ord(half)) for half in halves), error.end
    raise error


def _bytes(half: int) -> bytes:
    """The wrong byte that a surrogate stands for; for another surrogate, bytes that are wrong in UTF-8."""
    byte = half - 0xDC00
    return bytes([byte]) if 0x80 <= byte <= 0xFF else chr(half).encode("utf-8", "surrogatepass")


codecs.register_error(WRONG_BYTES, _halves)


def opened(file: DataFile, encoding: str) -> io.BufferedReader:
    """The file's bytes; raises `InvalidCall` if they are not text, or are UTF-16 where UTF-8 is expected.

    A byte order mark that the encoding's codec would keep is skipped.
    """
    stream = file.open()
    head = stream.peek(len(POINTER))
    try:
        file.refuse_pointer(head)
    except InvalidCall:
        stream.close()
        raise
    head = head[:8]
    for magic, (what, way_out) in NO_TEXT.items():
        if head.startswith(magic):
            stream.close()
            raise InvalidCall(f"{file.display!r} is {what}, not {file.kind} as its name says; {way_out}")
    if encoding == UTF8 and (like := _wide(head)):
        stream.close()
        raise InvalidCall(
            f"{file.display!r} begins like {like.upper()}, not UTF-8; give its encoding: "
            f'Datalayer(..., read={{{file.stem!r:.100}: {{"encoding": "{like}"}}}})'
        )
    if (mark := MARKS.get(encoding)) and head.startswith(mark):
        stream.read(len(mark))
    return stream


def _wide(head: bytes) -> str | None:
    """The encoding of a file that begins with these bytes, if it has several bytes for each character."""
    for name, mark in WIDE_MARKS.items():
        if head.startswith(mark):
            return name
    # Without a mark, ASCII characters have a zero byte each.
    for name, zeros, others in (("utf-16-le", head[1::2], head[::2]), ("utf-16-be", head[::2], head[1::2])):
        if len(head) >= 4 and not any(zeros) and all(others):
            return name
    return None


def decoder_of(encoding: str) -> str:
    """The codec that also skips a byte order mark; for encodings in `MARKS`, `opened` skips it."""
    return "utf-8-sig" if encoding == UTF8 else encoding


def text_of(file: DataFile, options: ReadOptions, newline: str) -> io.TextIOWrapper:
    """The file's text; `newline` as in `open`."""
    return io.TextIOWrapper(
        opened(file, options.encoding), decoder_of(options.encoding), WRONG_BYTES, newline
    )
