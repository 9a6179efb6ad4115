"""Known formats that are not supported, and the way out for each."""

from __future__ import annotations

import posixpath
import re

from vllm_tasks.datalayer.sources.endings import COMPRESSED, COMPRESSIONS, ENDINGS
from vllm_tasks.errors import InvalidCall

FORMATS = f"{', '.join(ENDINGS)} ({', '.join(COMPRESSED)} also as {' or '.join(COMPRESSIONS)})"
UNPACK = "unpack it, or pack lines of text as .gz or .zst"
PACKED = dict.fromkeys(("bz2", "xz", "zip", "lz4", "br", "7z", "gz", "zst", "zstd"), UNPACK)
ROWS = {
    "xlsx": "pass it as a table in memory, select=pandas.read_excel(...), or save it as CSV or Parquet",
    "xls": "pass it as a table in memory, select=pandas.read_excel(...), or save it as CSV or Parquet",
    "ods": "pass it as a table in memory, select=pandas.read_excel(...), or save it as CSV or Parquet",
    "orc": "pass it as a table in memory, select=pyarrow.orc.read_table(...), or save it as Parquet",
    "avro": "pass it as a table in memory, select=polars.read_avro(...), or save it as Parquet",
}
WAYS_OUT = {
    **PACKED,
    **ROWS,
    "xml": "pass it as a table in memory, select=pandas.read_xml(...), or save it as CSV or Parquet",
    "txt": "rename or link it as .csv, and say how its lines are read by the option read= of the Datalayer",
}
"""The way out by ending."""
SURE = re.compile(
    rf".+\.(?:{'|'.join(ROWS)}|(?:{'|'.join(ENDINGS)})\.(?:{'|'.join(PACKED)}))", re.I | re.DOTALL
)
"""Names of unsupported files that surely have rows; others may be, for example, a README.txt."""


def has_rows(path: str) -> bool:
    """Whether an unsupported file has rows, by its name."""
    return SURE.fullmatch(posixpath.basename(path)) is not None


def is_called(path: str, name: str) -> bool:
    """Whether an unsupported file of a known format would be the table `name`, by its own name."""
    stem, *endings = posixpath.basename(path).removeprefix(name).split(".")
    return not stem and bool(endings) and endings[-1].lower() in WAYS_OUT and len(endings) <= 2


def refusal(path: str, display: str) -> InvalidCall:
    """The error for an unsupported file."""
    way_out = WAYS_OUT.get(path.rpartition(".")[2].lower(), "save it as one of these")
    return InvalidCall(f"{display!r} is not a supported file: names must end in {FORMATS}; {way_out}")
