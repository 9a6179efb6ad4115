"""The files of a model on this machine, and how a change of them is noticed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

PATHS = {
    *("model", "model_weights", "spec_model", "tokenizer", "hf_config_path", "generation_config"),
    *("lora_path", "default_mm_loras", "lora_modules"),
    *("chat_template", "tool_parser_plugin", "reasoning_parser_plugin"),
}
"""Engine arguments whose texts are paths if a file or folder of this name exists."""

NESTED = {"speculative_config"}
"""Engine arguments with such arguments within them."""

Stamps = Sequence[tuple[str, int, int]]
"""The path, size and time of each file."""


def files_in(folder: str) -> Iterator[str]:
    """Yield the files in a model's folder and below, except hidden ones and Markdown."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        for name in files:
            path = Path(parent, name)
            if path.is_file() and not name.startswith(".") and path.suffix != ".md":
                yield path.relative_to(folder).as_posix()


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value, such as the paths of adapters."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def stamps(arguments: Mapping[str, Any]) -> Stamps:
    """Return the sizes and times of the files that engine arguments name, which show a change.

    There are none of a model of a hub, nor of one that is on another machine.
    """
    found: list[tuple[str, int, int]] = []
    named = {name.replace("-", "_"): value for name, value in arguments.items()}
    given = {text for name in (PATHS | NESTED) & named.keys() for text in _texts(named[name])}
    # An adapter may be given as NAME=PATH.
    given |= {text.partition("=")[2] for text in _texts(named.get("lora_modules"))}
    places = {os.path.abspath(text) for text in given if text}
    for path in [*places, *(os.path.join(place, name) for place in places for name in files_in(place))]:
        with suppress(OSError):  # a name on a hub, a text, or a file that is being replaced
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode):
                found.append((path, status.st_size, status.st_mtime_ns))
    return sorted(found)
