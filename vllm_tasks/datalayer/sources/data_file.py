"""One file of a table: where it is, what its name says of its format, and its bytes."""

from __future__ import annotations

import io
import posixpath
import re
from dataclasses import dataclass
from typing import IO, Any, Literal, Self, cast

import pyarrow as pa

from vllm_tasks.errors import InvalidCall

Kind = Literal["parquet", "jsonl", "json", "csv", "tsv", "arrow", "excel"]
ENDINGS: dict[str, Kind] = {
    "parquet": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "json": "json",
    "csv": "csv",
    "tsv": "tsv",
    "tab": "tsv",
    "arrow": "arrow",
    "feather": "arrow",
    "xlsx": "excel",
}
"""Formats by the ending of a file's name, in any case of its letters."""
COMPRESSIONS: dict[str, Literal["gzip", "zstd"]] = {"gz": "gzip", "zst": "zstd"}
COMPRESSED = ("jsonl", "json", "csv", "tsv")
"""Formats that are compressed as whole files; others compress within."""
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
    shown: str
    """Its path as a person is told it, without secrets."""

    @classmethod
    def of(cls, fs: Any, path: str, shown: str) -> Self | None:
        """None for a file that is none of the formats, by its name."""
        match = NAME.fullmatch(posixpath.basename(path))
        if match is None:
            return None
        kind = ENDINGS[match["kind"].lower()]
        packed = COMPRESSIONS[match["packed"].lower()] if match["packed"] else None
        if packed and kind not in COMPRESSED:
            return None
        return cls(fs, path, match["stem"], kind, packed, shown)

    def open(self) -> IO[bytes]:
        """Its bytes, decompressed, from the first on."""
        raw = cast(IO[bytes], self.fs.open(self.path, "rb"))
        if self.compression is None:
            return raw
        try:
            # Arrow's own codecs: several members or frames behind each other are read as one.
            return cast(IO[bytes], io.BufferedReader(pa.CompressedInputStream(raw, self.compression)))
        except (OSError, pa.ArrowException) as e:
            raise InvalidCall(f"{self.shown} is not compressed with {self.compression}: {e}") from e
