"""pyiceberg over the files of a lake; imported only for an Iceberg table."""

from __future__ import annotations

from typing import Any

from pyiceberg.catalog.noop import NoopCatalog
from pyiceberg.io import FileIO, InputFile, OutputFile
from pyiceberg.io.fsspec import FsspecInputFile
from pyiceberg.serializers import FromInputFile
from pyiceberg.table import StaticTable


class LakeFiles(FileIO):
    """Files through the lake's own filesystem `fs`, with its credentials; none is written."""

    def __init__(self, fs: Any) -> None:
        super().__init__({})
        self._fs = fs

    def new_input(self, location: str) -> InputFile:
        return FsspecInputFile(location=location, fs=self._fs)

    def new_output(self, location: str) -> OutputFile:
        raise NotImplementedError("Iceberg tables are only read")

    def delete(self, location: str | InputFile | OutputFile) -> None:
        raise NotImplementedError("Iceberg tables are only read")


def table(files: LakeFiles, metadata: str) -> StaticTable:
    """The table as described by the metadata file at this path; later versions have other files."""
    found = FromInputFile.table_metadata(files.new_input(metadata))
    return StaticTable(("lake", metadata), found, metadata, files, NoopCatalog("lake"))
