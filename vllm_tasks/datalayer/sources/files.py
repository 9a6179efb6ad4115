"""Finds the files of a name in a lake: a table's file or folder, a path, a glob, a Delta or Iceberg table."""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from vllm_tasks.datalayer.lake.delta import find_table
from vllm_tasks.datalayer.sources.data_file import DataFile
from vllm_tasks.datalayer.sources.iceberg import is_iceberg
from vllm_tasks.datalayer.sources.unread import FORMATS, has_rows, is_called, refusal
from vllm_tasks.datalayer.storage_errors import plain
from vllm_tasks.datalayer.workspace import Workspace
from vllm_tasks.errors import InvalidCall, TablesUnavailable, near
from vllm_tasks.hosts import options_of
from vllm_tasks.places import check_place, without_secrets


@dataclass(frozen=True)
class Table:
    """The meaning of one name: files of one format, or the folder of a Delta or Iceberg table."""

    name: str
    files: tuple[DataFile, ...] = ()
    delta: str | None = None
    """URL of the folder."""
    iceberg: str | None = None


class Files:
    """The files of a lake: `root` on the filesystem `fs`."""

    def __init__(self, url: str) -> None:
        """Raises `InvalidCall` for a scheme whose package is not installed."""
        self.fs, root = _opened(url)
        self.root = root.rstrip("/")

    def uri(self, path: str) -> str:
        """`path` in the form for DuckDB and delta-rs."""
        return path if self.local else str(self.fs.unstrip_protocol(path))

    def workspace(self, memory: str, files: Sequence[str] = ()) -> Workspace:
        """A workspace that may open the files of the lake, and `files`, the targets of its links."""
        root = self.uri(self.root)
        filesystem = None if self.local else self.fs
        return Workspace(memory, [f"{root}/", f"{exactly(root)}/"], filesystem, files=files)

    def linked(self, table: Table) -> list[str]:
        """The files of a table that are outside the lake, reached by links; see `_refuse_places`."""
        if not self.local:
            return []
        root = os.path.realpath(self.root)
        return [f.path for f in table.files if not os.path.realpath(f.path).startswith(root + "/")]

    def display(self, path: str) -> str:
        """`path` as text for people, without secrets."""
        return without_secrets(self.uri(path))

    @property
    def local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def tables(self) -> dict[str, list[str]]:
        """Paths by table name; raises `InvalidCall` if the lake does not exist."""
        found: dict[str, list[str]] = {}
        self.fs.invalidate_cache()
        try:
            entries = self._call("ls", self.root or "/", detail=True)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise InvalidCall(f"there is no folder {self.display(self.root)!r} to read from") from e
        for entry in entries:
            path = entry["name"].rstrip("/")
            name = posixpath.basename(path)
            if entry["type"] == "directory" or (entry.get("islink") and self._call("isdir", path)):
                if not name.startswith("."):
                    found.setdefault(name, []).append(path)
            elif file := self._file(path):
                found.setdefault(file.stem, []).append(path)
        return found

    def has(self, name: str) -> bool:
        """Whether there is a file, a folder of files, a Delta or Iceberg table `name`."""
        self.fs.invalidate_cache()
        if not self._call("exists", self.root or "/"):
            return False
        for path in self.tables().get(name, ()):
            if not self._call("isdir", path) or is_iceberg(self.fs, path):
                return True
            if self._call("exists", f"{path}/_delta_log"):
                return find_table(self.uri(path)) is not None  # it may just be under creation
            if self._data_files(path):
                return True
        return False

    def table(self, name: str, tables: dict[str, list[str]]) -> Table | None:
        """The table, path or glob `name`, given all `tables`; None if there is none; raises `InvalidCall`."""
        paths = tables.get(name)
        if paths is None:
            paths = self._paths(name)
        elif len(paths) > 1:
            those = ", ".join(sorted(posixpath.basename(p) for p in paths))
            raise InvalidCall(f"{name!r} may be any of {those}; give the file's complete name")
        if not paths:
            return None
        if len(paths) == 1 and self._call("isdir", paths[0]):
            return self._folder(name, paths[0])
        return self._of_one_format(name, paths)

    def unknown(self, name: str, tables: Collection[str]) -> InvalidCall:
        """The error for a table that does not exist, or whose format is not supported."""
        for entry in self._call("ls", self.root or "/", detail=False):
            if is_called(entry, name):
                return refusal(entry, self.display(entry))
        has = ", ".join(map(repr, sorted(tables)[:20])) + (", ..." if len(tables) > 20 else "")
        return InvalidCall(
            f"{self.display(self.root)!r} has no table, file or match for {name!r}{near(name, tables)}; "
            f"it has {has or 'no tables'}"
        )

    # ------------------------------------------------------------------ from a name to files

    def _folder(self, name: str, path: str) -> Table:
        self._refuse_places([path])
        if self._call("exists", f"{path}/_delta_log"):
            return Table(name, delta=self.uri(path))
        if is_iceberg(self.fs, path):
            return Table(name, iceberg=self.uri(path))
        found = self._data_files(path)
        if not found:
            raise InvalidCall(f"the folder {self.display(path)!r} holds no {FORMATS} files")
        return self._of_one_format(name, self._refuse_tables(found))

    def _of_one_format(self, name: str, paths: list[str]) -> Table:
        self._refuse_places(paths)
        files = [file for path in self._once(sorted(paths)) if (file := self._file(path))]
        kinds = sorted({file.kind for file in files})
        if len(kinds) != 1:
            raise InvalidCall(
                f"{name!r} has files of several kinds ({', '.join(kinds)}); name those of one kind"
            )
        return Table(name, tuple(files))

    def _once(self, paths: list[str]) -> list[str]:
        """Each file by one path only: a link may lead to a file that is in the lake itself."""
        if not self.local:
            return paths
        found: dict[str, str] = {}
        for path in paths:
            real = os.path.realpath(path)
            if path == real or real not in found:
                found[real] = path
        return sorted(found.values())

    def _paths(self, name: str) -> list[str]:
        path = name.strip()
        for prefix in (self.root + "/", self.uri(self.root) + "/"):
            path = path.removeprefix(prefix)
        outside = path.startswith("/") or "://" in path or ".." in path.split("/")
        if outside and not re.search(r"\s", path):
            raise InvalidCall(
                f"{name!r} is not in the lake {self.display(self.root)!r}; give a path relative to it"
            )
        if outside or not path:
            return []
        full = f"{self.root}/{path.rstrip('/')}"
        if self._call("exists", full):
            if not self._call("isdir", full) and self._file(full) is None:
                raise refusal(full, self.display(full))
            return self._refuse_tables([full]) if self._file(full) else [full]
        if not set("*?[") & set(path):
            return []
        return self._refuse_tables(self._with_rows(self._glob(path), path))

    def _file(self, path: str) -> DataFile | None:
        return DataFile.of(self.fs, path, self.display(path))

    def _data_files(self, folder: str) -> list[str]:
        return self._with_rows(self._inside(folder, set()), folder)

    def _with_rows(self, paths: Iterable[str], pattern: str) -> list[str]:
        """The files that can be read; raises `InvalidCall` for another one, whose rows would be missing."""
        found = []
        for path in paths:
            if self._hidden(path, pattern):
                continue
            if self._file(path):
                found.append(path)
            elif has_rows(path):
                raise refusal(path, self.display(path))
        return found

    def _inside(self, folder: str, seen: set[str]) -> Iterator[str]:
        """All files in a folder and in folders that its links lead to, each folder once."""
        seen.add(os.path.realpath(folder))
        for path in self._call("find", folder):
            linked = self.local and os.path.islink(path) and os.path.isdir(path)
            if not linked:
                yield path
                continue
            real = os.path.realpath(path)
            if not any(f"{real}/".startswith(f"{folder}/") for folder in seen):
                yield from self._inside(path, seen)

    def _glob(self, pattern: str) -> Iterable[str]:
        """All files and folders whose path in the lake matches, including those in linked folders, which
        fsspec itself does not enter."""
        if any("**" in part and part != "**" for part in pattern.split("/")):
            raise InvalidCall(
                f"{pattern!r:.200} is not a glob: ** stands for complete folders, as in a/**/*.parquet"
            )
        if not self.local:
            found: list[str] = self._call("glob", f"{exactly(self.root)}/{pattern}")
            return found
        if "**" not in pattern:
            return glob.glob(f"{glob.escape(self.root)}/{pattern}", include_hidden=True)
        matches, start = re.compile(glob_translate(pattern)).match, len(self.root) + 1
        folder = posixpath.dirname(re.split(r"[*?[]", pattern)[0])
        inside = self._inside(f"{self.root}/{folder}".rstrip("/"), set())
        return [path for path in inside if matches(path[start:])]

    def _hidden(self, path: str, pattern: str) -> bool:
        """Whether a part of `path` that `pattern` does not name begins with . or _, like a log."""
        named = set(pattern.split("/"))
        parts = path.removeprefix(self.root + "/").split("/")
        return any(part[0] in "._" and part not in named for part in parts if part)

    def _refuse_tables(self, paths: list[str]) -> list[str]:
        """Refuse files of a Delta or Iceberg table: some belong to earlier versions of its rows."""
        folders: set[str] = set()
        for path in paths:
            while (path := posixpath.dirname(path)) not in folders and len(path) >= len(self.root):
                folders.add(path)
        for folder in sorted(folders):
            kind = "a Delta" if self._call("exists", f"{folder}/_delta_log") else ""
            kind = kind or ("an Iceberg" if is_iceberg(self.fs, folder) else "")
            if kind:
                raise InvalidCall(f"{self.display(folder)!r} is {kind} table: name it, not the files in it")
        return paths

    def _refuse_places(self, paths: list[str]) -> None:
        """Refuse links that lead out of the places that the site allows; they may lead out of the lake."""
        if not self.local:
            return
        root = os.path.realpath(self.root)
        for path in paths:
            real = os.path.realpath(path)
            if os.path.islink(path) and not os.path.exists(path):
                raise InvalidCall(
                    f"the link {path!r} leads to {real!r}, which does not exist: correct or remove it"
                )
            if not (os.path.isfile(real) or os.path.isdir(real)):
                raise InvalidCall(
                    f"{path!r} is not a file but a pipe, a socket or a device, which can be read only once "
                    "and may never end; write what comes from it to a file"
                )
            if not real.startswith(root + "/"):
                check_place("the file behind the link", real)

    def _call(self, method: str, path: str, **given: Any) -> Any:
        try:
            return getattr(self.fs, method)(path, **given)
        except (FileNotFoundError, NotADirectoryError):
            raise
        except PermissionError as e:
            raise InvalidCall(f"cannot list {self.display(path)!r}: not allowed: {plain(e)}") from e
        except Exception as e:  # the errors of filesystems have no common base class
            raise TablesUnavailable(f"cannot list {self.display(path)!r}: {plain(e)}") from e


def exactly(uri: str) -> str:
    """A glob that matches only `uri`."""
    return re.sub(r"([*?[])", r"[\1]", uri)


def _opened(url: str) -> tuple[Any, str]:
    """The filesystem of a lake, and its path there."""
    if "://" not in url:
        # fsspec would take a :: in the path for one filesystem inside another.
        return LocalFileSystem(skip_instance_cache=True), LocalFileSystem._strip_protocol(url)
    try:
        fs, root = fsspec.url_to_fs(url, skip_instance_cache=True, **options_of("the lake", url))
    except ImportError as e:
        raise InvalidCall(f"{url.partition('://')[0]}:// needs another package: {e}") from e
    except OSError as e:  # some filesystems connect immediately
        raise TablesUnavailable(f"cannot reach {without_secrets(url)!r}: {plain(e)}") from e
    return fs, root
