"""One file of a table: its place, its format by its name, and its bytes."""

from __future__ import annotations

import io
import posixpath
import re
from dataclasses import dataclass
from typing import IO, Any, Literal, Self, cast

from vllm_tasks.datalayer.sources.byte_stream import BUFFER, Connected, Decompressed
from vllm_tasks.datalayer.sources.endings import COMPRESSED, COMPRESSIONS, ENDINGS, Kind
from vllm_tasks.errors import InvalidCall

POINTER = b"version https://git-lfs"
"""The first bytes of a file that Git LFS has not downloaded yet."""
NAME = re.compile(
    rf"(?P<stem>.+)\.(?P<kind>{'|'.join(ENDINGS)})(?:\.(?P<packed>{'|'.join(COMPRESSIONS)}))?",
    re.DOTALL | re.IGNORECASE,
)


@dataclass(frozen=True)
class DataFile:
    """A file of rows on the fsspec filesystem `fs`."""

    fs: Any
    path: str
    stem: str
    kind: Kind
    compression: Literal["gzip", "zstd"] | None
    display: str
    """Its path as text for people, without secrets."""

    @classmethod
    def of(cls, fs: Any, path: str, display: str) -> Self | None:
        """The file, or None if its name has none of the formats."""
        match = NAME.fullmatch(posixpath.basename(path))
        if match is None:
            return None
        kind = ENDINGS[match["kind"].lower()]
        packed = COMPRESSIONS[match["packed"].lower()] if match["packed"] else None
        if packed and kind not in COMPRESSED:
            return None
        return cls(fs, path, match["stem"], kind, packed, display)

    def open(self) -> io.BufferedReader:
        """Its bytes from the first on, decompressed; see `byte_stream` for the errors."""
        return io.BufferedReader(self._decompressed() if self.compression else self._raw(), BUFFER)

    def seekable(self) -> IO[bytes]:
        """Its bytes as stored, for formats that are read from their end or middle."""
        return cast(IO[bytes], self.fs.open(self.path, "rb"))

    def refuse_pointer(self, head: bytes) -> None:
        """Raise `InvalidCall` if `head`, its first bytes, are those of a pointer of Git LFS."""
        if head.startswith(POINTER):
            raise InvalidCall(
                f"{self.display!r} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"
            )

    def _raw(self) -> Connected:
        return Connected(self.fs, self.path, self.display)

    def _decompressed(self) -> Decompressed:
        return Decompressed(
            lambda: io.BufferedReader(self._raw(), BUFFER), self.compression or "", self.display
        )
