"""The size of a picture, as its first bytes say: a small file can unpack to gigabytes where it is decoded.

A file may say several sizes. The largest counts, whichever of them a decoder would take.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import suppress

Size = tuple[int, int]
SEGMENT = re.compile(rb"\xff([^\x00\xff])")
"""The marker that begins a segment of a JPEG file. Decoders skip other bytes before it."""
WITHOUT_SIZE = {0xC4, 0xC8, 0xCC}
"""The markers of JPEG among C0 to CF that begin no frame: tables and an extension."""
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
"""The markers of JPEG that stand alone."""
SCAN = 0xDA
"""The marker of JPEG before the pixels."""


def size_of(form: str, content: bytes) -> Size | None:
    """Return the width and height of a picture in pixels; None if it does not say them.

    Args:
        form: "png", "jpeg", "webp" or "gif".
        content: The file.
    """
    found: list[Size] = []
    with suppress(struct.error, IndexError):  # it is cut off; the sizes before that count
        for size in {"png": _png, "jpeg": _jpeg, "webp": _webp, "gif": _gif}[form](content):
            found += [size]
    return max(found, key=lambda size: size[0] * size[1], default=None)


def _png(content: bytes) -> Iterator[Size]:
    at = 8
    while at < len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        if kind == b"IHDR":
            width, height = struct.unpack_from(">II", content, at + 8)
            yield width, height
        elif kind == b"IDAT":
            return
        at += 12 + length


def _gif(content: bytes) -> Iterator[Size]:
    """The screen's, and that of the first picture, which enlarges a screen that is smaller."""
    width, height = struct.unpack_from("<HH", content, 6)
    yield width, height
    colours = content[10]
    at = 13 + (3 << (colours & 7) + 1 if colours & 0x80 else 0)
    while content[at : at + 1] not in (b"", b";"):
        if content[at] == ord(","):
            left, top, width, height = struct.unpack_from("<HHHH", content, at + 1)
            yield left + width, top + height
            return
        if content[at] == ord("!"):
            at += 2
            while content[at]:  # the length of a block
                at += 1 + content[at]
        at += 1


def _webp(content: bytes) -> Iterator[Size]:
    """Each of the three kinds of WebP has its own head (RFC 9649, section 2)."""
    kind = content[12:16]
    if kind == b"VP8X":
        yield 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        yield 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        yield width & 0x3FFF, height & 0x3FFF


def _jpeg(content: bytes) -> Iterator[Size]:
    """Those of its frames; the contents of segments before them are skipped, a thumbnail among them."""
    at = 2
    while marker := SEGMENT.search(content, at):
        code, at = marker[1][0], marker.end()
        if code == SCAN:
            return
        if code in WITHOUT_LENGTH:
            continue
        if 0xC0 <= code <= 0xCF and code not in WITHOUT_SIZE:
            height, width = struct.unpack_from(">HH", content, at + 3)
            yield width, height
        (length,) = struct.unpack_from(">H", content, at)
        at += max(length, 2)
