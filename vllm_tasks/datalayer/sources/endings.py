"""Formats of files by the endings of their names."""

from __future__ import annotations

from typing import Literal

Kind = Literal["parquet", "jsonl", "json", "csv", "tsv", "arrow"]
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
}
"""Formats by the ending of a file's name, in upper or lower case."""
COMPRESSIONS: dict[str, Literal["gzip", "zstd"]] = {"gz": "gzip", "zst": "zstd"}
COMPRESSED = ("jsonl", "json", "csv", "tsv")
"""Formats whose files are compressed as a whole; others compress inside the file."""
