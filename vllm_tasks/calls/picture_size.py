"""The size of a picture, as its first bytes say: a small file can unpack to gigabytes where it is decoded."""

from __future__ import annotations

import struct

WITHOUT_SIZE = {0xC4, 0xC8, 0xCC}
"""The markers of JPEG among C0 to CF that begin no frame: tables and an extension."""
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
"""The markers of JPEG that stand alone."""


def size_of(form: str, content: bytes) -> tuple[int, int] | None:
    """Return the width and height of a picture in pixels; None if it does not say them.

    Args:
        form: "png", "jpeg", "webp" or "gif".
        content: The file.
    """
    try:
        return {"png": _png, "jpeg": _jpeg, "webp": _webp, "gif": _gif}[form](content)
    except (struct.error, IndexError):  # it is cut off
        return None


def _png(content: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", content, 16)
    return width, height


def _gif(content: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", content, 6)
    return width, height


def _webp(content: bytes) -> tuple[int, int] | None:
    """Each of the three kinds of WebP has its own head (RFC 9649, section 2)."""
    kind = content[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _jpeg(content: bytes) -> tuple[int, int] | None:
    """The first frame's; segments before it are skipped, a thumbnail among them."""
    at = 2
    while at < len(content):
        if content[at] != 0xFF:
            return None
        marker = content[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in WITHOUT_LENGTH:
            at += 2
        elif 0xC0 <= marker <= 0xCF and marker not in WITHOUT_SIZE:
            height, width = struct.unpack_from(">HH", content, at + 5)
            return width, height
        else:
            (length,) = struct.unpack_from(">H", content, at + 2)
            at += 2 + length
    return None
