"""The bytes of a data file: a lost connection is an error, a damaged file is read up to the damage."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import IO, Any, cast

import pyarrow as pa

from vllm_tasks.errors import InvalidCall, TablesUnavailable
from vllm_tasks.places import without_secrets

BUFFER = 1 << 20
ERROR_LENGTH = 200


class Damaged(Exception):
    """A compressed file is truncated or broken here; every byte before has been read."""


class Connected(io.RawIOBase):
    """A file of an fsspec filesystem, read from its first byte on. Errors are `TablesUnavailable`, except for
    refused access (`InvalidCall`)."""

    def __init__(self, fs: Any, path: str, display: str) -> None:
        super().__init__()
        self.display = display
        try:
            self.file = fs.open(path, "rb")
        except PermissionError as e:
            raise InvalidCall(f"cannot read {display!r}: not allowed") from e
        except Exception as e:  # the errors of filesystems have no common base class
            raise self._lost(e) from e

    def _lost(self, error: Exception) -> TablesUnavailable:
        why = without_secrets(f"{type(error).__name__}: {error}")[:ERROR_LENGTH]
        return TablesUnavailable(f"cannot read {self.display!r}: {why}")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = self.file.read(len(buffer))
        except Exception as e:  # see above
            raise self._lost(e) from e
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        if not self.closed and hasattr(self, "file"):
            self.file.close()
        super().close()


class Decompressed(io.RawIOBase):
    """The bytes of `opened()`, decompressed by `codec`; raises `Damaged` at the first damage.

    Arrow's codecs read several concatenated members or frames as one.
    """

    def __init__(self, opened: Callable[[], IO[bytes]], codec: str, display: str) -> None:
        super().__init__()
        self.opened, self.codec, self.display = opened, codec, display
        self.raw = opened()
        self.stream = pa.CompressedInputStream(self.raw, codec)
        self.offset = 0
        self.damage: str | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = b"" if self.damage else self._read(len(buffer))
        if self.damage and not found:
            raise Damaged(self.damage)
        buffer[: len(found)] = found
        self.offset += len(found)
        return len(found)

    def _read(self, most: int) -> bytes:
        try:
            return cast(bytes, self.stream.read(most))
        except TablesUnavailable:
            raise
        except OSError as e:
            self.damage = str(e)[:ERROR_LENGTH]
            found = self._before_damage(most)
            if not self.offset and not found:
                raise InvalidCall(
                    f"{self.display!r} is not compressed with {self.codec}, as its name says, or is damaged "
                    f"at the start ({self.damage}); rename or replace it"
                ) from e
            return found

    def _before_damage(self, most: int) -> bytes:
        """Read the file again, finally byte by byte: Arrow drops the bytes found by a failed read."""
        self.raw.close()
        self.raw = self.opened()
        self.stream = pa.CompressedInputStream(self.raw, self.codec)
        left, found = self.offset, bytearray()
        try:
            while left:
                left -= len(self.stream.read(min(left, BUFFER)))
            while len(found) < most and (one := self.stream.read(1)):
                found += one
        except TablesUnavailable:
            raise
        except OSError:
            pass  # the same damage, after all readable bytes
        return bytes(found)

    def close(self) -> None:
        if not self.closed and hasattr(self, "raw"):
            self.raw.close()
        super().close()
