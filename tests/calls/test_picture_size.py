"""Pictures that are small files and large where they are decoded."""

from __future__ import annotations

import struct

import pytest

from tests.calls.prompting import refusal
from tests.calls.test_media import with_media
from vllm_tasks.calls.picture_size import size_of

SIDES = 12_000, 11_000
SMALL = 10, 10


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + ihdr(width, height)


def ihdr(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">II", width, height) + b"\x08\x02\0\0\0")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + bytes(4)


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


def frame(width: int, height: int, marker: bytes = b"\xff\xc0") -> bytes:
    return marker + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0"


def jpeg(width: int, height: int) -> bytes:
    """With a thumbnail of another size before its own frame, and fill bytes."""
    inner = frame(1, 1, b"\xff\xc2")
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(inner)) + inner
    tables = b"\xff\xc4" + struct.pack(">H", 4) + bytes(2)
    return b"\xff\xd8" + thumbnail + tables + b"\xff\xff" + frame(width, height)


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


START = b"\xff\xd8"
SCREEN = gif(*SMALL) + b"\x80\0\0" + bytes(6)
"""With two colours."""
PICTURE = b"," + struct.pack("<HHHHB", 0, 0, *SIDES, 0) + b"\x02\0;"
SIZES = {
    "gif: the picture enlarges the screen": ("gif", SCREEN + PICTURE),
    "gif: after a comment and a stray byte": ("gif", SCREEN + b"!\xfe\x02,,\x01,\0" + b"?" + PICTURE),
    "png: after another chunk": ("png", png(1, 1)[:8] + chunk(b"tEXt", bytes(99)) + ihdr(*SIDES)),
    "png: of two heads": ("png", png(*SMALL) + ihdr(*SIDES)),
    "jpeg: after stray bytes": ("jpeg", START + b"\xff\xe0\0\2" + b"stray\xff\0" + frame(*SIDES)),
    "jpeg: of two frames the larger": ("jpeg", START + frame(*SMALL) + frame(*SIDES) + frame(*SMALL)),
    "jpeg: after a segment without a length": ("jpeg", START + b"\xff\xe0\0\0" + frame(*SIDES)),
}


@pytest.mark.parametrize("what", SIZES)
def test_a_picture_hides_no_size_behind_another(what: str) -> None:
    """Decoders skip what stands before it."""
    form, content = SIZES[what]
    assert size_of(form, content) == SIDES
    assert "pixels, and" in refusal(with_media()({"photo": content}))


def test_what_follows_the_pixels_is_not_read() -> None:
    """A second picture behind the first is never decoded."""
    scan = b"\xff\xda\0\2" + frame(*SIDES)
    assert size_of("jpeg", START + frame(*SMALL) + scan) == SMALL
    assert size_of("png", png(*SMALL) + chunk(b"IDAT", b"") + ihdr(*SIDES)) == SMALL
    assert size_of("gif", SCREEN + PICTURE.replace(struct.pack("<HH", *SIDES), bytes(4)) + PICTURE) == SMALL


@pytest.mark.parametrize(
    "content", [b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8" + b"\xff\xe0\0\0" * 9, b"\xff\xd8\xff\xd9a"]
)
def test_a_jpeg_without_a_frame_has_no_size(content: bytes) -> None:
    """A segment whose length is 0 ends the search, too."""
    assert size_of("jpeg", content) is None
