"""Pictures that are small files and large where they are decoded."""

from __future__ import annotations

import struct

import pytest

from tests.calls.prompting import refusal
from tests.calls.test_media import with_media
from vllm_tasks.calls.picture_size import size_of

SIDES = 12_000, 11_000


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">II", width, height)


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height)


def webp(kind: bytes, rest: bytes) -> bytes:
    return b"RIFF" + bytes(4) + b"WEBP" + kind + bytes(4) + rest


def extended(width: int, height: int) -> bytes:
    return webp(b"VP8X", bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"))


def lossless(width: int, height: int) -> bytes:
    return webp(b"VP8L", b"\x2f" + struct.pack("<I", width - 1 | height - 1 << 14))


def lossy(width: int, height: int) -> bytes:
    return webp(b"VP8 ", bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", width, height))


def jpeg(width: int, height: int) -> bytes:
    """With a thumbnail of another size before its own frame, and fill bytes."""
    frame = b"\xff\xc2" + struct.pack(">HBHH", 17, 8, 1, 1)
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(frame)) + frame
    tables = b"\xff\xc4" + struct.pack(">H", 4) + bytes(2)
    return (
        b"\xff\xd8"
        + thumbnail
        + tables
        + b"\xff\xff"
        + b"\xff\xc0"
        + struct.pack(">HBHH", 17, 8, height, width)
    )


MADE = {"png": [png], "gif": [gif], "webp": [extended, lossless, lossy], "jpeg": [jpeg]}
FORMS = [(form, made) for form, all_made in MADE.items() for made in all_made]


@pytest.mark.parametrize(("form", "made"), FORMS)
def test_a_large_picture_is_an_error_of_its_row(form: str, made: object) -> None:
    """Before it is sent; one that is cut off says nothing, and the engine refuses it."""
    assert callable(made)
    assert size_of(form, made(*SIDES)) == SIDES
    said = refusal(with_media()({"photo": made(*SIDES)}))
    assert "'photo' has 12,000 x 11,000 pixels, and 89,478,485 are allowed in a picture" in said
    assert with_media()({"photo": made(1200, 1100)})
    for end in range(16, len(made(*SIDES))):
        assert size_of(form, made(*SIDES)[:end]) in (None, SIDES) or form == "webp"


@pytest.mark.parametrize(
    "content", [b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8" + b"\xff\xe0\0\0" * 9, b"\xff\xd8\xff\xd9a"]
)
def test_a_jpeg_without_a_frame_has_no_size(content: bytes) -> None:
    """A segment whose length is 0 ends the search, too."""
    assert size_of("jpeg", content) is None
